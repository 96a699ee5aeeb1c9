#!/usr/bin/env python
"""Trains SAEs of several libraries on the same activations, and measures them with the same evaluation.

    # SAELens, sparsify and dictionary_learning on the embedded model, at one L0, on 250,000 tokens
    python compare_sae_libraries.py @presets/demo.args --quick

    # the full comparison: four L0s, three seeds
    python compare_sae_libraries.py @presets/demo.args --l0 20 40 80 160 --seeds 3

    # only some kinds of SAE; a number after @ replaces the library's own learning rate
    python compare_sae_libraries.py @presets/demo.args --libraries saelens:batchtopk dictionary_learning:batchtopk@2e-3

    # the best learning rate of each kind, for each L0: chosen with one seed on held-out text that the table leaves out.
    # dictionary_learning's BatchTopK among three, sparsify's TopK among four; two trainings at a time
    python compare_sae_libraries.py @presets/demo.args --l0 20 80 --seeds 3 --parallel 2 --learning_rates 4 \\
        --libraries saelens:batchtopk dictionary_learning:batchtopk@3e-4,1e-3,2e-3 sparsify

    # list the SAEs, and train none
    python compare_sae_libraries.py @presets/demo.args --quick --dry_run

All other flags are flags of sae_lens_train.py. Model, text, width, tokens and batch apply to every library; the
settings of the training (--lr, ...) apply to SAELens alone. Each library trains with its own code:

    SAELens              sae_lens_train.py. For kinds of SAE without a k, --target_l0 adjusts the L0.
    sparsify             Its Trainer, with its optimizer and its learning rate, on the same batches of activations.
    dictionary_learning  Its trainers, with the settings of dictionary_learning_demo, on the same batches. The schedules
                         are scaled to the run. The library has its own environment, which the first comparison creates.

The same command continues a comparison that was stopped. It prints a table and the order of the SAEs at each L0, and
writes comparison.json, comparison.md and comparison.html to the comparison's directory, next to the SAEs.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import parse_contenders
from sae_toolkit.many_runs.comparison.learning_rates import check_learning_rates, list_saes, with_learning_rates
from sae_toolkit.many_runs.directories import claimed
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.comparison import (
    check_training_flags,
    parse_comparison_flags,
    with_few_tokens,
    without_target_l0,
)
from sae_toolkit.terminal.console import importing, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")

_QUICK_L0S, _L0S = [64], [20, 40, 80, 160]


def main() -> int:
    settings, words = parse_comparison_flags(__doc__)
    set_up_logging(settings.run.verbose, settings.run.quiet)
    training = parse_training_flags(words)
    check_training_flags(words, training)
    if settings.run.quick:
        words = with_few_tokens(words, training)
    words = without_target_l0(words)
    n_cores, parallel = len(os.sched_getaffinity(0)), settings.run.parallel
    if parallel > n_cores:
        raise UserError(f"--parallel {parallel}: there are {n_cores} cores here; give at most {n_cores}")
    contenders, n_rates = parse_contenders(settings.contenders.libraries), settings.contenders.learning_rates
    check_learning_rates(contenders, n_rates)
    directory = (settings.run.comparison_dir or Path("comparisons") / training.run.output_name).absolute()
    l0s = sorted(set(settings.contenders.l0 or (_QUICK_L0S if settings.run.quick else _L0S)))
    first_seed = training.optimization.seed
    seeds = range(first_seed, first_seed + settings.contenders.seeds)
    if settings.run.dry_run:
        for number, name in enumerate(list_saes(contenders, l0s, seeds, n_rates), 1):
            print(f"{number}: {name}")
        return 0

    # Imported here because torch and SAELens take seconds to import, and --help and a mistyped flag do not need them.
    with importing("torch and SAELens"):
        from rich.console import Console

        from sae_toolkit.many_runs.comparison.notes import describe
        from sae_toolkit.many_runs.comparison.report import render_comparison, summary_table, write_comparison
        from sae_toolkit.many_runs.comparison.run import choose_learning_rates, train_and_evaluate
        from sae_toolkit.many_runs.comparison.shared_activations import share
        from sae_toolkit.training.record.start import record_runs

    with claimed(directory, "--comparison_dir"):
        chooses = n_rates is not None or any(contender.rates for contender in contenders)
        shared = share(words, directory, highest_l0=l0s[-1], halves=chooses)
        if parallel > 1:
            shared = replace(shared, at_a_time=parallel, threads=n_cores // parallel)
        contenders = with_learning_rates(contenders, n_rates, d_sae=shared.run.cfg.sae.d_sae, n_steps=shared.n_steps)
        num_samples = settings.run.num_samples
        choices = choose_learning_rates(contenders, l0s, first_seed, shared, num_samples)
        outcomes = train_and_evaluate(contenders, l0s, seeds, choices, shared, num_samples)
        page = write_comparison(outcomes, choices, directory, describe(shared, outcomes, choices))
        saes = {
            outcome.entry.name: Path(outcome.trained["sae"])
            for outcome in outcomes
            if outcome.trained and outcome.entry.contender.library == "saelens"  # the others have no wandb runs
        }
        record_runs("comparison", directory, training.recording, training.as_flags(), saes, summary_table(outcomes))
    log.info("written to %s", page)
    Console(width=None if sys.stdout.isatty() else 200).print(render_comparison(outcomes, choices))
    if not any(outcome.evaluation for outcome in outcomes):
        raise UserError(f"--libraries: no SAE of {len(outcomes)} was evaluated; {page.with_suffix('.md')} says why")
    return 0


if __name__ == "__main__":
    run_script(main)
