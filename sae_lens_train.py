#!/usr/bin/env python
"""Trains a sparse autoencoder with SAELens on the activations of a language model.

    python sae_lens_train.py @presets/demo.args            # healthy in minutes, no GPU, no account
    python sae_lens_train.py @presets/llama3-8b.args       # Llama-3-8B, layer 12, on one GPU
    python sae_lens_train.py @presets/demo.args --dry_run  # what would run

Progress goes to standard error; the only line on standard output is the finished SAE's directory.
"""

from __future__ import annotations

import logging

from sae_toolkit.console import run_script, set_up_logging
from sae_toolkit.training_flags import parse_training_flags

log = logging.getLogger("sae_toolkit")


def main() -> int:
    flags = parse_training_flags()
    set_up_logging()

    # SAELens takes seconds to import: not for --help or a mistyped flag.
    from sae_toolkit.training import Interrupted, Training, open_activations
    from sae_toolkit.training_setup import create_run_directory, prepare_run, start_wandb_run

    run = prepare_run(flags)
    log.info(run.describe())
    if warning := run.memory_warning():
        log.warning(warning)
    if flags.dry_run:
        log.info(run.plan_memory().describe())
        return 0
    training = Training(run, open_activations(run))
    create_run_directory(run)
    wandb_run = start_wandb_run(run)
    try:
        final = training.fit(wandb_run)
    except Interrupted as interrupted:
        log.warning("%s; to go on: python sae_lens_train.py --resume %s", interrupted, interrupted.checkpoint)
        return 128 + interrupted.signal_number
    finally:
        wandb_run.finish()
    print(final)
    return 0


if __name__ == "__main__":
    run_script(main)
