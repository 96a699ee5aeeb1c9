"""Whether features that point the same way also fire together: the correlation of their activations.

Shapes: N tokens, P pairs of features, G groups of text.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import t as student_t

# The jackknife leaves out one of this many groups of text at a time.
_GROUPS = 20
_LEAST_VARIANCE = 1e-5  # of the mean square


class FiringCorrelation:
    """Adds up what the Pearson correlations of pairs of activations follow from, over batches of tokens.

    It takes 800 bytes of memory for each pair.

    Args:
        n_pairs: number of pairs.
    """

    def __init__(self, n_pairs: int) -> None:
        self._n_G = np.zeros(_GROUPS)
        self._sums_GKP = np.zeros((_GROUPS, 5, n_pairs))  # a, b, a^2, b^2, ab

    @property
    def n_tokens(self) -> int:
        return int(self._n_G.sum())

    def add(self, a_NP: torch.Tensor, b_NP: torch.Tensor, unit_N: np.ndarray) -> None:
        """Adds N >= 0 tokens.

        Args:
            a_NP: activations of the first feature of each pair.
            b_NP: activations of the second, on the same device.
            unit_N: number of the independent unit of text that each token belongs to.
        """
        group_N = unit_N % _GROUPS
        for group in np.unique(group_N):
            in_group = torch.from_numpy(group_N == group).to(a_NP.device)
            a, b = a_NP[in_group].float(), b_NP[in_group].float()
            sums = (a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), (a * b).sum(0))
            self._n_G[group] += len(a)
            self._sums_GKP[group] += torch.stack(sums).double().cpu().numpy()

    def correlations(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the correlation of each pair, and what it is without each group of text.

        Returns:
            Pearson correlations [P], and the same [G', P] with one group left out, for the G' groups that have tokens.
            NaN where one of the two features is constant, or varies by less than 0.3% of its root mean square, which
            sums in float32 do not tell from a constant.
        """
        n, sums_KP = self._n_G.sum(), self._sums_GKP.sum(0)
        with_tokens = [group for group in range(_GROUPS) if self._n_G[group]]
        left_out = [_pearson(n - self._n_G[group], sums_KP - self._sums_GKP[group]) for group in with_tokens]
        return _pearson(n, sums_KP), np.stack(left_out)


def _pearson(n: float, sums_KP: np.ndarray) -> np.ndarray:
    if n == 0:
        return np.full(sums_KP.shape[1], np.nan)
    a, b, aa, bb, ab = sums_KP / n
    with np.errstate(invalid="ignore", divide="ignore"):
        of_a, of_b = aa - a * a, bb - b * b
        varies = (of_a > _LEAST_VARIANCE * aa) & (of_b > _LEAST_VARIANCE * bb)
        return np.where(varies, (ab - a * b) / np.sqrt(of_a * of_b), np.nan)


def mean_with_interval(values_P: np.ndarray, left_out_GP: np.ndarray) -> tuple[float | None, list[float] | None]:
    """Returns the mean over pairs, and its 95% interval from the jackknife over groups of text (Tukey 1958).

    Pairs that are NaN are left out. The mean is None if all are, and the interval is None with fewer than two groups.
    """
    known_P = np.isfinite(values_P)
    if not known_P.any():
        return None, None
    mean = float(values_P[known_P].mean())
    known_GP = np.isfinite(left_out_GP) & known_P
    n = len(left_out_GP)
    if n < 2 or not known_GP.any(1).all():
        return mean, None
    means_G = np.where(known_GP, left_out_GP, 0).sum(1) / known_GP.sum(1)
    error = float(np.sqrt((n - 1) / n * np.square(means_G - means_G.mean()).sum()))
    half = float(student_t.ppf(0.975, n - 1)) * error
    return mean, [mean - half, mean + half]
