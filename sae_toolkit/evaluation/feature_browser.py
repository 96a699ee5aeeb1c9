"""Single features: the text that they respond to, and the tokens that their decoder vectors make likelier.

Shapes: N tokens, F features, K tracked features, D dimensions, V vocabulary, R x T rows of tokens.
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
from sae_toolkit.model.language_model import Unembedding
from sae_toolkit.text.token_ids import TokenIds

# More features are tracked than shown: many may never fire, and those that do should cover all firing rates.
_TRACKED_PER_SAMPLED = 4
_TOKENS_BEFORE, _TOKENS_AFTER = 24, 12
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_Effects = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Context:
    """A window of text around one of the highest activations of a feature.

    Args:
        tokens: the text, each token decoded by itself.
        activations: the feature's activation at each token; 0 where it is silent or the SAE is not applied.
        peak: index of the token with the high activation.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Feature:
    """One feature, as the report shows it.

    Args:
        index: index in the SAE.
        firing_rate: share of tokens on which it fires, in [0, 1].
        max_activation: largest magnitude of its activation over all tokens; 0 if it never fired.
        histogram: edges [n + 1] and counts [n] of the activations that are not 0; empty if it never fired.
        contexts: windows around the highest activations, each from a different sequence.
        raised: tokens whose logits the decoder vector raises most, with the change per unit of activation.
        lowered: the same for the tokens whose logits it lowers most.
    """

    index: int
    firing_rate: float
    max_activation: float
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    contexts: tuple[Context, ...]
    raised: _Effects
    lowered: _Effects


class FeatureRecorder:
    """Records the activations of a few features, which are drawn at random before any text is read.

    It takes 16 bytes of memory for each of these activations that is not 0.

    Args:
        d_sae: number of features.
        asked_for: features that the user wants to see, whether they fire or not.
        n_sampled: number of other features to show. 4 times as many are tracked. Of the tracked features that fire,
            those shown are evenly spaced over the quantiles of the firing rates.
        seed: seed of the draw.
    """

    def __init__(self, d_sae: int, *, asked_for: Sequence[int] = (), n_sampled: int = 0, seed: int = 0) -> None:
        self._asked_for = list(dict.fromkeys(asked_for))
        self._n_sampled = n_sampled
        order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
        others = order[~torch.isin(order, torch.tensor(self._asked_for, dtype=torch.long))]
        drawn = others[: _TRACKED_PER_SAMPLED * n_sampled]
        self._tracked_K = torch.cat([torch.tensor(self._asked_for, dtype=torch.long), drawn])
        self._n_tokens = 0
        self._where: list[np.ndarray] = []  # [3, n] each: index k of the tracked feature, sequence, position
        self._values: list[np.ndarray] = []

    def add(self, sequence_N: torch.Tensor, position_N: torch.Tensor, features_NF: torch.Tensor) -> None:
        """Adds N >= 0 tokens.

        Args:
            sequence_N: number of the sequence that each token belongs to.
            position_N: position of the token in that sequence.
            features_NF: activations of all features.
        """
        self._n_tokens += len(features_NF)
        self._tracked_K = self._tracked_K.to(features_NF.device)
        tracked_NK = features_NF[:, self._tracked_K]
        token, k = tracked_NK.nonzero(as_tuple=True)
        where = torch.stack([k, sequence_N.to(k.device)[token], position_N.to(k.device)[token]])
        self._where.append(where.to(torch.int32).cpu().numpy())
        self._values.append(tracked_NK[token, k].float().cpu().numpy())

    def features(
        self,
        rows_RT: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        W_dec_FD: torch.Tensor,
        unembedding: Unembedding | None = None,
        *,
        n_contexts: int = 8,
    ) -> list[Feature]:
        """Returns the features asked for in their order, then the sampled ones with the most frequent first.

        Args:
            rows_RT: token ids of the sequences, indexed by the sequence numbers given to `add`.
            tokenizer: tokenizer of the token ids.
            W_dec_FD: decoder of the SAE.
            unembedding: what reads the decoder's output. Without it `raised` and `lowered` are empty.
            n_contexts: largest number of contexts of a feature.
        """
        found = _Activations(self._where, self._values, len(self._tracked_K))
        shown = self._choose(found.counts_K)
        indices = self._tracked_K.cpu()[shown]
        raised: list[_Effects] = [()] * len(shown)
        lowered: list[_Effects] = [()] * len(shown)
        if len(shown) and unembedding is not None:
            effects = logit_effects(W_dec_FD[indices.to(W_dec_FD.device)], unembedding)
            raised, lowered = (_with_tokens(tokenizer, *end) for end in effects)
        return [
            Feature(
                index=int(indices[i]),
                firing_rate=int(found.counts_K[k]) / max(self._n_tokens, 1),
                max_activation=float(np.abs(found.of(k)[2]).max(initial=0)),
                histogram=_histogram(found.of(k)[2]),
                contexts=_top_contexts(*found.of(k), rows_RT, tokenizer, n_contexts),
                raised=raised[i],
                lowered=lowered[i],
            )
            for i, k in enumerate(shown)
        ]

    def _choose(self, counts_K: np.ndarray) -> list[int]:
        """Returns which of the tracked features to show."""
        n_asked = len(self._asked_for)
        alive = n_asked + np.flatnonzero(counts_K[n_asked:])
        by_rate = alive[np.argsort(-counts_K[alive], kind="stable")]
        n = min(self._n_sampled, len(alive))
        evenly = np.linspace(0, len(alive) - 1, n).round().astype(int)
        return [*range(n_asked), *by_rate[evenly].tolist()]


class _Activations:
    """Recorded activations, sorted by feature, and within a feature in the order in which they were added."""

    def __init__(self, where: Sequence[np.ndarray], values: Sequence[np.ndarray], n_tracked: int) -> None:
        k, self._sequences, self._positions = np.concatenate([np.zeros((3, 0), np.int32), *where], axis=1)
        order = np.argsort(k, kind="stable")
        self._sequences, self._positions = self._sequences[order], self._positions[order]
        self._values = np.concatenate([np.zeros(0, np.float32), *values])[order]
        self.counts_K = np.bincount(k, minlength=n_tracked)
        self._ends = np.cumsum(self.counts_K)

    def of(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the sequences, positions and values of the activations of tracked feature k."""
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
    rows_RT: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    n_contexts: int,
) -> tuple[Context, ...]:
    highest_first = np.argsort(-np.abs(values), kind="stable")
    _, first = np.unique(sequences[highest_first], return_index=True)
    contexts = []
    for peak in highest_first[np.sort(first)[:n_contexts]]:
        row, position = sequences[peak], positions[peak]
        start = max(0, position - _TOKENS_BEFORE)
        ids = rows_RT[row, start : position + _TOKENS_AFTER + 1].tolist()
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
    W_dec_KD: torch.Tensor, unembedding: Unembedding, *, n_tokens: int = 8
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Returns the tokens whose logits each decoder vector raises and lowers most, per unit of activation.

    Args:
        W_dec_KD, unembedding: as for `logit_changes`.
        n_tokens: number of tokens to return in each direction.

    Returns:
        For raised and for lowered, with the largest change first: token ids [K, n_tokens] and changes of the logit
        [K, n_tokens].
    """
    changes_KV = logit_changes(W_dec_KD, unembedding)
    n = min(n_tokens, changes_KV.shape[1])
    raised, lowered = changes_KV.topk(n), changes_KV.topk(n, largest=False)
    return (raised.indices, raised.values), (lowered.indices, lowered.values)


def logit_changes(W_dec_KD: torch.Tensor, unembedding: Unembedding) -> torch.Tensor:
    """Returns by how much each decoder vector raises the logit of each token, per unit of activation, [K, V].

    This is the logit lens (nostalgebraist 2020) of the vector: (W_dec * norm weight) @ W_U^T, less its mean over the
    vocabulary, which changes no probability. Of a norm that subtracts the mean over the dimensions W_dec loses its
    own first. It ignores the scale that the norm divides by, which depends on the token, and the effect of later
    layers on the vector. It is computed in float32.

    Args:
        W_dec_KD: decoder vectors that write to the residual stream.
        unembedding: the last norm and the output head.
    """
    weight_VD = unembedding.weight_VD
    directions_KD = W_dec_KD.to(weight_VD.device, torch.float32)
    if unembedding.is_centered:
        directions_KD = directions_KD - directions_KD.mean(1, keepdim=True)
    if unembedding.norm_factors_D is not None:
        directions_KD = directions_KD * unembedding.norm_factors_D.to(directions_KD)
    parts = weight_VD.split(chunk_length(weight_VD.shape[1]))
    changes_KV = torch.cat([directions_KD @ part.float().T for part in parts], dim=1)
    return changes_KV.sub_(changes_KV.mean(1, keepdim=True))


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Returns the text of each token, with its leading space; bytes that do not form a character become `\\xe4`.

    Without a tokenizer the text of a token is its id.
    """
    if isinstance(tokenizer, TokenIds):
        return tuple(f" {i}" for i in ids)
    byte_level = any("Ġ" in piece for piece in tokenizer.tokenize(" a a"))
    return tuple(
        f"[id {i}]" if piece is None else _text_of_piece(piece, byte_level)
        for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
    )


def _text_of_piece(piece: str, byte_level: bool) -> str:
    """Returns the text of a vocabulary entry, without the markers of GPT-2's byte-level BPE or of SentencePiece."""
    if byte_level:
        if all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece)).decode("utf-8", "backslashreplace")
        return piece  # an added token, whose text is the entry itself
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1]).decode("utf-8", "backslashreplace")
    return piece.replace("▁", " ")
