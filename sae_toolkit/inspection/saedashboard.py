"""Writes features for SAEDashboard's own pages: the JSON of its SaeVisData, which its `load_json` reads.

The names are those of SaeVisData, FeatureData and their parts (sae_dashboard/sae_vis_data.py, feature_data.py and
components.py, version 0.8.0).

Shapes: K features of a batch, D dimensions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sae_toolkit.evaluation.feature_browser import logit_changes
from sae_toolkit.inspection.neuronpedia import (
    BARS,
    INTERVALS,
    Cumulative,
    interval_of,
    rounded,
    write_batches,
)
from sae_toolkit.inspection.statistics import bin_edges
from sae_toolkit.model.language_model import LanguageModel

DIRECTORY = "saedashboard"


def export_saedashboard(features_file: Path, W_dec_FD: torch.Tensor, model: LanguageModel) -> Path:
    """Writes a features.parquet as batch-0.json, batch-1.json, ... into the directory `saedashboard` beside it.

    Features that never fire are left out. Strongest examples are its top activations, and drawn examples are sorted
    into five equal intervals between 0 and the largest activation. Bars of the histogram of activations are computed
    from counts in quarter octaves, as if activations were even within one. The tables of neurons and correlations and
    the effects on the loss are empty. Where the hook is not at the residual stream or added to it there are no logits,
    and its default layout, which has a table of them, cannot be drawn.

    Args:
        features_file: what `write_features` wrote.
        W_dec_FD: as `written_directions` returns them.
        model: the language model, for the logits of the tokens of examples.

    Returns:
        The directory. An earlier one is replaced.
    """
    unembedding = model.unembedding(W_dec_FD.shape[1])

    def as_json(part: pa.RecordBatch) -> dict[str, Any]:
        features = [each for each in part.to_pylist() if each["n_firings"]]
        changes_KV = None
        if unembedding is not None:
            W_dec_KD = W_dec_FD[[each["feature"] for each in features]]
            changes_KV = logit_changes(W_dec_KD, unembedding).cpu().numpy()
        return {
            "feature_data_dict": {
                str(each["feature"]): _feature(each, None if changes_KV is None else changes_KV[k])
                for k, each in enumerate(features)
            },
            "feature_stats": {
                "max": [rounded(each["max_activation"]) for each in features],
                "frac_nonzero": [each["firing_rate"] for each in features],
                **{name: [] for name in ("skew", "kurtosis", "quantile_data", "quantiles")},
            },
        }

    return write_batches(features_file, DIRECTORY, as_json)


def _feature(feature: dict[str, Any], change_V: np.ndarray | None) -> dict[str, Any]:
    """Returns a FeatureData.

    Args:
        feature: a row of features.parquet, which fires.
        change_V: by how much its decoder vector raises each token's logit.
    """
    largest = feature["max_activation"]
    bars = np.linspace(0, largest, BARS + 1)
    cumulative = Cumulative(feature["histogram"], bin_edges(), largest)
    ends = {"bottom": feature["suppressed"], "top": feature["promoted"]}
    return {
        "feature_tables_data": {},
        "acts_histogram_data": _histogram(
            np.diff(cumulative.below(bars)), bars, f"ACTIVATIONS<br>DENSITY = {feature['firing_rate']:.3%}"
        ),
        "logits_table_data": {
            **{f"{end}_token_ids": [each["token_id"] for each in tokens] for end, tokens in ends.items()},
            **{f"{end}_logits": [rounded(each["change"]) for each in tokens] for end, tokens in ends.items()},
        },
        "logits_histogram_data": {} if change_V is None else _histogram(*np.histogram(change_V, BARS), None),
        "sequence_data": {"seq_group_data": _groups(feature["examples"], largest, cumulative, change_V)},
        "prompt_data": {},
        "dfa_data": {},
        "decoder_weights_data": None,
    }


def _histogram(heights: np.ndarray, edges: np.ndarray, title: str | None) -> dict[str, Any]:
    """Returns a HistogramData. Ticks are 0 and both ends."""
    return {
        "bar_heights": [rounded(each) for each in heights],
        "bar_values": [rounded(each) for each in (edges[:-1] + edges[1:]) / 2],
        "tick_vals": sorted({rounded(edges[0]), 0.0, rounded(edges[-1])}),
        "title": title,
    }


def _groups(
    examples: list[dict[str, Any]], largest: float, cumulative: Cumulative, change_V: np.ndarray | None
) -> list[dict[str, Any]]:
    """Returns SequenceGroupData: the strongest examples, and drawn ones by interval of activation, high ones first."""
    drawn = [each for each in examples if each["kind"] == "drawn"]
    strongest = [each for each in examples if each["kind"] == "strongest"]
    groups: list[dict[str, Any]] = [{"title": f"TOP ACTIVATIONS<br>MAX = {largest:.3f}", "seq_data": strongest}]
    ends = np.linspace(0, largest, INTERVALS + 1)
    for i in reversed(range(INTERVALS)):
        share = np.diff(cumulative.below(ends[i : i + 2]))[0] / cumulative.all
        title = f"INTERVAL {ends[i]:.3f} - {ends[i + 1]:.3f}<br>CONTAINS {share:.3%}"
        groups.append({"title": title, "seq_data": [each for each in drawn if interval_of(each, largest) == i]})
    return [group | {"seq_data": [_sequence(example, change_V) for example in group["seq_data"]]} for group in groups]


def _sequence(example: dict[str, Any], change_V: np.ndarray | None) -> dict[str, Any]:
    """Returns a SequenceData."""
    ids = example["token_ids"]
    return {
        "original_index": example["row"],
        "qualifying_token_index": example["position"] - example["first_position"],
        "token_ids": ids,
        "feat_acts": [rounded(each, 4) for each in example["activations"]],
        "loss_contribution": [0.0] * len(ids),  # its page shows none, and wants a number for each token
        "token_logits": [0.0] * len(ids) if change_V is None else [rounded(each) for each in change_V[ids]],
    }
