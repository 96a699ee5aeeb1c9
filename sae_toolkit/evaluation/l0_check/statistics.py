"""The two statistics of a decoder by which arXiv 2508.16560 looks for the right L0: c_dec and s_n_dec.

Both are small if each decoder vector holds one feature, and grow as features that occur together are mixed.

Shapes: N tokens, F features, D dimensions, U units of text, K bins.
"""

from __future__ import annotations

import math

import torch

from sae_toolkit.evaluation.decoder_cosines import rows_to_compare, sampling_interval
from sae_toolkit.evaluation.metrics import chunk_length, point_and_interval
from sae_toolkit.model.devices import with_float64

# s_n_dec is taken at n = 3/8 of the features. The paper allows any n between L0 and half of the features; its published
# code takes 12,000 of 32,768.
N_SHARE = 3 / 8
_CHUNK_VALUES = 2**25  # products that exist at a time: 128 MiB
_N_BINS = 2048
_N_SAMPLE = 2**20  # projections from which the range of the bins is taken
_RANGE = 0.2  # the bins reach from this share of the projections above s_n_dec to this share below it


@torch.no_grad()
def pairwise_cosines(
    W_FD: torch.Tensor, firing_F: torch.Tensor, *, seed: int
) -> tuple[float, float | None, list[float] | None]:
    """Returns c_dec, the mean of |cos(W_dec_i, W_dec_j)| over all pairs of features i < j, in [0, 1].

    Equation 4 of arXiv 2508.16560, version 3. If there are too many pairs, a random sample of features is compared with
    all others.

    Args:
        W_FD: decoder vectors of any length. At least 2 are not zero; those that are zero have no direction and are left
            out.
        firing_F: booleans, True for the features that fire.
        seed: seed of the sample.

    Returns:
        c_dec; c_dec among the features that fire, None if fewer than 2 do; and the 95% interval of c_dec if features
        were sampled, otherwise None.
    """
    W_FD = W_FD.float()
    norm_F = W_FD.norm(dim=-1)
    has_direction_F = norm_F > 0
    counted_F2 = torch.stack([has_direction_F, has_direction_F & firing_F.to(W_FD.device)], dim=1)
    inverse_norm_F2 = counted_F2 / norm_F.where(has_direction_F, 1)[:, None]
    rows_R, exact = rows_to_compare(W_FD, seed=seed)
    rows_R = rows_R[has_direction_F[rows_R]]
    mean_R2 = torch.empty(len(rows_R), 2, device=W_FD.device)
    others_R2 = counted_F2.sum(0) - counted_F2[rows_R].int()
    n = chunk_length(len(W_FD), _CHUNK_VALUES)
    for start in range(0, len(rows_R), n):
        rows = rows_R[start : start + n]
        products_RF = ((W_FD[rows] / norm_F[rows, None]) @ W_FD.T).abs_()
        products_RF[torch.arange(len(rows), device=rows.device), rows] = 0
        mean_R2[start : start + n] = products_RF @ inverse_norm_F2 / others_R2[start : start + n]
    mean_R2 = with_float64(mean_R2).double()
    interval = None if exact else sampling_interval(mean_R2[:, 0], int(has_direction_F.sum()))
    among_firing_R = mean_R2[with_float64(counted_F2[rows_R, 1]), 1]
    is_defined = int(counted_F2[:, 1].sum()) > 1 and len(among_firing_R) > 0
    return mean_R2[:, 0].mean().item(), among_firing_R.mean().item() if is_defined else None, interval


def random_pairwise_cosine(d: int) -> float:
    """Returns the expected |cosine| of two random directions in d dimensions.

    It is Gamma(d / 2) / (sqrt(pi) Gamma((d + 1) / 2)), the mean of |t| under the density c (1 - t^2)^((d - 3) / 2).
    """
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


class DecoderProjections:
    """The projections of activations on decoder vectors, and their s_n_dec.

    z = (x - b_dec) W_dec^T has a value for each token and feature. With all of them in descending order, s_n_dec is the
    one at index n times the number of tokens (arXiv 2508.16560, equations 58 and 59). The projections are kept as
    counts in bins around that value, for each unit of text, so that the memory does not grow with the tokens.

    Args:
        n_features: number of features, F.
    """

    def __init__(self, n_features: int) -> None:
        self.n = int(N_SHARE * n_features)
        self._range: tuple[float, float] | None = None
        # For each unit: its tokens, projections above all bins, and the counts in the bins [2 + K].
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, z_NF: torch.Tensor, unit_N: torch.Tensor) -> None:
        """Adds projections in float32 of N > 0 tokens, and the number [N] on the CPU of the unit of each token."""
        if self._range is None:
            self._range = self._range_of(z_NF)
        low, high = self._range
        units, lengths = unit_N.unique_consecutive(return_counts=True)
        for unit, of_unit in zip(units.tolist(), z_NF.split(lengths.tolist()), strict=True):
            sums = self._sums.setdefault(unit, torch.zeros(2 + _N_BINS, dtype=torch.double))
            sums[0] += len(of_unit)
            sums[1] += (of_unit > high).sum().item()
            sums[2:] += of_unit.histc(_N_BINS, low, high).cpu()

    def _range_of(self, z_NF: torch.Tensor) -> tuple[float, float]:
        """Returns the ends of the bins, from the projections of some tokens."""
        z = z_NF.flatten()
        z = z[:: math.ceil(len(z) / _N_SAMPLE)].sort(descending=True).values
        high, low = (z[int(share * (len(z) - 1))].item() for share in (N_SHARE - _RANGE, N_SHARE + _RANGE))
        margin = max(0.25 * (high - low), 1e-6 * z.abs().max().item(), 1e-30)
        return low - margin, high + margin

    def s_n_dec(self, *, seed: int) -> tuple[float, list[float] | None]:
        """Returns s_n_dec, in the unit of the activations, and its 95% interval from a bootstrap over units of text.

        It is NaN if the value is outside the bins, whose range comes from the first tokens. There is no interval if the
        tokens belong to one unit.
        """
        units = torch.tensor(list(self._sums))
        point, intervals = point_and_interval(self, torch.stack(list(self._sums.values())), units, seed=seed)
        return point["s_n_dec"], intervals.get("s_n_dec")

    def metrics(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns s_n_dec from sums over units [..., 2 + K]: tokens, projections above all bins, and counts."""
        assert self._range is not None
        low, high = self._range
        tokens, above, counts = totals[..., 0], totals[..., 1], totals[..., 2:]
        target = self.n * tokens - above  # projections in the bins that come before the one that is looked for
        before = counts.flip(-1).cumsum(-1)  # from the highest bin
        place = torch.searchsorted(before, target[..., None], right=True)
        is_inside = (target >= 0) & (place[..., 0] < _N_BINS)
        place = place.clamp(max=_N_BINS - 1)
        in_bin = counts.flip(-1).gather(-1, place)
        into_bin = (target[..., None] - (before.gather(-1, place) - in_bin)) / in_bin
        value = high - (place + into_bin) * (high - low) / _N_BINS
        return {"s_n_dec": value[..., 0].where(is_inside, torch.nan)}
