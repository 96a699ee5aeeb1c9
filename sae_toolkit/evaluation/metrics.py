"""Definitions of the metrics, and their bootstrap intervals.

Sums are kept in float64 and separately for each sequence, so that the bootstrap can draw sequences.

Shapes: N tokens, D dimensions, F features, S sequences, B x T tokens of a batch, V vocabulary, K sums, R resamples,
U units of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t

from sae_toolkit.model.devices import with_float64

# Large tensors are computed in chunks of at most this many float32 values (512 MiB).
_CHUNK_VALUES = 2**27
# On a CPU, chunks of this size (4 MiB) stay in its cache, so that several passes over them are five times as fast.
_CACHED_VALUES = 2**20


def chunk_length(values_per_row: int, values: int | None = None) -> int:
    """Returns how many rows make a chunk of at most `values` values (default: 2**27); at least 1."""
    return max(1, (values or _CHUNK_VALUES) // values_per_row)


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """Returns the mean of two values or more, and its 95% interval (t distribution)."""
    mean = float(np.mean(values))
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, [mean - half, mean + half]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Returns the log-softmax over the last axis, in float32 whatever the dtype of the logits."""
    return logits.log_softmax(-1, dtype=torch.float32)


def loss_recovered(ce_clean: torch.Tensor, ce_sae: torch.Tensor, ce_zero: torch.Tensor) -> torch.Tensor:
    """Returns (CE zero-ablated - CE with SAE) / (CE zero-ablated - CE clean).

    1 means that the SAE recovers all of the loss, 0 that it is no better than zeros. SAELens and SAEBench call it
    `ce_loss_score`. It is NaN where zeros at the hook do not raise the loss, since there is no loss to recover.
    """
    cost = ce_zero - ce_clean
    return torch.where(cost > 0, (ce_zero - ce_sae) / cost, torch.nan)


@torch.no_grad()
def compare_predictions(
    tokens_BT: torch.Tensor, clean_BTV: torch.Tensor, others: Sequence[Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Returns the cross-entropies of the next tokens, and how far other predictions are from the model's own.

    Logits may have any dtype. Logarithms and sums over the vocabulary are computed in float32.

    Args:
        tokens_BT: token ids.
        clean_BTV: logits of the model alone.
        others: for each other prediction, B tensors of logits [T, V].

    Returns:
        The model's cross-entropy [B, T] in nats; and for each other prediction, its cross-entropy [B, T] and
        KL(model alone || other) [B, T]. The cross-entropy at the last position, which has no next token, is 0.
    """
    B, T = tokens_BT.shape
    ce_BT = torch.zeros(B, T, device=clean_BTV.device)
    compared = [(torch.zeros_like(ce_BT), torch.zeros_like(ce_BT)) for _ in others]
    n = chunk_length(clean_BTV.shape[-1], _CHUNK_VALUES if clean_BTV.is_cuda else _CACHED_VALUES)
    for b in range(B):
        for start in range(0, T, n):
            at = slice(start, min(start + n, T))
            targets = tokens_BT[b, at.start + 1 : at.stop + 1, None]
            with_next = slice(at.start, at.start + len(targets))
            log_p_NV = log_probabilities(clean_BTV[b, at])
            p_NV = log_p_NV.exp()
            ce_BT[b, with_next] = -log_p_NV[: len(targets)].gather(1, targets).squeeze(1)
            for logits, (other_ce_BT, kl_BT) in zip(others, compared, strict=True):
                log_q_NV = log_probabilities(logits[b][at])
                other_ce_BT[b, with_next] = -log_q_NV[: len(targets)].gather(1, targets).squeeze(1)
                kl_BT[b, at] = torch.linalg.vecdot(p_NV, torch.sub(log_p_NV, log_q_NV, out=log_q_NV))
    return ce_BT, compared


class LossStatistics:
    """Sums, over the scored positions of each sequence, of the losses and KL divergences in nats."""

    COLUMNS = ("n_losses", "n_positions", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero")

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(
        self,
        scored_BT: torch.Tensor,
        ce_clean_BT: torch.Tensor,
        sae: tuple[torch.Tensor, torch.Tensor],
        zero: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds a batch.

        Args:
            scored_BT: booleans, True at the positions to sum over. The last position of a sequence has no next token
                and is summed for KL only.
            ce_clean_BT: cross-entropy of the model alone.
            sae: cross-entropy and KL [B, T] with the SAE, from `compare_predictions`.
            zero: the same with zeros at the hook.
        """
        scored_BT = scored_BT.to(ce_clean_BT.device)  # the hook's device, if the model is spread over several
        predicts_BT = scored_BT.clone()
        predicts_BT[:, -1] = False
        sums = [predicts_BT, scored_BT]
        sums += [values.where(predicts_BT, 0) for values in (ce_clean_BT, sae[0], zero[0])]
        sums += [values.where(scored_BT, 0) for values in (sae[1], zero[1])]
        self._sums.append(torch.stack([with_float64(values_BT).double().sum(1) for values_BT in sums], dim=1).cpu())

    def sums_SK(self) -> torch.Tensor:
        """Returns the sums of each sequence, [S, len(COLUMNS)] float64."""
        return torch.cat(self._sums) if self._sums else torch.zeros(0, len(self.COLUMNS), dtype=torch.double)

    @classmethod
    def metrics(cls, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the mean losses and KLs, and the loss recovered, from sums over sequences [..., len(COLUMNS)]."""
        n_losses, n_positions, clean, sae, zero, kl_sae, kl_zero = totals.unbind(-1)
        ce_clean, ce_sae, ce_zero = clean / n_losses, sae / n_losses, zero / n_losses
        return {
            "loss_recovered": loss_recovered(ce_clean, ce_sae, ce_zero),
            "ce_clean": ce_clean,
            "ce_sae": ce_sae,
            "ce_zero": ce_zero,
            "kl_sae": kl_sae / n_positions,
            "kl_zero": kl_zero / n_positions,
        }


class ReconstructionStatistics:
    """Sums, over the scored tokens of each sequence, of L0 and of the quality of the reconstructions.

    Args:
        n_sequences: number of sequences that will be added.
    """

    COLUMNS = ("n_tokens", "n_active", "cosine", "l2_ratio", "squared_error", "squared_norm")

    def __init__(self, n_sequences: int) -> None:
        self._sums_SK = torch.zeros(n_sequences, len(self.COLUMNS), dtype=torch.double)
        self._sums_SD: torch.Tensor | None = None
        # A value near the mean. It is subtracted so that the variance is not a difference of large numbers.
        self._offset_D: torch.Tensor | None = None
        self.l0_counts = torch.zeros(0, dtype=torch.long)  # number of tokens with 0, 1, 2, ... active features

    def add(self, sequence_N: torch.Tensor, acts_ND: torch.Tensor, recons_ND: torch.Tensor, l0_N: torch.Tensor) -> None:
        """Adds N >= 0 tokens.

        Args:
            sequence_N: number of the sequence that each token belongs to.
            acts_ND: activations.
            recons_ND: reconstructions of them.
            l0_N: number of active features.
        """
        if len(acts_ND) == 0:
            return
        x, recons = with_float64(acts_ND).double(), with_float64(recons_ND).double()
        sequence_N, l0_N = with_float64(sequence_N), with_float64(l0_N)
        if self._offset_D is None or self._sums_SD is None:
            self._offset_D = x.mean(0)
            self._sums_SD = torch.zeros(len(self._sums_SK), x.shape[1], dtype=torch.double, device=x.device)
            self._sums_SK = self._sums_SK.to(x.device)
        centred = x - self._offset_D
        values_NK = torch.stack(
            [
                torch.ones_like(x[:, 0]),
                l0_N.double(),
                F.cosine_similarity(x, recons, dim=-1),
                recons.norm(dim=-1) / x.norm(dim=-1),
                (x - recons).pow(2).sum(-1),
                centred.pow(2).sum(-1),
            ],
            dim=1,
        )
        self._sums_SK.index_add_(0, sequence_N, values_NK)
        self._sums_SD.index_add_(0, sequence_N, centred)
        counts = l0_N.bincount(minlength=len(self.l0_counts)).cpu()
        counts[: len(self.l0_counts)] += self.l0_counts
        self.l0_counts = counts

    def sums_SK(self) -> torch.Tensor:
        """Returns the sums of each sequence, [S, len(COLUMNS) + D] float64.

        The last D columns are sums of the activations less a fixed offset.
        """
        assert self._sums_SD is not None
        return torch.cat([self._sums_SK.cpu(), self._sums_SD.cpu()], dim=1)

    @classmethod
    def metrics(cls, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns `explained_variance`, `cosine_similarity`, `l2_ratio` and `l0` from sums over sequences.

        Explained variance is 1 - sum |x - x_hat|^2 / sum |x - mean x|^2, with both sums over all tokens and
        dimensions.
        """
        n_tokens, n_active, cosine, l2_ratio, squared_error, squared_norm = totals[..., : len(cls.COLUMNS)].unbind(-1)
        variance = squared_norm - totals[..., len(cls.COLUMNS) :].pow(2).sum(-1) / n_tokens
        return {
            "explained_variance": 1 - squared_error / variance,
            "cosine_similarity": cosine / n_tokens,
            "l2_ratio": l2_ratio / n_tokens,
            "l0": n_active / n_tokens,
        }


class HasMetrics(Protocol):
    """What turns sums over sequences into metrics."""

    def metrics(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns metrics [...] by name, from sums [..., K]."""


def point_and_interval(
    statistics: HasMetrics,
    sums_SK: torch.Tensor,
    unit_S: torch.Tensor,
    *,
    seed: int,
    resamples: int = 1000,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns metrics over all sequences, and their 95% intervals from a bootstrap over independent units of text.

    This is a percentile bootstrap (Efron 1979) of clusters. It draws whole units with replacement, as many as there
    are, because tokens of one text and sequences of one document are not independent of each other.

    Args:
        statistics: class or object whose `metrics` turns sums into metrics.
        sums_SK: sums of each sequence.
        unit_S: number of the unit that each sequence belongs to.
        seed: seed of the draws.
        resamples: number of draws.

    Returns:
        The metrics, and the interval [low, high] of each. A metric has no interval if there are fewer than 2 units,
        or if it is not finite in the sample or in more than 2% of the draws.
    """
    metrics = {name: value.item() for name, value in statistics.metrics(sums_SK.sum(0)).items()}
    unit_S = unit_S.unique(return_inverse=True)[1]
    n_units = int(unit_S.max()) + 1 if len(unit_S) else 0
    if n_units < 2:
        return metrics, {}
    sums_UK = sums_SK.new_zeros(n_units, sums_SK.shape[1]).index_add_(0, unit_S, sums_SK)
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in metrics}
    for n in torch.arange(resamples).split(chunk_length(n_units + sums_SK.shape[1])):
        drawn = torch.randint(n_units, (len(n), n_units), generator=generator)
        weights_RU = sums_SK.new_zeros(len(n), n_units).scatter_add_(1, drawn, sums_SK.new_ones(drawn.shape))
        for name, values in statistics.metrics(weights_RU @ sums_UK).items():
            draws[name].append(values)
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    intervals = {}
    for name, parts in draws.items():
        values = torch.cat(parts)
        numbers = values[values.isfinite()]
        if math.isfinite(metrics[name]) and len(numbers) >= 0.98 * resamples:
            intervals[name] = numbers.quantile(ends).tolist()
    return metrics, intervals


def histogram(values: torch.Tensor, low: float, high: float, bins: int) -> tuple[list[float], list[int]]:
    """Returns the edges [bins + 1] and counts [bins]; values outside are counted in the first or last bin."""
    counts = values.clamp(low, high).float().histc(bins, low, high)
    return torch.linspace(low, high, bins + 1).tolist(), counts.long().tolist()
