"""Writes features for Neuronpedia: the batches of JSON that SAEDashboard writes, which Neuronpedia's tools take.

The names are those of SAEDashboard's NeuronpediaDashboardBatch, NeuronpediaDashboardFeature and
NeuronpediaDashboardActivation (sae_dashboard/neuronpedia/neuronpedia_dashboard.py, version 0.8.0).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_toolkit.evaluation.feature_browser import decode_tokens
from sae_toolkit.inspection.features_file import read_description
from sae_toolkit.terminal.progress import Progress

DIRECTORY = "neuronpedia"
_FEATURES_OF_BATCH = 128  # as SAEDashboard's runner has them
BARS, INTERVALS = 40, 5


def layer_of(hook_name: str) -> int | None:
    """Returns the number of the layer that a hook's name has, counted from 0; None if it has none."""
    found = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(found[1]) if found else None


def export_neuronpedia(features_file: Path, tokenizer: Any) -> Path:
    """Writes a features.parquet as batch-0.json, batch-1.json, ... into the directory `neuronpedia` beside it.

    Features that never fire are left out, as SAEDashboard leaves them out. Strongest examples are its top activations.
    Drawn examples are sorted into five equal intervals between 0 and the largest activation. What share of the
    activations an interval holds, and the heights of the histogram's 40 equal bars, are computed from the counts in
    quarter octaves, as if activations were even within one. What it computes of neurons and correlations is empty.

    Args:
        features_file: what `write_features` wrote.
        tokenizer: tokenizer of the language model.

    Returns:
        The directory. An earlier one is replaced.
    """
    about = read_description(features_file)
    batch = {
        "model_id": about["model"],
        "layer": layer_of(about["hook_name"]),
        "sae_set": about["sae"],
        "sae_id_suffix": None,
    }

    def as_json(part: pa.RecordBatch) -> dict[str, Any]:
        features = [_feature(each, about, tokenizer) for each in part.to_pylist() if each["n_firings"]]
        return batch | {"features": features}

    return write_batches(features_file, DIRECTORY, as_json)


def write_batches(features_file: Path, name: str, as_json: Callable[[pa.RecordBatch], dict[str, Any]]) -> Path:
    """Writes a features.parquet as batch-0.json, batch-1.json, ... into a directory beside it, whole or not at all.

    Args:
        features_file: what `write_features` wrote.
        name: name of the directory. An earlier one is replaced.
        as_json: turns the rows of a batch into what its file holds.

    Returns:
        The directory.
    """
    target, partial = features_file.parent / name, features_file.parent / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with (
            pq.ParquetFile(features_file) as file,
            Progress(f"writing {name}", file.metadata.num_rows, unit="features") as progress,
        ):
            for i, part in enumerate(file.iter_batches(_FEATURES_OF_BATCH)):
                text = json.dumps(as_json(part), ensure_ascii=False)
                (partial / f"batch-{i}.json").write_text(text, encoding="utf-8")
                progress.advance(len(part))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _feature(feature: dict[str, Any], about: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    largest = feature["max_activation"]
    cumulative = Cumulative(feature["histogram"], about["histogram_edges"], largest)
    bars = np.linspace(0, largest, BARS + 1)
    return {
        "feature_index": feature["feature"],
        "neg_str": [each["token"] for each in feature["suppressed"]],
        "neg_values": [rounded(each["change"]) for each in feature["suppressed"]],
        "pos_str": [each["token"] for each in feature["promoted"]],
        "pos_values": [rounded(each["change"]) for each in feature["promoted"]],
        "frac_nonzero": feature["firing_rate"],
        "freq_hist_data_bar_values": [rounded(each) for each in (bars[:-1] + bars[1:]) / 2],
        "freq_hist_data_bar_heights": [rounded(each) for each in np.diff(cumulative.below(bars))],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": about["contexts"],
        "n_tokens_in_prompt": about["context_size"],
        "dataset": about["dataset"],
        "activations": [_activation(each, largest, cumulative, tokenizer) for each in feature["examples"]],
        **{
            name: []
            for name in (
                *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
                *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
                *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
                *("decoder_weights_dist", "vector"),
            )
        },
    }


def _activation(example: dict[str, Any], largest: float, cumulative: Cumulative, tokenizer: Any) -> dict[str, Any]:
    if example["kind"] == "strongest":
        interval = {"bin_min": -1.0, "bin_max": rounded(largest), "bin_contains": -1.0}
    else:
        i = interval_of(example, largest)
        ends = np.array([i, i + 1]) * largest / INTERVALS
        share = float(np.diff(cumulative.below(ends))[0] / cumulative.all)
        interval = {"bin_min": rounded(ends[0]), "bin_max": rounded(ends[1]), "bin_contains": round(share, 4)}
    return interval | {
        "tokens": decode_tokens(tokenizer, example["token_ids"]),
        "values": [rounded(each) for each in example["activations"]],
        "qualifying_token_index": example["position"] - example["first_position"],
    }


def interval_of(example: dict[str, Any], largest: float) -> int:
    """Returns in which of five equal intervals between 0 and the largest activation an example is."""
    return min(int(abs(example["activation"]) / largest * INTERVALS), INTERVALS - 1)


class Cumulative:
    """How many activations of a feature are below a value, as if they were even within each bin.

    Args:
        counts: activations in each bin, at least one in all.
        edges: lower and upper ends of the bins; the last is infinity or None.
        largest: the largest activation, where its bin ends.
    """

    def __init__(self, counts: list[int], edges: Sequence[float | None], largest: float) -> None:
        last = max(i for i, n in enumerate(counts) if n)
        self._edges = np.array([*edges[: last + 1], largest], dtype=float)
        self._below = np.concatenate(([0], np.cumsum(counts[: last + 1])))
        self.all = int(self._below[-1])

    def below(self, values: np.ndarray) -> np.ndarray:
        return np.interp(values, self._edges, self._below)


def rounded(value: float, digits: int = 3) -> float:
    """Returns a number with so many digits after the point; SAEDashboard's batches have three."""
    return round(float(value), digits)
