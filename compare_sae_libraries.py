#!/usr/bin/env python
"""Trains the SAEs of several libraries on the same activations, and measures them with the same evaluation.

    # SAELens, sparsify and dictionary_learning on the embedded model, at one L0, on 250,000 tokens
    python compare_sae_libraries.py @presets/demo.args --quick

    # the whole picture: four L0s, three seeds
    python compare_sae_libraries.py @presets/demo.args --l0 20 40 80 160 --seeds 3

    # some kinds of SAE alone; with another learning rate than their library's, after an @
    python compare_sae_libraries.py @presets/demo.args --libraries saelens:batchtopk dictionary_learning:batchtopk@2e-3

    # what would run
    python compare_sae_libraries.py @presets/demo.args --quick --dry_run

All other flags are those of sae_lens_train.py: model, text, width, tokens and batch hold for every library, and the
settings of the training (--lr, ...) for SAELens. Each library trains with its own code: SAELens as sae_lens_train.py
runs it, an L0 that is an outcome found by --target_l0; sparsify with its Trainer, its optimizer and its learning rate,
on the same rows of tokens but from the live model; dictionary_learning with its trainers and dictionary_learning_demo's
settings, schedules scaled to the run, in an environment of its own that is made the first time.

A comparison that was stopped goes on with the same command. The table goes to standard output; comparison.json,
comparison.md and comparison.html into its directory, with the SAEs.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Entry, make_entries, parse_contenders
from sae_toolkit.many_runs.processes import claimed
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.comparison import parse_comparison_flags
from sae_toolkit.terminal.console import run_script, set_up_logging

log = logging.getLogger("sae_toolkit")

_QUICK_TOKENS = 250_000
_SETTINGS = "settings.json"


def main() -> int:
    settings, words = parse_comparison_flags(__doc__)
    set_up_logging(settings.run.verbose, settings.run.quiet)
    given = parse_training_flags(words)
    if given.model.layers or given.model.hook_names:
        raise UserError("--layers, --hook_names: a comparison is of one hook; give --layer")
    if given.run.resume or given.sae.shard_features:
        raise UserError("--resume, --shard_features: not in a comparison, which goes on by itself; leave them out")
    if settings.run.quick and "--training_tokens" not in words:
        decay = given.optimization.lr_decay_steps * _QUICK_TOKENS // given.optimization.training_tokens
        words = [*words, "--training_tokens", str(_QUICK_TOKENS), "--lr_decay_steps", str(decay)]
    contenders = parse_contenders(settings.contenders.libraries)
    directory = (settings.run.comparison_dir or Path("comparisons") / given.run.output_name).absolute()
    l0s = sorted(set(settings.contenders.l0 or ([64] if settings.run.quick else [20, 40, 80, 160])))
    entries = make_entries(
        contenders, l0s, range(given.optimization.seed, given.optimization.seed + settings.contenders.seeds), directory
    )
    if settings.run.dry_run:
        for number, entry in enumerate(entries, 1):
            print(f"{number}: {entry.name}")
        return 0

    # torch and SAELens take seconds to import: not for --help or a mistyped flag.
    from rich.console import Console

    from sae_toolkit.many_runs.comparison.report import Outcome, render_comparison, summary_table, write_comparison
    from sae_toolkit.many_runs.comparison.run import describe, evaluate_entries, train_entry
    from sae_toolkit.many_runs.comparison.shared_activations import share
    from sae_toolkit.training.record.start import record_runs

    with claimed(directory, "--comparison_dir"):
        in_common = _in_common(words)
        _check_same(directory, in_common)
        shared = share(words, directory, highest_l0=l0s[-1])
        (directory / _SETTINGS).write_text(json.dumps(in_common, indent=1) + "\n")  # of a comparison that can run
        failed: dict[Entry, str] = {}
        for number, entry in enumerate(entries, 1):
            log.info("SAE %d of %d: %s%s", number, len(entries), entry.name, ", from before" * bool(entry.trained()))
            try:
                train_entry(entry, shared)
            except UserError as error:
                failed[entry] = str(error).removeprefix(f"{entry.name}: ")
                log.warning("%s", error)
        more = ["--num_samples", str(settings.run.num_samples)] if settings.run.num_samples else []
        failed |= evaluate_entries(entries, shared, more)
        outcomes = [Outcome(entry, entry.trained(), entry.evaluation(), failed.get(entry)) for entry in entries]
        page = write_comparison(outcomes, directory, describe(shared))
        runs = {o.entry.name: Path(o.trained["sae"]) for o in outcomes if o.trained and o.entry.is_own}
        record_runs("comparison", directory, given.recording, given.as_flags(), runs, summary_table(outcomes))
    log.info("written to %s", page)
    Console(width=None if sys.stdout.isatty() else 200).print(render_comparison(outcomes))
    if not any(outcome.evaluation for outcome in outcomes):
        raise UserError(f"--libraries: no SAE of {len(entries)} was evaluated; {page.with_suffix('.md')} says why")
    return 0


def _in_common(words: list[str]) -> dict[str, Any]:
    """The flags that all SAEs of a comparison must have in common."""
    return {
        name: value
        for name, value in parse_training_flags(words).as_flags().items()
        if name not in ("verbose", "quiet", "seed", "device", "preset") and not name.startswith(("wandb", "logger"))
    }


def _check_same(directory: Path, flags: dict[str, Any]) -> None:
    """Refuses to mix SAEs that were trained with other flags into a comparison."""
    file = directory / _SETTINGS
    try:
        before = json.loads(file.read_text()) if file.exists() else flags
        changed = sorted(name for name in flags if flags[name] != before.get(name))
    except (OSError, ValueError, AttributeError):
        raise UserError(f"--comparison_dir {directory}: {_SETTINGS} is damaged; name another directory") from None
    if changed:
        name = changed[0]
        raise UserError(
            f"--{name} {flags[name]}: the comparison in {directory} has {before.get(name)}; name another"
            " --comparison_dir"
        )


if __name__ == "__main__":
    run_script(main)
