"""What a run's record shows, in groups by what one asks of it: is it learning, is it sparse, is it alive, is it fast.

Within a group the names are SAELens's. `held_out` is what the evaluation measures, on text that is not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# SAELens's names, or how they begin -> the group.
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
    """Readings of SAEs by the name of their hook, as one record; of several, the hook's name stands after the group."""
    found = {}
    for hook_name, reading in readings.items():
        between = f"{hook_name}/" if len(readings) > 1 else ""
        for name, value in reading.items():
            begins = next((key for key in _GROUPS if name.startswith(key)), None)
            if begins is None:
                found[f"{between}{name}"] = value
            else:
                found[f"{_GROUPS[begins]}/{between}{name.partition('/')[2]}"] = value
    return found


def of_held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """What an evaluation's metrics show during training."""
    return {f"held_out/{name}": metrics[name] for name in _HELD_OUT}
