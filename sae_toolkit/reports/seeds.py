"""The end of a run with several seeds: a table of what their SAEs have in common."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from sae_toolkit.errors import UserError
from sae_toolkit.reports.further import render_further
from sae_toolkit.training.run import Training
from sae_toolkit.training.seeds import stability_of_seeds

log = logging.getLogger(__name__)


def show_seeds(training: Training, final: Path) -> None:
    """Prints on standard error how many features of each SAE the others have, if the run has several seeds.

    Args:
        training: the run, which is finished.
        final: the directory of its finished SAEs.
    """
    if training.run.optimization.seeds == 1:
        return
    command = f"python evaluate_sae_real_activations.py --stability {final}"
    if training.run.held_out_NT is None:
        log.info("no held-out text is here to compare the seeds on; to compare them: %s", command)
        return
    try:
        found = stability_of_seeds(training, final)
    except UserError as error:  # the SAEs are finished and saved
        log.warning("the seeds were not compared: %s; to compare them: %s", error, command)
        return
    summaries = [{"sae": {"name": name}, "stability": results} for name, results in found.items()]
    console = Console(stderr=True)
    for part in render_further(summaries):
        console.print(part)
    log.info("on more text, with all metrics: %s", command)
