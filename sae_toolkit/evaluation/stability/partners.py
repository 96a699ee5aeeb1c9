"""The features of one dictionary that another one has too, by the cosines of their decoder vectors.

Shapes: A and B features of two dictionaries, D dimensions, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.stats import beta

from sae_toolkit.evaluation.decoder_cosines import random_largest_cosine
from sae_toolkit.evaluation.metrics import chunk_length

# Above these cosines a feature counts as found again. 0.7 is that of Paulo and Belrose 2025 (arXiv 2501.16615).
SHARED, SAME = 0.7, 0.9
# All pairs are matched up to this number of features: a matrix of 0.25 GiB, and seconds.
_MATCHED_EXACTLY = 8192
# With more features, each may be matched with one of this many that are nearest to it.
_CANDIDATES = 32
_RANDOM_ROWS = 1000


@dataclass(frozen=True)
class Partners:
    """What one dictionary shares with another.

    Args:
        largest_A: largest cosine of each feature to any of the other dictionary, in [-1, 1].
        largest_B: the same for the features of the other dictionary.
        matched_A: the partner of each feature when no two features share one, -1 without a partner. The sum of
            the cosines of the pairs is the largest possible.
        matched_cosine_A: cosine of these pairs; 0 without a partner.
        exact: whether all pairs were candidates of the matching, and not only the nearest.
    """

    largest_A: torch.Tensor
    largest_B: torch.Tensor
    matched_A: torch.Tensor
    matched_cosine_A: torch.Tensor
    exact: bool


@torch.no_grad()
def find_partners(W_AD: torch.Tensor, W_BD: torch.Tensor, *, exact_up_to: int = _MATCHED_EXACTLY) -> Partners:
    """Compares the directions of two dictionaries.

    The matrix of cosines is computed in chunks of rows, so that memory is bounded: by computation 0.5 GiB and about 400
    bytes for each feature, beyond the directions and a copy of them.

    Args:
        W_AD: directions of any length.
        W_BD: directions of the other dictionary, on the same device.
        exact_up_to: number of features up to which all pairs are candidates of the matching.
    """
    unit_AD, unit_BD = F.normalize(W_AD.float(), dim=-1), F.normalize(W_BD.float(), dim=-1)
    exact = max(len(unit_AD), len(unit_BD)) <= exact_up_to
    k = min(_CANDIDATES, len(unit_BD))
    largest_B = torch.full((len(unit_BD),), -torch.inf, device=unit_BD.device)
    largest, matrix, cosines, candidates = [], [], [], []
    n = chunk_length(4 * len(unit_BD))
    for start in range(0, len(unit_AD), n):
        cosine_NB = unit_AD[start : start + n] @ unit_BD.T
        largest_B = torch.maximum(largest_B, cosine_NB.amax(0))
        largest.append(cosine_NB.amax(1))
        if exact:
            matrix.append(cosine_NB.cpu())
        else:
            cosine_NK, candidate_NK = cosine_NB.topk(k, dim=1)
            cosines.append(cosine_NK.cpu())
            candidates.append(candidate_NK.cpu())
    if exact:
        matched_A, matched_cosine_A = _match_all(torch.cat(matrix).numpy())
    else:
        matched_A, matched_cosine_A = _match_candidates(
            torch.cat(cosines).numpy(), torch.cat(candidates).numpy(), len(unit_BD)
        )
    return Partners(
        torch.cat(largest).cpu(),
        largest_B.cpu(),
        torch.from_numpy(matched_A),
        torch.from_numpy(matched_cosine_A),
        exact,
    )


@torch.no_grad()
def nearest_cosines(W_AD: torch.Tensor, W_BD: torch.Tensor) -> torch.Tensor:
    """Returns the largest cosine [A] of each direction to any of the other dictionary, in bounded memory.

    It is `find_partners(...).largest_A`, without the matching, which takes minutes where features are many.
    """
    unit_AD, unit_BD = F.normalize(W_AD.float(), dim=-1), F.normalize(W_BD.float(), dim=-1)
    return torch.cat([(part @ unit_BD.T).amax(1) for part in unit_AD.split(chunk_length(4 * len(unit_BD)))]).cpu()


def shared_features(by_decoder: Partners, by_encoder: Partners) -> torch.Tensor:
    """Returns which features two SAEs share, by the definition of Paulo and Belrose (arXiv 2501.16615).

    The one-to-one matchings of the decoder vectors and of the encoder vectors, each made by itself, give the feature
    the same partner, and both cosines are at least 0.7.

    Args:
        by_decoder: the partners by the decoder vectors.
        by_encoder: the partners by the encoder vectors.

    Returns:
        Booleans [A].
    """
    same_A = (by_decoder.matched_A == by_encoder.matched_A) & (by_decoder.matched_A >= 0)
    return same_A & (by_decoder.matched_cosine_A >= SHARED) & (by_encoder.matched_cosine_A >= SHARED)


def _match_all(cosine_AB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the partner of each row in the one-to-one matching with the largest sum of cosines, and its cosine."""
    row, column = linear_sum_assignment(cosine_AB, maximize=True)
    matched_A = np.full(len(cosine_AB), -1)
    cosine_A = np.zeros(len(cosine_AB), dtype=np.float32)
    matched_A[row], cosine_A[row] = column, cosine_AB[row, column]
    return matched_A, cosine_A


def _match_candidates(cosine_AK: np.ndarray, candidate_AK: np.ndarray, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Does the same as `_match_all` with a few candidates for each row. A row may stay without a partner."""
    n_rows, k = cosine_AK.shape
    row = np.repeat(np.arange(n_rows), k)
    cosine, column = cosine_AK.ravel(), candidate_AK.ravel()
    positive = cosine > 0
    # Each row also has a column of its own with the cosine 0, since SciPy asks for a partner for each row. The weights
    # are 2 minus the cosines, since SciPy takes a weight of 0 for a pair that is no candidate.
    own = np.arange(n_rows)
    weights = csr_matrix(
        (
            np.concatenate([2.0 - cosine[positive], np.full(n_rows, 2.0)]),
            (np.concatenate([row[positive], own]), np.concatenate([column[positive], n_columns + own])),
        ),
        shape=(n_rows, n_columns + n_rows),
    )
    _, matched_A = min_weight_full_bipartite_matching(weights)
    matched_A = np.where(matched_A < n_columns, matched_A, -1)
    is_partner = candidate_AK == matched_A[:, None]
    return matched_A, np.where(is_partner, cosine_AK, 0).sum(1)


def of_random_directions(n: int, d: int) -> dict[str, float]:
    """Returns what a direction has in common with n others, if all are uniform on the sphere in d >= 2 dimensions.

    The square of a cosine then has a beta distribution with parameters 1/2 and (d - 1)/2.

    Returns:
        `mean`, the expected largest cosine to the others; `above_0.7` and `above_0.9`, the probabilities that the
        largest cosine is above these.
    """
    shares = {}
    for bound in (SHARED, SAME):
        one = 0.5 * beta.sf(bound**2, 0.5, (d - 1) / 2)
        shares[f"above_{bound}"] = float(-np.expm1(n * np.log1p(-one)))
    return {"mean": random_largest_cosine(n + 1, d), **shares}


@torch.no_grad()
def of_directions_with_covariance(W_BD: torch.Tensor, *, seed: int) -> dict[str, float]:
    """Returns what random directions have in common, if they are distributed as the directions of a dictionary are.

    Decoder vectors are not uniform: some dimensions hold more of them. Random ones are drawn from a normal
    distribution with their mean and covariance: 1,000 for one dictionary, and as many as there are for the other.

    Args:
        W_BD: directions of any length. Those of length 0 are none.
        seed: seed of the draw.

    Returns:
        The same as `of_random_directions`, measured on the draw.
    """
    unit_BD = F.normalize(W_BD[W_BD.norm(dim=-1) > 0].float(), dim=-1)
    mean_D = unit_BD.mean(0)
    covariance_DD = unit_BD.T @ unit_BD / len(unit_BD) - mean_D[:, None] * mean_D
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.cpu())
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()).to(unit_BD.device)
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        normal_ND = torch.randn(n, len(mean_D), generator=generator).to(unit_BD.device)
        return F.normalize(normal_ND @ root_DD.T + mean_D, dim=-1)

    rows_RD = draw(_RANDOM_ROWS)
    largest_R = torch.full((_RANDOM_ROWS,), -torch.inf, device=unit_BD.device)
    n = chunk_length(4 * max(_RANDOM_ROWS, len(mean_D)))
    for start in range(0, len(unit_BD), n):
        columns_ND = draw(min(n, len(unit_BD) - start))
        largest_R = torch.maximum(largest_R, (rows_RD @ columns_ND.T).amax(1))
    return {"mean": largest_R.mean().item(), **shares_above(largest_R)}


def shares_above(cosines: torch.Tensor) -> dict[str, float]:
    """Returns the shares of cosines above 0.7 and 0.9."""
    return {f"above_{bound}": (cosines > bound).double().mean().item() for bound in (SHARED, SAME)}
