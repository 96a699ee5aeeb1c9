"""The table of probing in the terminal and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_toolkit.evaluation.shown import Shown

_KS_SHOWN = (1, 16, 128)


def show_probing(results: Mapping[str, Any]) -> Shown:
    """Returns the AUC of each task, and their mean, for some k and for the activations themselves.

    Args:
        results: the results of one SAE, as `measure_probing` returns them.
    """
    ks = [each["k"] for each in results["mean"]["sae"] if each["k"] in _KS_SHOWN]
    rows = [_row(each["task"] + _trained_on(each), each, ks) for each in results["tasks"]]
    return Shown(
        title=f"k-sparse probing: AUC on test examples of {len(rows)} task{'s' if len(rows) > 1 else ''}",
        columns=("Task", *(f"k = {k}" for k in ks), "Activations"),
        rows=(*rows, _row("mean", results["mean"], ks)) if len(rows) > 1 else tuple(rows),
        how_to_read=(
            "AUC of a probe on the k features that differ most between two classes of text. 0.5 is chance, and in"
            " brackets are 95% intervals over the different test texts. The last column is a probe on the activations:"
            " what few features lack against it, the SAE has lost or spread over more features. Of SAEBench's metrics"
            " this was the most reliable, but it hardly tells variants of one architecture apart (arXiv:2605.18229)."
        ),
    )


def _trained_on(task: Mapping[str, Any]) -> str:
    """Returns what is to be said beside the name of a task whose texts are in the training and in the test."""
    share = task["n_test_trained_on"] / task["n_test"]
    return f" ({share:.0%} of the test texts were trained on)" if share else ""


def _row(name: str, results: Mapping[str, Any], ks: list[int]) -> tuple[str, ...]:
    of_ks = [each for each in results["sae"] if each["k"] in ks]
    return (name, *map(_cell, [*of_ks, results["baseline"]]))


def _cell(scored: Mapping[str, Any]) -> str:
    low, high = scored["intervals"]["test_auc"]
    return f"{scored['test_auc']:.2f} [{low:.2f}, {high:.2f}]"
