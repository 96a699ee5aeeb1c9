"""features.parquet: one row for each feature of an SAE."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        ("neighbors", pa.list_(pa.struct([("feature", pa.int32()), ("cosine", pa.float32())]))),
        ("promoted", pa.list_(_EFFECT)),
        ("suppressed", pa.list_(_EFFECT)),
        ("examples", pa.list_(_EXAMPLE)),
    ]
)


def write_features(
    prepared: PreparedEvaluation, inspected: InspectedSAE, model: LanguageModel, settings: FeatureSettings
) -> Path:
    """Writes features.parquet, whole or not at all.

    Args:
        prepared: the rows of text that the features have seen.
        inspected: the SAE and the statistics of its features.
        model: the language model, for the tokens that features promote.
        settings: how much of each feature is written.

    Returns:
        The path of the file.
    """
    path = inspected.directory / FILENAME
    partial = path.with_suffix(".partial")
    schema = SCHEMA.with_metadata({"inspection": json.dumps(describe(prepared, inspected, settings))})
    W_dec_FD = inspected.evaluated.sae.W_dec.detach()
    try:
        with (
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
            Progress(f"writing {FILENAME}", len(W_dec_FD), unit="features") as progress,
        ):
            for chunk in _chunks(prepared, inspected, model, settings):
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                progress.advance(len(chunk))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


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
        "held_out": prepared.held_out is not None,
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
    prepared: PreparedEvaluation, inspected: InspectedSAE, model: LanguageModel, settings: FeatureSettings
) -> Iterator[list[dict[str, Any]]]:
    statistics, sae = inspected.statistics, inspected.evaluated.sae
    W_dec_FD = sae.W_dec.detach().float()
    unit_FD = torch.nn.functional.normalize(W_dec_FD, dim=-1)
    encoder_cosine_F = _encoder_cosines(sae, unit_FD)
    effects = _Effects(model, prepared, settings.promoted)
    for start in range(0, len(W_dec_FD), _FEATURES_AT_ONCE):
        features = range(start, min(start + _FEATURES_AT_ONCE, len(W_dec_FD)))
        chunk = slice(features.start, features.stop)
        neighbors = _neighbors(unit_FD, chunk, settings.neighbors)
        promoted, suppressed = effects.of(W_dec_FD[chunk])
        strongest = _examples("strongest", statistics.strongest, chunk, prepared)
        drawn = _examples("drawn", statistics.drawn, chunk, prepared)
        of_each = _numbers(statistics, chunk)
        yield [
            {
                "feature": feature,
                **{name: values[i] for name, values in of_each.items()},
                "decoder_norm": W_dec_FD[feature].norm().item(),
                "encoder_cosine": encoder_cosine_F[feature].item() if encoder_cosine_F is not None else None,
                "neighbors": neighbors[i],
                "promoted": promoted[i],
                "suppressed": suppressed[i],
                "examples": strongest[i] + drawn[i],
            }
            for i, feature in enumerate(features)
        ]


def _numbers(statistics: FeatureStatistics, chunk: slice) -> dict[str, list[Any]]:
    """Returns the columns of numbers for a chunk of features."""
    n_F = statistics.n_firings_F[chunk].cpu()
    mean_F = statistics.sum_F[chunk].cpu() / n_F.clamp(min=1)
    return {
        "firing_rate": (n_F.double() / max(statistics.n_tokens, 1)).tolist(),
        "n_firings": n_F.tolist(),
        "n_contexts": statistics.n_rows_F[chunk].tolist(),
        "mean_activation": [mean if n else None for mean, n in zip(mean_F.tolist(), n_F.tolist(), strict=True)],
        "max_activation": statistics.max_F[chunk].tolist(),
        "histogram": statistics.histogram_FH[chunk].tolist(),
    }


def _encoder_cosines(sae: Any, unit_FD: torch.Tensor) -> torch.Tensor | None:
    """Returns the cosine [F] of each encoder vector with its decoder vector; None without such an encoder."""
    W_enc_DF = getattr(sae, "W_enc", None)
    if W_enc_DF is None or W_enc_DF.shape != unit_FD.T.shape:
        return None
    return torch.nn.functional.cosine_similarity(W_enc_DF.detach().float().T, unit_FD, dim=-1)


def _neighbors(unit_FD: torch.Tensor, chunk: slice, n: int) -> list[list[dict[str, Any]]]:
    """Returns for each feature of a chunk those whose decoder vectors have the largest cosines with its own."""
    cosines = unit_FD[chunk] @ unit_FD.T
    cosines[torch.arange(len(cosines)), torch.arange(chunk.start, chunk.stop)] = -torch.inf
    best = cosines.topk(min(n, len(unit_FD) - 1), dim=1)
    return [
        [{"feature": f, "cosine": c} for f, c in zip(features, values, strict=True)]
        for features, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


class _Effects:
    """The tokens that decoder vectors make likelier and less likely, where they write to the residual stream."""

    def __init__(self, model: LanguageModel, prepared: PreparedEvaluation, n_tokens: int) -> None:
        self._weight_VD, self._norm_D = model.unembedding()
        self._tokenizer = prepared.tokenizer
        self._n_tokens = n_tokens

    def of(self, W_dec_KD: torch.Tensor) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
        """Returns for each decoder vector [K, D] the tokens whose logits it raises most, and those it lowers most."""
        weight = self._weight_VD
        if weight is None or self._n_tokens == 0 or weight.shape[1] != W_dec_KD.shape[1]:
            return [[] for _ in W_dec_KD], [[] for _ in W_dec_KD]
        ends = logit_effects(W_dec_KD, weight, self._norm_D, n_tokens=self._n_tokens)
        raised, lowered = ([self._named(*each) for each in zip(*end, strict=True)] for end in ends)
        return raised, lowered

    def _named(self, ids_N: torch.Tensor, change_N: torch.Tensor) -> list[dict[str, Any]]:
        ids = ids_N.tolist()
        named = zip(ids, decode_tokens(self._tokenizer, ids), change_N.tolist(), strict=True)
        return [{"token_id": i, "token": text, "change": change} for i, text, change in named]


def _examples(kind: str, kept: KeptExamples, chunk: slice, prepared: PreparedEvaluation) -> list[list[dict[str, Any]]]:
    """Returns the examples of each feature of a chunk, the strongest first."""
    activation_FK, row_FK = kept.activation_FK[chunk].cpu().numpy(), kept.row_FK[chunk].cpu().numpy()
    position_FK, window_FKW = kept.position_FK[chunk].cpu().numpy(), kept.window_FKW[chunk].float().cpu().numpy()
    order_FK = np.lexsort((row_FK, -np.abs(activation_FK)), axis=-1)
    found = []
    for i, order in enumerate(order_FK):
        places = [k for k in order if row_FK[i, k] >= 0]
        found.append(
            [
                _example(
                    kind,
                    rank,
                    len(places),
                    activation_FK[i, k],
                    row_FK[i, k],
                    position_FK[i, k],
                    window_FKW[i, k],
                    prepared,
                )
                for rank, k in enumerate(places)
            ]
        )
    return found


def _example(
    kind: str,
    rank: int,
    n: int,
    activation: float,
    row: int,
    position: int,
    window_W: np.ndarray,
    prepared: PreparedEvaluation,
) -> dict[str, Any]:
    first = max(0, position - TOKENS_BEFORE)
    ids = prepared.rows_NT[row, first : position + TOKENS_AFTER + 1]
    skipped = TOKENS_BEFORE - (position - first)
    return {
        "kind": kind,
        "quantile": 1 - (rank + 0.5) / n if kind == "drawn" else None,
        "activation": float(activation),
        "row": int(row),
        "document": int(prepared.unit_N[row]),
        "position": int(position),
        "first_position": int(first),
        "token_ids": ids.tolist(),
        "activations": window_W[skipped : skipped + len(ids)].tolist(),
    }


def read_description(path: Path) -> dict[str, Any]:
    """Returns what `describe` recorded in a file."""
    return json.loads(pq.read_schema(path).metadata[b"inspection"])
