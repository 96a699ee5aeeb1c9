"""What the model does when a feature is switched off or held at its maximum, beside what its decoder vector promises.

Shapes: T tokens of a context, D dimensions, F features, V vocabulary, P promoted or suppressed tokens.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sae_lens import SAE

from sae_toolkit.evaluation.metrics import log_probabilities, mean_and_interval
from sae_toolkit.inspection.run import InspectedSAE
from sae_toolkit.inspection.steering import change_of_turning
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

FILENAME = "effects.parquet"
_CONTEXTS = 8  # of a feature
_KINDS = ("ablated", "clamped")


@dataclass(frozen=True)
class Effects:
    """What turning one feature does in some contexts in which it fires.

    Changes are means in nats, with the feature turned less without. Those of `ablated` are over the tokens on which it
    fires, those of `clamped` over all tokens that the SAE is applied to. None where there is nothing to measure.

    Args:
        feature: its index.
        contexts: number of contexts.
        tokens, firings: tokens in them that the SAE is applied to, and on how many of these it fires.
        clamped_to: the largest activation that it had in the whole text.
        ablated_loss, clamped_loss: change of the cross-entropy of the next token.
        ablated_promoted, clamped_promoted: change of the log-probabilities of the tokens that the decoder vector
            promotes by the logit lens, `promoted` in features.parquet.
        ablated_suppressed, clamped_suppressed: the same for `suppressed`.
        ablated_vocabulary, clamped_vocabulary: the same for all tokens: what is to be compared with.
        promoted_gains: share of the promoted tokens that gain more than the mean token when the feature is clamped.
    """

    feature: int
    contexts: int
    tokens: int
    firings: int
    clamped_to: float
    ablated_loss: float | None
    clamped_loss: float | None
    ablated_promoted: float | None
    clamped_promoted: float | None
    ablated_suppressed: float | None
    clamped_suppressed: float | None
    ablated_vocabulary: float | None
    clamped_vocabulary: float | None
    promoted_gains: float | None


def write_effects(inspected: InspectedSAE, model: LanguageModel, features_file: Path, n_features: int) -> Path:
    """Turns features that are drawn at random among those that fire, and writes effects.parquet, a row for each.

    Args:
        inspected: the SAE, and the rows of text that it has seen.
        model: language model with all layers, hooked where the SAE is.
        features_file: what `write_features` wrote; contexts, promoted and suppressed tokens are from there.
        n_features: how many features to draw; all that fire if they are fewer.

    Returns:
        The path of the file.
    """
    chosen = _draw(features_file, n_features, inspected.prepared.seed)
    sae = inspected.evaluated.sae.to(model.device)
    measured = []
    what = f"--effects {n_features}: turning features on {model.device}"
    with (
        out_of_memory_answered(what, "give --device cpu, or leave it out"),
        Progress("turning", len(chosen), unit="features") as progress,
    ):
        for feature in chosen:
            measured.append(_effects_of(feature, inspected, sae, model))
            progress.advance(1)
    sae.to("cpu")
    path = features_file.with_name(FILENAME)
    partial = path.with_suffix(".partial")
    schema = pa.schema([(name, _type(kind)) for name, kind in Effects.__annotations__.items()])
    try:
        pq.write_table(pa.Table.from_pylist([asdict(each) for each in measured], schema=schema), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    log.info(summary(measured))
    return path


def _type(annotation: str) -> pa.DataType:
    return pa.int32() if annotation == "int" else pa.float32()


def _draw(features_file: Path, n_features: int, seed: int) -> list[dict[str, Any]]:
    """Returns the rows of features.parquet of features drawn at random among those with examples, in their order."""
    file = pq.ParquetFile(features_file)
    n_contexts_F = file.read(["n_contexts"])["n_contexts"].to_numpy()
    fires_N = n_contexts_F.nonzero()[0]
    drawn_N = np.random.default_rng(seed).choice(fires_N, min(n_features, len(fires_N)), replace=False)
    drawn = set(drawn_N.tolist())
    found: list[dict[str, Any]] = []
    columns = ["feature", "max_activation", "promoted", "suppressed", "examples"]
    for batch in file.iter_batches(1024, columns=columns):
        at = [i for i, feature in enumerate(batch.column("feature").to_pylist()) if feature in drawn]
        found += batch.take(pa.array(at, pa.int64())).to_pylist()
    return found


@torch.no_grad()
def _effects_of(feature: dict[str, Any], inspected: InspectedSAE, sae: SAE[Any], model: LanguageModel) -> Effects:
    f, prepared = feature["feature"], inspected.prepared
    strongest = [each["activation"] for each in feature["examples"] if each["kind"] == "strongest"]
    largest = strongest[0] if strongest else feature["max_activation"]  # of which only the former has a sign
    ids = {name: [each["token_id"] for each in feature[name]] for name in ("promoted", "suppressed")}
    # The drawn contexts first: the strongest alone would show the feature at its best.
    in_order = sorted(feature["examples"], key=lambda each: each["kind"])
    rows = list(dict.fromkeys(each["row"] for each in in_order))[:_CONTEXTS]
    sums, n_tokens, n_firings = _Sums(ids), 0, 0
    for row in rows:
        tokens_1T = prepared.rows_NT[row : row + 1].astype(np.int64)
        assistant_1T = prepared.assistant_at(slice(row, row + 1))
        clean_1TV, state = model.logits(torch.from_numpy(tokens_1T))
        positions = inspected.evaluated.positions
        kept_T = torch.from_numpy(positions.keeps_tokens(tokens_1T, assistant_1T)).to(model.device)[0]
        kept_T &= positions.keeps_norms(state.acts_BTD)[0].to(kept_T.device)
        acts_TD = state.acts_BTD.flatten(2)[0].to(sae.device, torch.float32)
        old_TF = sae.encode(acts_TD)
        fires_T = kept_T & (old_TF[:, f] != 0).to(kept_T.device)
        n_tokens, n_firings = n_tokens + int(kept_T.sum()), n_firings + int(fires_T.sum())
        clean_TV = log_probabilities(clean_1TV[0])
        targets_T = torch.from_numpy(tokens_1T[0]).to(clean_TV.device)
        for kind, value, scored_T in zip(_KINDS, (0.0, largest), (fires_T, kept_T), strict=True):
            new_T1 = torch.full_like(old_TF[:, :1], value)
            change_TD = change_of_turning(sae, old_TF, [f], new_T1).reshape(acts_TD.shape)
            turned_TD = acts_TD + change_TD.masked_fill(~kept_T[:, None].to(sae.device), 0)
            turned_1TD = turned_TD.reshape(state.acts_BTD.shape)
            turned_TV = model.logits_from_hook(torch.from_numpy(tokens_1T), state, turned_1TD)[0]
            sums.add(kind, log_probabilities(turned_TV).sub_(clean_TV), targets_T, scored_T)
    return Effects(f, len(rows), n_tokens, n_firings, largest, **sums.means())


class _Sums:
    """Sums over contexts of changes of log-probabilities."""

    def __init__(self, ids: dict[str, list[int]]) -> None:
        self._ids = ids
        self._of = {kind: {name: torch.zeros(len(each)) for name, each in ids.items()} for kind in _KINDS}
        self._vocabulary = dict.fromkeys(_KINDS, 0.0)
        self._loss = dict.fromkeys(_KINDS, 0.0)
        self._n = dict.fromkeys(_KINDS, 0)
        self._n_losses = dict.fromkeys(_KINDS, 0)

    def add(self, kind: str, change_TV: torch.Tensor, targets_T: torch.Tensor, scored_T: torch.Tensor) -> None:
        """Adds a context.

        Args:
            kind: ablated or clamped.
            change_TV: changes of the log-probabilities of all tokens.
            targets_T: the tokens of the context.
            scored_T: the positions to sum over. The last one has no next token, and counts for no loss.
        """
        scored_T = scored_T.to(change_TV.device)
        scored_NV = change_TV[scored_T]
        self._n[kind] += len(scored_NV)
        self._vocabulary[kind] += scored_NV.mean(-1).sum().item()
        for name, ids in self._ids.items():
            self._of[kind][name] += scored_NV[:, ids].sum(0).cpu()
        of_next_T = change_TV[:-1].gather(1, targets_T[1:, None])[:, 0]
        self._n_losses[kind] += int(scored_T[:-1].sum())
        self._loss[kind] -= of_next_T[scored_T[:-1]].sum().item()

    def means(self) -> dict[str, float | None]:
        """Returns the fields of `Effects` that are means."""
        means: dict[str, float | None] = {}
        for kind in _KINDS:
            n, n_losses = self._n[kind], self._n_losses[kind]
            means[f"{kind}_loss"] = self._loss[kind] / n_losses if n_losses else None
            means[f"{kind}_vocabulary"] = self._vocabulary[kind] / n if n else None
            for name, sums in self._of[kind].items():
                means[f"{kind}_{name}"] = sums.mean().item() / n if n and len(sums) else None
        promoted, vocabulary = self._of["clamped"]["promoted"], means["clamped_vocabulary"]
        has_gains = len(promoted) > 0 and vocabulary is not None
        gains = promoted / max(self._n["clamped"], 1) > (vocabulary or 0.0)
        return means | {"promoted_gains": gains.float().mean().item() if has_gains else None}


def summary(measured: list[Effects]) -> str:
    """Returns the means over features, with 95% intervals, in a few lines."""
    lines = [f"effects of {len(measured):,} features, in up to {_CONTEXTS} contexts each, means and 95% intervals"]

    def line(text: str, values: list[float | None], form: str) -> None:
        there = [value for value in values if value is not None]
        if len(there) > 1:
            mean, (low, high) = mean_and_interval(there)
            if "%" in form:  # of shares
                low, high = max(low, 0.0), min(high, 1.0)
            lines.append(f"  {text} {mean:{form}} ({low:{form}} to {high:{form}})")

    def over_vocabulary(kind: str, name: str) -> list[float | None]:
        pairs = [(getattr(each, f"{kind}_{name}"), getattr(each, f"{kind}_vocabulary")) for each in measured]
        return [None if a is None or b is None else a - b for a, b in pairs]

    line("held at its maximum: loss changes by", [each.clamped_loss for each in measured], "+.3f")
    line("  promoted tokens, against the mean token, in nats:", over_vocabulary("clamped", "promoted"), "+.2f")
    line("  suppressed tokens:", over_vocabulary("clamped", "suppressed"), "+.2f")
    line("  promoted tokens that gain more than the mean token:", [each.promoted_gains for each in measured], ".0%")
    line("switched off, where it fires: loss changes by", [each.ablated_loss for each in measured], "+.4f")
    line("  promoted tokens, against the mean token, in nats:", over_vocabulary("ablated", "promoted"), "+.3f")
    line("  suppressed tokens:", over_vocabulary("ablated", "suppressed"), "+.3f")
    return "\n".join(lines)
