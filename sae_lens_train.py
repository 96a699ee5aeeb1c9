#!/usr/bin/env python
"""Trains a sparse autoencoder with SAELens on the activations of a language model.

    python sae_lens_train.py @presets/demo.args            # a small model; minutes, no GPU, no account
    python sae_lens_train.py @presets/llama3-8b.args       # Llama-3-8B, layer 12, on one GPU
    python sae_lens_train.py @presets/demo.args --dry_run  # shows what would run
    python sae_lens_train.py @presets/demo.args --seeds 3  # three SAEs, and how many features they share
    ./run_simple.sh 4 "0,1,2,3" @presets/llama3-8b.args    # on four GPUs

Progress goes to standard error. The only line on standard output is the directory of the finished SAE.
"""

from __future__ import annotations

import logging

from sae_toolkit.distributed.torchrun import rank_in_environment, was_restarted
from sae_toolkit.settings.command_line import after_restart, parse_training_flags
from sae_toolkit.terminal.console import importing, run_script, set_up_logging
from sae_toolkit.terminal.stop_signals import Stopped, StopSignals, hear_stop_signals

log = logging.getLogger("sae_toolkit")


def main() -> int:
    with hear_stop_signals() as signals:
        return train(signals)


def train(signals: StopSignals) -> int:
    training = None
    try:
        settings = parse_training_flags()
        if was_restarted():
            settings = after_restart(settings)
        set_up_logging(settings.recording.verbose, settings.recording.quiet, speaks=rank_in_environment() == 0)

        # Imported here because SAELens takes seconds to import, and --help and a mistyped flag do not need it.
        with importing("SAELens"):
            from sae_toolkit.distributed.ranks import join_ranks
            from sae_toolkit.model.devices import freed_memory
            from sae_toolkit.reports.seeds import show_seeds
            from sae_toolkit.training.card import show_fit
            from sae_toolkit.training.loop import fit
            from sae_toolkit.training.preflight import check_activations, check_before_loading, dry_run
            from sae_toolkit.training.record.start import start_record
            from sae_toolkit.training.run import Training, open_activations
            from sae_toolkit.training.setup import prepare_run

        if settings.run.device_memory is not None:
            show_fit(settings)
            return 0
        with join_ranks() as ranks:  # if torchrun started several
            run = prepare_run(settings, ranks)
            with run.run_directory:
                check_before_loading(run, settings.run)
                if settings.run.dry_run:
                    dry_run(run, settings.run)
                    return 0
                activations = open_activations(run)
                with freed_memory(run.cfg.device, is_kept=not run.finetunes):
                    check_activations(run, activations, settings.run)
                    training = Training(run, activations)
                    run.open_directory()
                    record = start_record(run)
                    try:
                        final = fit(training, record, signals)
                    finally:
                        record.finish()
                if ranks.is_main:
                    show_seeds(training, final)
    except Stopped as stopped:
        what_now = training.checkpoints.how_to_go_on() if training else "nothing was trained yet"
        log.warning("%s; %s", stopped, what_now)
        return stopped.exit_status
    if ranks.is_main:
        print(final)
    return 0


if __name__ == "__main__":
    run_script(main)
