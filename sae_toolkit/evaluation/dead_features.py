"""Counts of feature firings, and estimates about the features that stay silent in a sample of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sae_toolkit.model.devices import with_float64

_RARER_THAN_MEAN = 100  # `tokens_to_settle` is for a feature that fires this many times less often than the mean


class FiringStatistics:
    """Counts how often each feature fires, over tokens that arrive sequence by sequence.

    Args:
        d_sae: number of features.
        device: device of the feature activations.
    """

    def __init__(self, d_sae: int, device: str | torch.device) -> None:
        self.n_tokens = 0
        self.firings_F = torch.zeros(d_sae, dtype=torch.long, device=device)
        self._sequences_F = torch.zeros_like(self.firings_F)  # number of sequences each feature fired in
        self._last_sequence_F = torch.full_like(self.firings_F, -1)
        self._first_token_F = torch.full_like(self.firings_F, -1)
        self._n_sequences = 0
        self._last_sequence = -1

    def add(self, sequence_N: torch.Tensor, active_NF: torch.Tensor) -> None:
        """Adds N >= 0 tokens.

        Args:
            sequence_N: number of the sequence that each token belongs to, in ascending order.
            active_NF: booleans, True where a feature is active.
        """
        for sequence, n in zip(*(x.tolist() for x in sequence_N.unique_consecutive(return_counts=True)), strict=True):
            active, active_NF = active_NF[:n], active_NF[n:]
            firings_F = active.sum(0)
            fires_F = firings_F > 0
            self.firings_F += firings_F
            self._sequences_F += fires_F & (self._last_sequence_F != sequence)
            self._last_sequence_F[fires_F] = sequence
            new = (fires_F & (self._first_token_F < 0)).nonzero().squeeze(1)
            self._first_token_F[new] = self.n_tokens + active[:, new].int().argmax(0)
            self.n_tokens += n
            self._n_sequences += sequence != self._last_sequence
            self._last_sequence = sequence

    @property
    def dead(self) -> float:
        """Share of features that never fired."""
        return with_float64(self.firings_F == 0).double().mean().item()

    def silent_share(self) -> list[tuple[int, float]]:
        """Returns (tokens, share of features still silent) after 1,000, 3,000, 10,000, ... tokens and after all."""
        marks = [m * 10**e for e in range(3, 12) for m in (1, 3) if m * 10**e < self.n_tokens]
        first = with_float64(self._first_token_F)
        return [(n, ((first < 0) | (first >= n)).double().mean().item()) for n in (*marks, self.n_tokens) if n]

    def estimates(self) -> DeadFeatureEstimates:
        """Returns estimates about the silent features, from the counts so far."""
        d_sae = len(self.firings_F)
        silent = int((self.firings_F == 0).sum())
        once, twice = (int((self._sequences_F == n).sum()) for n in (1, 2))
        # Chao's bias-corrected lower bound of the number of unseen features, from incidence in S sampling units.
        S = max(self._n_sequences, 1)
        unseen = min((S - 1) / S * once * (once - 1) / (2 * (twice + 1)), silent)
        found_in_as_many = unseen * (1 - (1 - once / (S * unseen + once)) ** S) if unseen else 0.0
        incidences = int(self._sequences_F.sum())
        mean_rate = int(self.firings_F.sum()) / self.n_tokens / d_sae
        return DeadFeatureEstimates(
            tokens=self.n_tokens,
            largest_missed_rate=3 / self.n_tokens,
            unseen_firing_share=once / incidences if incidences else 1.0,
            expected_at_twice_the_tokens=(silent - found_in_as_many) / d_sae,
            expected_in_the_long_run=(silent - unseen) / d_sae,
            tokens_to_settle=math.ceil(3 / (mean_rate / _RARER_THAN_MEAN)) if mean_rate else 0,
            curve=self.silent_share(),
        )


@dataclass(frozen=True)
class DeadFeatureEstimates:
    """Estimates about the features that were silent in a sample of tokens.

    A bootstrap would not work here, since a resample of the tokens can only contain fewer firing features. So the
    estimators are those that ecology uses for unseen species. Shares are in [0, 1].

    Args:
        tokens: number of tokens in the sample.
        largest_missed_rate: firings per token. A feature that fires at this rate or above is seen in the sample with
            95% confidence, if tokens are independent (the rule of three: Hanley & Lippman-Hand 1983).
        unseen_firing_share: Good-Turing estimate (Good 1953) of the share of all firings that belong to features
            not seen yet. It is the number of features seen in exactly one sequence, divided by the number of pairs
            of a feature and a sequence that it fires in.
        expected_at_twice_the_tokens: share of features that would still be silent after as many sequences again
            (Chao et al. 2009, extrapolated from the features seen in one and in two sequences).
        expected_in_the_long_run: upper bound of the share that would stay silent however many tokens there were (from
            Chao's bias-corrected lower bound of the expected number of unseen features: Chao 2005).
        tokens_to_settle: number of tokens on which a feature that fires at a hundredth of the mean rate is seen with
            95% confidence. Chao's bound can miss many unseen features, so on fewer tokens a large share of silent
            features does not show that they are dead.
        curve: pairs of a number of tokens and the share of features still silent after them.
    """

    tokens: int
    largest_missed_rate: float
    unseen_firing_share: float
    expected_at_twice_the_tokens: float
    expected_in_the_long_run: float
    tokens_to_settle: int
    curve: list[tuple[int, float]]
