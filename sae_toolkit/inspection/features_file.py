"""features.parquet: one row for each feature of an SAE."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_toolkit.evaluation.feature_browser import decode_tokens, logit_effects
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.inspection.examples import TOKENS_AFTER, TOKENS_BEFORE, KeptExamples
from sae_toolkit.inspection.run import InspectedSAE
from sae_toolkit.inspection.statistics import FeatureStatistics, bin_edges
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.saes.weights import written_directions
from sae_toolkit.settings.inspection import FeatureSettings
from sae_toolkit.terminal.progress import Progress

FILENAME = "features.parquet"

_FEATURES_AT_ONCE = 1024

_EFFECT = pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("change", pa.float32())])
_EXAMPLE = pa.struct(
    [
        ("kind", pa.string()),
        ("quantile", pa.float32()),
        ("activation", pa.float32()),
        ("row", pa.int32()),
        ("document", pa.int32()),
        ("position", pa.int32()),
        ("first_position", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("activations", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("firing_rate", pa.float64()),
        ("n_firings", pa.int64()),
        ("n_contexts", pa.int64()),
        ("mean_activation", pa.float32()),
        ("max_activation", pa.float32()),
        ("histogram", pa.list_(pa.int32())),
        ("decoder_norm", pa.float32()),
        ("encoder_cosine", pa.float32()),
        ("found_again", pa.float32()),
        ("neighbors", pa.list_(pa.struct([("feature", pa.int32()), ("cosine", pa.float32())]))),
        ("promoted", pa.list_(_EFFECT)),
        ("suppressed", pa.list_(_EFFECT)),
        ("examples", pa.list_(_EXAMPLE)),
    ]
)


def write_features(
    inspected: InspectedSAE, model: LanguageModel, settings: FeatureSettings, found_again: Mapping[str, torch.Tensor]
) -> bool:
    """Writes features.parquet into the SAE's directory, whole or not at all.

    Args:
        inspected: the SAE, the statistics of its features, and the rows of text that they have seen.
        model: the language model, for the tokens that features promote.
        settings: how much of each feature is written.
        found_again: by the name of another SAE, the largest cosine [F] of each decoder vector to any of that SAE.

    Returns:
        Whether it tells something else than the file that was there, if there was one.
    """
    prepared, path = inspected.prepared, inspected.directory / FILENAME
    partial = path.with_suffix(".partial")
    about = describe(prepared, inspected, settings) | {"stability": list(found_again)}
    schema = SCHEMA.with_metadata({"inspection": json.dumps(about)})
    W_dec_FD = inspected.evaluated.sae.W_dec.detach()
    mean_F = torch.stack(list(found_again.values())).mean(0) if found_again else None
    try:
        with (
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
            Progress(f"writing {FILENAME}", len(W_dec_FD), unit="features") as progress,
        ):
            for chunk in _chunks(prepared, inspected, model, settings, mean_F):
                writer.write_table(chunk.replace_schema_metadata(schema.metadata))
                progress.advance(len(chunk))
        is_new = not path.exists() or not filecmp.cmp(partial, path, shallow=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return is_new


def describe(prepared: PreparedEvaluation, inspected: InspectedSAE, settings: FeatureSettings) -> dict[str, Any]:
    """Returns what features.parquet records beside the features, as JSON under the key `inspection` of its schema."""
    sae = inspected.evaluated.sae
    return {
        "sae": inspected.evaluated.file.name,
        "architecture": sae.cfg.architecture(),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "model": prepared.model.name,
        "hook_name": prepared.hook_name,
        "dataset": prepared.text.name,
        "dataset_config": prepared.text.config,
        "dataset_split": prepared.text.split,
        "held_out": prepared.held_out is not None and inspected.evaluated.is_text_seen is False,
        "context_size": prepared.context.context_size,
        "contexts": len(prepared.rows_NT),
        "tokens": inspected.statistics.n_tokens,
        "documents": prepared.units == "documents",
        "seed": prepared.seed,
        "examples": settings.examples,
        "drawn_examples": settings.drawn_examples,
        "histogram_edges": [edge if edge != float("inf") else None for edge in bin_edges()],
    }


def _chunks(
    prepared: PreparedEvaluation,
    inspected: InspectedSAE,
    model: LanguageModel,
    settings: FeatureSettings,
    found_again_F: torch.Tensor | None,
) -> Iterator[pa.Table]:
    """Yields the rows of the file, a chunk of features at a time."""
    statistics, sae = inspected.statistics, inspected.evaluated.sae
    W_dec_FD, written_FD = sae.W_dec.detach().float(), written_directions(sae).float()
    unit_FD = torch.nn.functional.normalize(W_dec_FD, dim=-1)
    encoder_cosine_F = _encoder_cosines(sae, unit_FD)
    effects = _Effects(model, prepared, written_FD.shape[1], settings.promoted)
    for start in range(0, len(W_dec_FD), _FEATURES_AT_ONCE):
        chunk = slice(start, min(start + _FEATURES_AT_ONCE, len(W_dec_FD)))
        n = chunk.stop - chunk.start
        promoted, suppressed = effects.of(written_FD[chunk])
        columns = {
            "feature": np.arange(chunk.start, chunk.stop),
            **_numbers(statistics, chunk),
            "decoder_norm": W_dec_FD[chunk].norm(dim=-1).numpy(),
            "encoder_cosine": [None] * n if encoder_cosine_F is None else encoder_cosine_F[chunk].numpy(),
            "found_again": [None] * n if found_again_F is None else found_again_F[chunk].numpy(),
            "neighbors": _neighbors(unit_FD, chunk, settings.neighbors),
            "promoted": promoted,
            "suppressed": suppressed,
            "examples": _examples(statistics, chunk, prepared),
        }
        yield pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _numbers(statistics: FeatureStatistics, chunk: slice) -> dict[str, Any]:
    """Returns the columns of numbers for a chunk of features."""
    n_F = statistics.n_firings_F[chunk].cpu().numpy()
    fires_F = n_F > 0
    mean_F = (statistics.sum_F[chunk].cpu().numpy() / np.maximum(n_F, 1)).astype(np.float32)
    return {
        "firing_rate": n_F / max(statistics.n_tokens, 1),
        "n_firings": n_F,
        "n_contexts": statistics.n_rows_F[chunk].cpu().numpy(),
        "mean_activation": pa.array(mean_F, mask=~fires_F),
        "max_activation": statistics.max_F[chunk].cpu().numpy(),
        "histogram": list(statistics.histogram_FH[chunk].cpu().numpy()),
    }


def _encoder_cosines(sae: Any, unit_FD: torch.Tensor) -> torch.Tensor | None:
    """Returns the cosine [F] of each encoder vector with its decoder vector; None without such an encoder."""
    W_enc_DF = getattr(sae, "W_enc", None)
    if W_enc_DF is None or W_enc_DF.shape != unit_FD.T.shape:
        return None
    return torch.nn.functional.cosine_similarity(W_enc_DF.detach().float().T, unit_FD, dim=-1)


def _neighbors(unit_FD: torch.Tensor, chunk: slice, n: int) -> pa.Array:
    """Returns for each feature of a chunk those whose decoder vectors have the largest cosines with its own."""
    cosines = unit_FD[chunk] @ unit_FD.T
    cosines[torch.arange(len(cosines)), torch.arange(chunk.start, chunk.stop)] = -torch.inf
    best = cosines.topk(min(n, len(unit_FD) - 1), dim=1)
    neighbors = (best.indices.flatten().numpy(), best.values.flatten().numpy())
    return _lists_of_structs(np.full(len(cosines), best.indices.shape[1]), neighbors, SCHEMA.field("neighbors").type)


class _Effects:
    """The tokens that decoder vectors make likelier and less likely, where they write to the residual stream."""

    def __init__(self, model: LanguageModel, prepared: PreparedEvaluation, width: int, n_tokens: int) -> None:
        self._unembedding = model.unembedding(width)
        self._tokenizer = prepared.tokenizer
        self._n_tokens = n_tokens

    def of(self, W_dec_KD: torch.Tensor) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
        """Returns for each decoder vector [K, D] the tokens whose logits it raises most, and those it lowers most."""
        if self._unembedding is None or self._n_tokens == 0:
            return [[] for _ in W_dec_KD], [[] for _ in W_dec_KD]
        ends = logit_effects(W_dec_KD, self._unembedding, n_tokens=self._n_tokens)
        raised, lowered = ([self._named(*each) for each in zip(*end, strict=True)] for end in ends)
        return raised, lowered

    def _named(self, ids_N: torch.Tensor, change_N: torch.Tensor) -> list[dict[str, Any]]:
        ids = ids_N.tolist()
        named = zip(ids, decode_tokens(self._tokenizer, ids), change_N.tolist(), strict=True)
        return [{"token_id": i, "token": text, "change": change} for i, text, change in named]


def _examples(statistics: FeatureStatistics, chunk: slice, prepared: PreparedEvaluation) -> pa.Array:
    """Returns the examples of each feature of a chunk: the strongest first, and then the drawn ones."""
    both = [_in_order(kept, chunk) for kept in (statistics.strongest, statistics.drawn)]
    row, position, activation, window = (np.concatenate(each, axis=1) for each in zip(*both, strict=True))
    is_one = row >= 0
    quantile = np.concatenate([_quantiles(each[0]) for each in both], axis=1)
    is_drawn = (np.arange(row.shape[1]) >= both[0][0].shape[1])[None].repeat(len(row), 0)[is_one]
    row, position, activation, window, quantile = (
        each[is_one] for each in (row, position, activation, window, quantile)
    )
    at_NW = position[:, None] + np.arange(-TOKENS_BEFORE, TOKENS_AFTER + 1)
    inside_NW = (at_NW >= 0) & (at_NW < prepared.rows_NT.shape[1])
    ids_NW = prepared.rows_NT[row[:, None], np.where(inside_NW, at_NW, 0)]
    lengths_N = inside_NW.sum(1)
    examples = (
        pa.array(np.where(is_drawn, "drawn", "strongest").astype(object), pa.string()),
        pa.array(quantile.astype(np.float32), mask=~is_drawn),
        activation,
        row,
        prepared.unit_N[row].astype(np.int32),
        position,
        np.maximum(position - TOKENS_BEFORE, 0),
        _lists(lengths_N, ids_NW[inside_NW].astype(np.int32)),
        _lists(lengths_N, window[inside_NW]),
    )
    return _lists_of_structs(is_one.sum(1), examples, SCHEMA.field("examples").type)


def _in_order(kept: KeptExamples, chunk: slice) -> tuple[np.ndarray, ...]:
    """Returns rows, positions, activations [F, K] and windows [F, K, W] of a chunk, the strongest of a feature first.

    A row of -1 is no example.
    """
    activation_FK, row_FK = kept.activation_FK[chunk].cpu().numpy(), kept.row_FK[chunk].cpu().numpy()
    position_FK, window_FKW = kept.position_FK[chunk].cpu().numpy(), kept.window_FKW[chunk].float().cpu().numpy()
    order_FK = np.lexsort((row_FK, -np.abs(activation_FK)), axis=-1)
    ordered = (np.take_along_axis(each, order_FK, 1) for each in (row_FK, position_FK, activation_FK))
    return (*ordered, np.take_along_axis(window_FKW, order_FK[..., None], 1))


def _quantiles(row_FK: np.ndarray) -> np.ndarray:
    """Returns the quantile [F, K] of each example among those of its feature, which are in order."""
    n_F1 = np.maximum((row_FK >= 0).sum(1, keepdims=True), 1)
    return 1 - (np.arange(row_FK.shape[1]) + 0.5) / n_F1


def _lists(lengths: np.ndarray, values: np.ndarray) -> pa.Array:
    """Returns lists of these lengths, which hold the values in their order."""
    return pa.ListArray.from_arrays(np.concatenate(([0], lengths.cumsum())).astype(np.int32), pa.array(values))


def _lists_of_structs(lengths: np.ndarray, values: Sequence[Any], kind: pa.ListType) -> pa.Array:
    """Returns lists of these lengths, which hold structs of these values in their order."""
    fields = list(kind.value_type)
    arrays = [pa.array(each).cast(field.type) for each, field in zip(values, fields, strict=True)]
    structs = pa.StructArray.from_arrays(arrays, fields=fields)
    return pa.ListArray.from_arrays(np.concatenate(([0], lengths.cumsum())).astype(np.int32), structs)


def read_description(path: Path) -> dict[str, Any]:
    """Returns what is recorded as JSON in the schema of features.parquet or of a file that was made from it."""
    return json.loads(pq.read_schema(path).metadata[b"inspection"])
