#!/usr/bin/env python
"""Trains and evaluates SAEs over a grid of settings, on this machine or a Ray cluster, and names the best.

    # six trials, two at a time where there are two cores
    python sweep_saes.py @presets/demo.args --grid lr=3e-4,1e-3,3e-3 k=32,64

    # ten trials drawn at random; stop those that are less promising than the others
    python sweep_saes.py @presets/demo.args --sample 10 --range lr=1e-4:1e-2 --grid k=32,64 --early_stop

    # one GPU for each trial, on a cluster (`ray start --head` on one machine, `ray start --address` on the others)
    python sweep_saes.py @presets/llama3-8b.args --grid k=32,64,128 --address auto --gpus_per_trial 1

    # list the trials, and run none
    python sweep_saes.py @presets/demo.args --grid k=32,64 --dry_run

All other flags are flags of sae_lens_train.py and hold for every trial. A trial is an ordinary training run, followed
by its evaluation. Trials on the same model, hook and context size share their activations. The same command continues a
sweep that was stopped or killed. It prints a table, and writes sweep.json, sweep.md and sweep.html to the sweep's
directory.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.directories import claimed, read_result
from sae_toolkit.many_runs.sweep.trials import make_trials
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.sweep import parse_sweep_flags
from sae_toolkit.terminal.console import importing, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")


def main() -> int:
    settings, base = parse_sweep_flags(__doc__)
    set_up_logging()
    training = parse_training_flags(base)
    name = training.run.output_name
    directory = Path(settings.run.sweep_dir or f"sweeps/{name}")
    trials = make_trials(
        base,
        directory.absolute(),
        grids=settings.trials.grid,
        ranges=settings.trials.range,
        n_samples=settings.trials.sample,
        seed=settings.trials.sample_seed,
        caches=not settings.trials.no_cache,
    )
    n_finished = sum(read_result(trial.directory) is not None for trial in trials)
    log.info("%d trials, %d of them finished before, in %s", len(trials), n_finished, directory)
    if settings.run.dry_run:
        for trial in trials:
            print(f"{trial.number}: {trial.name}")
        return 0

    if find_spec("ray") is None:
        install = f"{sys.executable} -m pip install -c constraints.txt -r requirements/sweep.txt"
        raise UserError(f"sweep_saes.py: Ray is not installed here: {install}")
    # Imported here because Ray and torch take seconds to import, and --help and a mistyped flag do not need them.
    with importing("Ray and torch"):
        from rich.console import Console

        from sae_toolkit.many_runs.sweep.report import render_sweep, sweep_table, write_sweep
        from sae_toolkit.many_runs.sweep.run import ray_cluster, run_trials
        from sae_toolkit.training.record.start import record_runs

    with claimed(directory, "--sweep_dir"), ray_cluster(settings.run.address):
        outcomes = run_trials(
            trials,
            directory,
            name=name,
            cpus_per_trial=settings.run.cpus_per_trial,
            gpus_per_trial=settings.run.gpus_per_trial,
            early_stop=settings.run.early_stop,
            evaluation_flags=["--num_samples", str(settings.run.num_samples)] if settings.run.num_samples else [],
            trust_remote_code=training.model.trust_remote_code,
        )
    page = write_sweep(outcomes, directory)
    saes = {f"trial {trial.number}: {trial.name}": Path(o["sae"]) for trial, o in outcomes if "sae" in o}
    record_runs("sweep", directory, training.recording, training.as_flags(), saes, sweep_table(outcomes))
    log.info("written to %s", page)
    Console(width=None if sys.stdout.isatty() else 120).print(render_sweep(outcomes))
    if not saes:
        raise UserError(f"--grid: no trial of {len(trials)} was evaluated; {page.with_suffix('.md')} says why")
    return 0


if __name__ == "__main__":
    run_script(main)
