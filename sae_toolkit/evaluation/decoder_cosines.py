"""Similarity of an SAE's directions: the largest cosine of each one to any other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sae_toolkit.evaluation.metrics import chunk_length, histogram
from sae_toolkit.model.devices import with_float64

# All pairs are compared if that takes at most this many multiplications and additions. They take seconds.
_AFFORDABLE = {"cpu": 2e12, "cuda": 5e14}
NEAR_DUPLICATE = 0.9


@dataclass(frozen=True)
class DirectionCosines:
    """Statistics of the largest cosine of each encoder or decoder vector to any other one.

    Args:
        mean: mean over the features. For the decoder this is SAEBench's `average_max_decoder_cosine_sim`, which is
            called decoder absorption here.
        interval: 95% interval of the mean if the features were sampled; None if all were compared.
        p95: 95th percentile.
        near_duplicate_pairs: number of pairs of features whose cosine is above 0.9; an estimate if sampled.
        alive_mean: mean among the features that fire; None if none fires.
        random_directions: mean that the same number of random directions would have.
        rows: number of features that were compared with all others.
        exact: whether `rows` is the number of all features.
        histogram: edges and counts of the largest cosines.
    """

    mean: float
    interval: list[float] | None
    p95: float
    near_duplicate_pairs: float
    alive_mean: float | None
    random_directions: float
    rows: int
    exact: bool
    histogram: tuple[list[float], list[int]]


@torch.no_grad()
def largest_cosines(
    W_FD: torch.Tensor, rows_R: torch.Tensor, columns_F: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns the largest cosine of each given row to other rows, which row that is, and the number of near duplicates.

    The matrix of cosines is computed in chunks of rows.

    Args:
        W_FD: directions of any length.
        rows_R: indices of the rows to compare.
        columns_F: booleans, True for the rows to compare them with (default: all).

    Returns:
        Cosines [R] in [-1, 1], or -inf where there is no other row; the index [R] of the row with that cosine; and
        the number of ordered pairs with a cosine above 0.9.
    """
    unit_FD = F.normalize(W_FD.float(), dim=-1)
    largest_R = torch.empty(len(rows_R), device=W_FD.device)
    nearest_R = torch.empty_like(rows_R)
    n_near = torch.zeros((), dtype=torch.long, device=W_FD.device)
    n = chunk_length(4 * len(unit_FD))
    for start in range(0, len(rows_R), n):
        rows = rows_R[start : start + n]
        cosines = unit_FD[rows] @ unit_FD.T
        cosines[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        if columns_F is not None:
            cosines[:, ~columns_F] = -torch.inf
        largest_R[start : start + n], nearest_R[start : start + n] = cosines.max(dim=-1)
        n_near += (cosines > NEAR_DUPLICATE).sum()
    return largest_R, nearest_R, int(n_near)


def rows_to_compare(W_FD: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, bool]:
    """Returns the indices [R] of directions to compare with all others, and whether these are all directions.

    Args:
        W_FD: directions. If comparing all pairs would take too long, R of them are drawn at random.
        seed: seed of the draw.
    """
    n_features, d_in = W_FD.shape
    affordable = int(_AFFORDABLE["cuda" if W_FD.is_cuda else "cpu"] / (2 * n_features * d_in))
    if n_features <= affordable:
        return torch.arange(n_features, device=W_FD.device), True
    order = torch.randperm(n_features, generator=torch.Generator().manual_seed(seed))
    return order[: max(affordable, 1000)].sort().values.to(W_FD.device), False


def sampling_interval(values_R: torch.Tensor, n: int) -> list[float]:
    """Returns the 95% interval of the mean of n values, R of which were drawn at random without replacement."""
    mean, error = values_R.mean().item(), values_R.std().item() * ((1 - len(values_R) / n) / len(values_R)) ** 0.5
    return [mean - 1.96 * error, mean + 1.96 * error]


def measure_cosines(W_FD: torch.Tensor, alive_F: torch.Tensor, *, seed: int) -> DirectionCosines:
    """Returns statistics of each vector's largest cosine to the others, from a sample of vectors if there are too many.

    Args:
        W_FD: encoder or decoder vectors of any length.
        alive_F: booleans, True for the features that fire.
        seed: seed of the sample.
    """
    n_features, d_in = W_FD.shape
    rows_R, exact = rows_to_compare(W_FD, seed=seed)
    n_rows = len(rows_R)
    largest_R, _, n_near = largest_cosines(W_FD, rows_R)
    largest_R = with_float64(largest_R)
    mean = largest_R.double().mean().item()
    interval = None if exact else sampling_interval(largest_R.double(), n_features)
    alive_mean = None
    if int(alive_F.sum()) > 1:
        alive_rows = rows_R[alive_F[rows_R]]
        all_alive = bool(alive_F.all())
        among_alive = largest_R if all_alive else largest_cosines(W_FD, alive_rows, alive_F)[0]
        alive_mean = with_float64(among_alive).double().mean().item() if len(among_alive) else None
    return DirectionCosines(
        mean=mean,
        interval=interval,
        p95=largest_R.quantile(0.95).item(),
        near_duplicate_pairs=n_near / 2 * n_features / n_rows,
        alive_mean=alive_mean,
        random_directions=random_largest_cosine(n_features, d_in),
        rows=n_rows,
        exact=exact,
        histogram=histogram(largest_R[largest_R.isfinite()], 0.0, 1.0, 50),  # of no value, if there is one direction
    )


def random_largest_cosine(n: int, d: int) -> float:
    """Returns the expected largest cosine of a direction to n - 1 others.

    All of them are uniform on the sphere in d >= 2 dimensions. The cosine t between two of them has the density
    c (1 - t^2)^((d - 3) / 2). Given the first direction, the cosines to the others are independent, so the
    expectation is 1 - integral over t of P(cosine <= t)^(n - 1).
    """
    angle = np.linspace(0, np.pi, 400_001)  # t = cos(angle): the density over angles, c sin^(d - 2), has no poles
    with np.errstate(divide="ignore"):
        density = np.exp((d - 2) * np.log(np.sin(angle))) if d > 2 else np.ones_like(angle)
    above = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])  # P(cosine >= t), unnormalized
    below = 1 - above / above[-1]
    return float(1 - np.trapezoid(below ** (n - 1) * np.sin(angle), angle))
