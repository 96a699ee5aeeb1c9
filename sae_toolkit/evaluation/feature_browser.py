"""What single features respond to in the text, and which tokens their decoder vectors make likelier.

Shapes: N tokens, F features, K of them tracked, D dimensions, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sae_toolkit.evaluation.metrics import chunk_length

# Many features may turn out silent, and the sample is to reach over the firing rates of those that are not.
_TRACKED_PER_SAMPLED = 4
_TOKENS_BEFORE, _TOKENS_AFTER = 24, 12
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_Effects = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Context:
    """A window of text around one of a feature's highest activations.

    Args:
        tokens: decoded one by one.
        activations: of the feature at each token; 0 where it is silent and where the SAE does not stand in.
        peak: which of the tokens the window was chosen for.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Feature:
    """One feature, as the report shows it.

    Args:
        index: in the SAE.
        firing_rate: share of tokens, in [0, 1].
        max_activation: over all tokens, the largest in magnitude; 0 where it never fired.
        histogram: edges [n + 1] and counts [n] of the activations that are not 0; empty where it never fired.
        contexts: around the highest activations, in as many different sequences.
        raised: tokens whose logits the decoder vector raises most, and by how much per unit of activation.
        lowered: the same for those that it lowers most.
    """

    index: int
    firing_rate: float
    max_activation: float
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    contexts: tuple[Context, ...]
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


class FeatureRecorder:
    """Keeps the activations of a few features, which are drawn before anything is known of them.

    Takes 16 bytes for each of their activations that is not 0.

    Args:
        d_sae: the number of features.
        asked_for: features to show whatever they do.
        n_sampled: how many others to show. 4 times as many are tracked; those shown fire, and are evenly spread
            over the quantiles of these features' firing rates.
        seed: of the draw.
    """

    def __init__(self, d_sae: int, *, asked_for: Sequence[int] = (), n_sampled: int = 0, seed: int = 0) -> None:
        self._asked_for = list(dict.fromkeys(asked_for))
        self._n_sampled = n_sampled
        order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
        others = order[~torch.isin(order, torch.tensor(self._asked_for, dtype=torch.long))]
        drawn = others[: _TRACKED_PER_SAMPLED * n_sampled]
        self._tracked_K = torch.cat([torch.tensor(self._asked_for, dtype=torch.long), drawn])
        self._n_tokens = 0
        self._where: list[np.ndarray] = []  # [3, n] each: which tracked feature, sequence, position
        self._values: list[np.ndarray] = []

    def add(self, sequence_N: torch.Tensor, position_N: torch.Tensor, features_NF: torch.Tensor) -> None:
        """Adds N >= 0 tokens: the sequence of each, its position there, and all its feature activations."""
        self._n_tokens += len(features_NF)
        self._tracked_K = self._tracked_K.to(features_NF.device)
        tracked_NK = features_NF[:, self._tracked_K]
        token, k = tracked_NK.nonzero(as_tuple=True)
        where = torch.stack([k, sequence_N.to(k.device)[token], position_N.to(k.device)[token]])
        self._where.append(where.to(torch.int32).cpu().numpy())
        self._values.append(tracked_NK[token, k].float().cpu().numpy())

    def features(
        self,
        rows_NT: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        W_dec_FD: torch.Tensor,
        unembed_weight_VD: torch.Tensor | None = None,
        final_norm_weight_D: torch.Tensor | None = None,
        *,
        n_contexts: int = 8,
    ) -> list[Feature]:
        """The features asked for, in that order, then the sample, the most frequent first.

        Args:
            rows_NT: token ids of the sequences, by the numbers given to `add`.
            tokenizer: to decode them.
            W_dec_FD: the SAE's decoder.
            unembed_weight_VD: of the language model's output head. Without it, or where the decoder writes to
                another space (another D), `raised` and `lowered` are empty.
            final_norm_weight_D: of the norm before the output head.
            n_contexts: how many contexts each feature has, at most.
        """
        found = _Activations(self._where, self._values, len(self._tracked_K))
        shown = self._shown(found.counts_K)
        indices = self._tracked_K.cpu()[shown]
        raised: list[_Effects] = [()] * len(shown)
        lowered: list[_Effects] = [()] * len(shown)
        if len(shown) and unembed_weight_VD is not None and unembed_weight_VD.shape[1] == W_dec_FD.shape[1]:
            effects = logit_effects(W_dec_FD[indices.to(W_dec_FD.device)], unembed_weight_VD, final_norm_weight_D)
            raised, lowered = (_with_tokens(tokenizer, *end) for end in effects)
        return [
            Feature(
                index=int(indices[i]),
                firing_rate=int(found.counts_K[k]) / max(self._n_tokens, 1),
                max_activation=float(np.abs(found.of(k)[2]).max(initial=0)),
                histogram=_histogram(found.of(k)[2]),
                contexts=_top_contexts(*found.of(k), rows_NT, tokenizer, n_contexts),
                raised=raised[i],
                lowered=lowered[i],
            )
            for i, k in enumerate(shown)
        ]

    def _shown(self, counts_K: np.ndarray) -> list[int]:
        n_asked = len(self._asked_for)
        alive = n_asked + np.flatnonzero(counts_K[n_asked:])
        by_rate = alive[np.argsort(-counts_K[alive], kind="stable")]
        n = min(self._n_sampled, len(alive))
        evenly = np.linspace(0, len(alive) - 1, n).round().astype(int)
        return [*range(n_asked), *by_rate[evenly].tolist()]


class _Activations:
    """Recorded activations, sorted by feature; within a feature in the order that they came in."""

    def __init__(self, where: Sequence[np.ndarray], values: Sequence[np.ndarray], n_tracked: int) -> None:
        k, self._sequences, self._positions = np.concatenate([np.zeros((3, 0), np.int32), *where], axis=1)
        order = np.argsort(k, kind="stable")
        self._sequences, self._positions = self._sequences[order], self._positions[order]
        self._values = np.concatenate([np.zeros(0, np.float32), *values])[order]
        self.counts_K = np.bincount(k, minlength=n_tracked)
        self._ends = np.cumsum(self.counts_K)

    def of(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sequences, positions and values of one feature's activations."""
        at = slice(self._ends[k] - self.counts_K[k], self._ends[k])
        return self._sequences[at], self._positions[at], self._values[at]


def _histogram(values: np.ndarray, bins: int = 30) -> tuple[tuple[float, ...], tuple[int, ...]]:
    if len(values) == 0:
        return (), ()
    counts, edges = np.histogram(values, bins, (min(values.min(), 0), max(values.max(), 0)))
    return tuple(edges.tolist()), tuple(counts.tolist())


def _top_contexts(
    sequences: np.ndarray,
    positions: np.ndarray,
    values: np.ndarray,
    rows_NT: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    n_contexts: int,
) -> tuple[Context, ...]:
    highest_first = np.argsort(-np.abs(values), kind="stable")
    _, first = np.unique(sequences[highest_first], return_index=True)
    contexts = []
    for peak in highest_first[np.sort(first)[:n_contexts]]:
        row, position = sequences[peak], positions[peak]
        start = max(0, position - _TOKENS_BEFORE)
        ids = rows_NT[row, start : position + _TOKENS_AFTER + 1].tolist()
        inside = (sequences == row) & (positions >= start) & (positions < start + len(ids))
        activations = np.zeros(len(ids))
        activations[positions[inside] - start] = values[inside]
        contexts.append(Context(decode_tokens(tokenizer, ids), tuple(activations.tolist()), int(position - start)))
    return tuple(contexts)


def _with_tokens(tokenizer: PreTrainedTokenizerBase, ids_KN: torch.Tensor, changes_KN: torch.Tensor) -> list[_Effects]:
    return [
        tuple(zip(decode_tokens(tokenizer, ids), changes, strict=True))
        for ids, changes in zip(ids_KN.tolist(), changes_KN.tolist(), strict=True)
    ]


@torch.no_grad()
def logit_effects(
    W_dec_KD: torch.Tensor,
    unembed_weight_VD: torch.Tensor,
    final_norm_weight_D: torch.Tensor | None = None,
    *,
    n_tokens: int = 8,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Tokens whose logits a decoder vector raises and lowers most, per unit of activation.

    The logit lens (nostalgebraist 2020) of the vector: (W_dec * norm weight) @ W_U^T, less its mean over the
    vocabulary, which changes no probability. Left out are the scale that the final norm divides by, which
    depends on the token, and all that later layers make of the vector. In float32.

    Args:
        W_dec_KD: decoder vectors that write to the residual stream.
        unembed_weight_VD: of the output head.
        final_norm_weight_D: of the norm before it.
        n_tokens: how many tokens at either end.

    Returns:
        Raised and lowered, the largest change first: ids [K, n_tokens] and changes of the logit [K, n_tokens].
    """
    directions_KD = W_dec_KD.to(unembed_weight_VD.device, torch.float32)
    if final_norm_weight_D is not None:
        directions_KD = directions_KD * final_norm_weight_D.to(directions_KD)
    parts = unembed_weight_VD.split(chunk_length(unembed_weight_VD.shape[1]))
    changes_KV = torch.cat([directions_KD @ part.float().T for part in parts], dim=1)
    changes_KV -= changes_KV.mean(1, keepdim=True)
    n = min(n_tokens, changes_KV.shape[1])
    raised, lowered = changes_KV.topk(n), changes_KV.topk(n, largest=False)
    return (raised.indices, raised.values), (lowered.indices, lowered.values)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token's own text, with its leading space; bytes that are no character of their own as `\\xe4`."""
    byte_level = any("Ġ" in piece for piece in tokenizer.tokenize(" a a"))
    return tuple(
        f"[id {i}]" if piece is None else _text_of_piece(piece, byte_level)
        for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
    )


def _text_of_piece(piece: str, byte_level: bool) -> str:
    """Undoes the marks of GPT-2's byte-level BPE, or those of SentencePiece."""
    if byte_level:
        if all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece)).decode("utf-8", "backslashreplace")
        return piece  # an added token, kept as it is written
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1]).decode("utf-8", "backslashreplace")
    return piece.replace("▁", " ")
