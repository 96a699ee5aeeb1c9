"""The table of --synthetic, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_toolkit.evaluation.shown import Shown

_LABELS = {
    "mcc": "MCC",
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "uniqueness": "Uniqueness",
    "explained_variance": "Explained variance",
    "l0": "L0",
    "shrinkage": "L2 norm, reconstruction / activation",
}


def show_synthetic(results: Mapping[str, Any]) -> Shown:
    """Returns the table of an SAE's scores.

    Args:
        results: as evaluation.json stores them.
    """
    intervals = results["intervals"]
    return Shown(
        title="What is found of the true features",
        columns=("", "Value", "95% interval"),
        rows=tuple(
            (label, _number(name, results[name]), _interval(name, intervals.get(name)))
            for name, label in _LABELS.items()
        ),
        how_to_read=_HOW_TO_READ.format(**results),
    )


_HOW_TO_READ = (
    "MCC is the mean |cosine| of features and true features, matched one to one (random directions: {random_mcc:.3f})."
    " F1, precision and recall say how well each feature fires where the true feature nearest to it is active, averaged"
    " over features; a feature that never fires counts as 0 ({dead_features} of {n_features}). Uniqueness is the share"
    " of features that are nearest to a true feature that no other stands for. Of the {n_true_features} true features"
    " {true_l0:.1f} are active at a time, and {l0_of_frequent:.1f} of the {n_features} most frequent. The scores are"
    " SAELens's (SynthSAEBench, arXiv 2602.14687); intervals are over samples, and seeds differ by more."
)


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "l0" else f"{value:.3f}"


def _interval(name: str, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{_number(name, interval[0])} to {_number(name, interval[1])}"
