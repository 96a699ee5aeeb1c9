"""The panels of a run's record, grouped by the question that they answer: does the SAE learn, is it sparse, are its
features alive, is training fast.

Within a group the names are SAELens's. The group `held_out` has the metrics of the evaluation, on held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A prefix of SAELens's names -> the group. The first prefix that fits counts.
_GROUPS = {
    "metrics/l0": "sparsity",
    "metrics/topk_threshold": "sparsity",
    "metrics/": "learning",
    "losses/": "learning",
    "sparsity/": "alive",
    "details/current_learning_rate": "learning",
    "details/l0_coefficient": "sparsity",
    "details/l1_coefficient": "sparsity",
    "details/": "speed",
    "held_out/": "held_out",
}
_HELD_OUT = (
    *("loss_recovered", "ce_clean", "ce_sae", "ce_zero", "kl_sae"),
    *("explained_variance", "cosine_similarity", "l2_ratio", "l0", "dead_features"),
)


def panels(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns all readings in one mapping by the names of their panels.

    A name is group/name, or group/hook/name if there are several hooks.

    Args:
        readings: readings at each hook, by the name of the hook.
    """
    by_panel = {}
    for hook_name, reading in readings.items():
        between = f"{hook_name}/" if len(readings) > 1 else ""
        for name, value in reading.items():
            begins = next((key for key in _GROUPS if name.startswith(key)), None)
            if begins is None:
                by_panel[f"{between}{name}"] = value
            else:
                by_panel[f"{_GROUPS[begins]}/{between}{name.partition('/')[2]}"] = value
    return by_panel


def of_held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of an evaluation that a training records, by the names of their panels."""
    return {f"held_out/{name}": metrics[name] for name in _HELD_OUT}
