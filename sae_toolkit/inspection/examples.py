"""The examples that are kept of every feature: the strongest, and some drawn at random, in bounded memory.

Shapes: F features, K examples of a feature, W tokens around an example, B rows of T tokens, N firings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOKENS_BEFORE, TOKENS_AFTER = 24, 12
WINDOW = TOKENS_BEFORE + 1 + TOKENS_AFTER

_EMPTY = -1.0  # rank of a place without an example; ranks are 0 or more
_BYTES_OF_EXAMPLE = 4 + 4 + 4 + 4 + 2 * WINDOW  # rank, activation, row, position, activations of the window


@dataclass(frozen=True)
class RowMaxima:
    """The strongest activation of each feature in each row in which it fires.

    Args:
        feature_N, row_N, position_N: where it is; `row_N` counts within the batch.
        activation_N: its value.
    """

    feature_N: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    activation_N: torch.Tensor

    @classmethod
    def of(
        cls,
        feature_N: torch.Tensor,
        row_N: torch.Tensor,
        position_N: torch.Tensor,
        activation_N: torch.Tensor,
        n_rows: int,
    ) -> RowMaxima:
        """Returns the maxima of firings. Of several that are equally strong, the first in the row is taken."""
        group_N = feature_N * n_rows + row_N
        group_G, group_of_N = group_N.unique(return_inverse=True)
        strength_N = activation_N.abs()
        strongest_G = strength_N.new_zeros(len(group_G)).scatter_reduce_(0, group_of_N, strength_N, "amax")
        is_strongest_N = strength_N == strongest_G[group_of_N]
        last = torch.iinfo(position_N.dtype).max
        position_G = position_N.new_full((len(group_G),), last).scatter_reduce_(
            0, group_of_N[is_strongest_N], position_N[is_strongest_N], "amin"
        )
        chosen = (is_strongest_N & (position_N == position_G[group_of_N])).nonzero()[:, 0]
        return cls(feature_N[chosen], row_N[chosen], position_N[chosen], activation_N[chosen])


class KeptExamples:
    """The examples of each feature with the highest ranks, at most one of each row.

    Args:
        n_features: number of features F.
        n_kept: examples of each feature K.
        device: where they are kept.
    """

    TENSORS = ("rank_FK", "activation_FK", "row_FK", "position_FK", "window_FKW")

    def __init__(self, n_features: int, n_kept: int, device: str | torch.device) -> None:
        shape = (n_features, n_kept)
        self.rank_FK = torch.full(shape, _EMPTY, device=device)
        self.activation_FK = torch.zeros(shape, device=device)
        self.row_FK = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.position_FK = torch.zeros(shape, dtype=torch.int32, device=device)
        self.window_FKW = torch.zeros((*shape, WINDOW), dtype=torch.bfloat16, device=device)

    @staticmethod
    def memory(n_features: int, n_kept: int) -> int:
        """Returns the bytes that the examples of so many features take."""
        return n_features * n_kept * _BYTES_OF_EXAMPLE

    def add(self, maxima: RowMaxima, rank_N: torch.Tensor, first_row: int, acts_BTF: torch.Tensor) -> None:
        """Offers one example for each row maximum.

        Args:
            maxima: of the batch.
            rank_N: the rank of each, 0 or more.
            first_row: number of the batch's first row.
            acts_BTF: the activations of the batch; 0 where no activation is measured.
        """
        if self.rank_FK.shape[1] == 0:
            return
        may_enter = rank_N > self.rank_FK.amin(dim=1)[maxima.feature_N]
        feature_N, rank_N = maxima.feature_N[may_enter], rank_N[may_enter]
        if len(feature_N) == 0:
            return
        row_N, position_N, activation_N = (
            each[may_enter] for each in (maxima.row_N, maxima.position_N, maxima.activation_N)
        )
        touched_G, group_N = feature_N.unique(return_inverse=True)
        n_kept, n_rows = self.rank_FK.shape[1], len(acts_BTF)
        offered_GB = self.rank_FK.new_full((len(touched_G), n_rows), -torch.inf)
        offered_GB[group_N, row_N] = rank_N
        best = torch.cat((self.rank_FK[touched_G], offered_GB), dim=1).topk(n_kept, dim=1, sorted=False).indices
        # What stays keeps its place; what is new takes the places of what leaves.
        stays_GK = torch.zeros((len(touched_G), n_kept), dtype=torch.bool, device=best.device)
        is_old = best < n_kept
        old_group, old_slot = is_old.nonzero(as_tuple=True)
        stays_GK[old_group, best[old_group, old_slot]] = True
        new_group, new_slot = (~is_old).nonzero(as_tuple=True)
        free_group, free_place = (~stays_GK).nonzero(as_tuple=True)
        assert torch.equal(new_group, free_group)  # as many are free as are new, in each group
        row = best[new_group, new_slot] - n_kept
        at_GB = torch.full((len(touched_G), n_rows), -1, dtype=torch.long, device=best.device)
        at_GB[group_N, row_N] = torch.arange(len(group_N), device=best.device)
        chosen = at_GB[new_group, row]
        feature, place = touched_G[free_group], free_place
        self.rank_FK[feature, place] = rank_N[chosen]
        self.activation_FK[feature, place] = activation_N[chosen].float()
        self.row_FK[feature, place] = (first_row + row).to(torch.int32)
        self.position_FK[feature, place] = position_N[chosen].to(torch.int32)
        self.window_FKW[feature, place] = _windows(acts_BTF, row, position_N[chosen], feature)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that the examples consist of."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)


def _windows(
    acts_BTF: torch.Tensor, row_N: torch.Tensor, position_N: torch.Tensor, feature_N: torch.Tensor
) -> torch.Tensor:
    """Returns the activations [N, W] of a feature at the tokens around each position; 0 outside of the row."""
    offsets_W = torch.arange(-TOKENS_BEFORE, TOKENS_AFTER + 1, device=acts_BTF.device)
    at_NW = position_N[:, None] + offsets_W
    inside_NW = (at_NW >= 0) & (at_NW < acts_BTF.shape[1])
    values_NW = acts_BTF[row_N[:, None], at_NW.clamp(0, acts_BTF.shape[1] - 1), feature_N[:, None]]
    return (values_NW * inside_NW).to(torch.bfloat16)
