#!/usr/bin/env python
"""Trains and evaluates SAEs over a grid of settings, on this machine or a Ray cluster, and names the best.

    # six trials, two at a time where there are two cores
    python sweep_saes.py @presets/demo.args --grid lr=3e-4,1e-3,3e-3 k=32,64

    # ten drawn at random, hopeless ones stopped early
    python sweep_saes.py @presets/demo.args --sample 10 --range lr=1e-4:1e-2 --grid k=32,64 --early_stop

    # one GPU a trial, on a cluster (`ray start --head` on one machine, `ray start --address` on the others)
    python sweep_saes.py @presets/llama3-8b.args --grid k=32,64,128 --address auto --gpus_per_trial 1

    # what would run
    python sweep_saes.py @presets/demo.args --grid k=32,64 --dry_run

All other flags are those of sae_lens_train.py and hold for each trial. A trial is an ordinary training run with its
evaluation; trials share the activations that they have in common. A sweep that was stopped or killed goes on with the
same command. The table goes to standard output; sweep.json, sweep.md and sweep.html into the sweep's directory.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.processes import claimed
from sae_toolkit.many_runs.sweep.trials import Trial, make_trials
from sae_toolkit.settings.training import parse_training_flags
from sae_toolkit.settings.values import non_negative, non_negative_float, positive
from sae_toolkit.terminal.console import Parser, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own flags, and those of all trials."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--grid", nargs="+", action="extend", default=[], metavar="NAME=V1,V2", help="values to combine, of any flag")
    add("--range", nargs="+", action="extend", default=[], metavar="NAME=LOW:HIGH", help="ends to draw between")
    add("--sample", type=positive, metavar="N", help="draw N trials at random rather than run all combinations")
    add("--sample_seed", type=non_negative, default=0, help="of these draws (default: 0)")
    add("--early_stop", action="store_true", help="stop trials that promise too little (ASHA)")
    add("--sweep_dir", help="directory of the sweep (default: sweeps/OUTPUT_NAME)")
    add("--no_cache", action="store_true", help="do not keep activations; trials compute their own")
    add("--address", help="a Ray cluster: auto, or host:port of its head (default: this machine alone)")
    add("--cpus_per_trial", type=positive, default=1, help="cores of each trial (default: 1)")
    add("--gpus_per_trial", type=non_negative_float, help="GPUs of each trial (default: 1 where there are any)")
    add("--num_samples", type=positive, help="sequences of each evaluation (default: the evaluation's)")
    add("--dry_run", action="store_true", help="list the trials, and stop")
    return parser.parse_known_args()


def main() -> int:
    flags, base = parse_flags()
    set_up_logging()
    name = parse_training_flags(base).output_name
    directory = Path(flags.sweep_dir or f"sweeps/{name}")
    trials = make_trials(
        base,
        directory.absolute(),
        grids=flags.grid,
        ranges=flags.range,
        n_samples=flags.sample,
        seed=flags.sample_seed,
        caches=not flags.no_cache,
    )
    log.info("%d trials, %d of them finished before, in %s", len(trials), _n_finished(trials), directory)
    if flags.dry_run:
        for trial in trials:
            print(f"{trial.number}: {trial.name}")
        return 0

    # Ray and torch take seconds to import: not for --help or a mistyped flag.
    from rich.console import Console

    from sae_toolkit.many_runs.sweep.report import render_sweep, sweep_table, write_sweep
    from sae_toolkit.training.record.start import record_runs

    try:
        from sae_toolkit.many_runs.sweep.run import default_gpus, ray_cluster, run_trials
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        install = f"{sys.executable} -m pip install -c constraints.txt -r requirements/sweep.txt"
        raise UserError(f"sweep_saes.py: Ray is not installed here: {install}") from None

    with claimed(directory, "--sweep_dir"), ray_cluster(flags.address):
        for number in (signal.SIGTERM, signal.SIGHUP):  # Ray Tune hears Ctrl-C, and stops its trials
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` sets it
                signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        outcomes = run_trials(
            trials,
            directory,
            name=name,
            cpus_per_trial=flags.cpus_per_trial,
            gpus_per_trial=default_gpus() if flags.gpus_per_trial is None else flags.gpus_per_trial,
            early_stop=flags.early_stop,
            evaluation_flags=["--num_samples", str(flags.num_samples)] if flags.num_samples else [],
        )
    page = write_sweep(outcomes, directory)
    saes = {f"trial {trial.number}: {trial.name}": Path(o["sae"]) for trial, o in outcomes if "sae" in o}
    record_runs("sweep", directory, parse_training_flags(base), saes, sweep_table(outcomes))
    log.info("written to %s", page)
    Console(width=None if sys.stdout.isatty() else 120).print(render_sweep(outcomes))
    if not any("metrics" in outcome for _, outcome in outcomes):
        raise UserError(f"--grid: no trial of {len(trials)} was evaluated; {page.with_suffix('.md')} says why")
    return 0


def _n_finished(trials: list[Trial]) -> int:
    return sum(trial.result() is not None for trial in trials)


if __name__ == "__main__":
    run_script(main)
