"""What the SAEs of a run have in common if they differ in their seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_toolkit.activations.cache import CachedActivations
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.evaluation.stability.measure import Stability
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.steps.memory import HELD_OUT_ROWS_AT_ONCE
from sae_toolkit.training.held_out import HeldOutText
from sae_toolkit.training.run import Training


def stability_of_seeds(training: Training, final: Path) -> dict[str, Mapping[str, Any]]:
    """Returns the stability of each finished SAE against the others, by the SAE's name.

    Args:
        training: the run, which must have held-out text.
        final: the directory of its finished SAEs.

    Raises:
        UserError: the memory does not suffice.
    """
    run, source = training.run, training.activations
    saes = [
        EvaluatedSAE(
            SAEFile(name, final / name, "SAELens", "inference form"),
            load_sae(final / name, "cpu"),
            replace(run.positions, max_activation_norm=training.max_norms[name]),
        )
        for name in run.sae_names
    ]
    (hook_name,) = run.hook_names
    group = HeldOutText(run, source).prepare(hook_name, *saes)
    model = source.model if isinstance(source, CachedActivations) else source
    measured = Stability(saes).measure(group, model, HELD_OUT_ROWS_AT_ONCE)
    return {name: each.results for name, each in zip(run.sae_names, measured, strict=True)}
