"""The selection of the largest features of a batch, on one rank or over several."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from sae_toolkit.distributed.ranks import Ranks

_BLOCK = 8  # features; the fastest of 4, 8 and 16 at 4,608 features and k 64


class GlobalBatchTopK(BatchTopK):
    """SAELens's BatchTopK over a batch that several ranks share.

    Args:
        k: mean number of active features of a token.
        n_tokens: number of tokens in the whole batch.
        ranks: the ranks that share the batch.
    """

    def __init__(self, k: float, n_tokens: int, ranks: Ranks) -> None:
        super().__init__(k)
        self.n_active = int(k * n_tokens)
        self.ranks = ranks

    def choose(self, flat: Tensor) -> Tensor:
        """Returns the ascending indices of those of this rank's values [N] that are among the largest of all ranks."""
        mine_N = largest(flat, min(self.n_active, len(flat)))
        gathered = self.ranks.gather(flat[mine_N])
        before = sum(map(len, gathered[: self.ranks.rank]))
        values_M = torch.cat(gathered)
        is_chosen_M = torch.zeros_like(values_M, dtype=torch.bool)
        is_chosen_M[largest(values_M, self.n_active)] = True
        return mine_N[is_chosen_M[before : before + len(mine_N)]]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.relu().flatten()
        chosen_N = self.choose(flat.detach())
        return torch.zeros_like(flat).scatter(-1, chosen_N, flat[chosen_N]).reshape(x.shape)


def select_among(sae: TrainingSAE[Any], ranks: Ranks, n_tokens: int) -> None:
    """Makes a BatchTopK or Matryoshka SAE select over the whole batch of all ranks, which has n_tokens tokens."""
    if isinstance(sae.activation_fn, BatchTopK):
        sae.activation_fn = GlobalBatchTopK(sae.activation_fn.k, n_tokens, ranks)


def largest(flat: Tensor, n: int) -> Tensor:
    """Returns the indices of the n largest values [N], ascending."""
    if flat.device.type != "cpu":
        return largest_by_blocks(flat, n)
    # On a CPU numpy's vectorized partition takes a tenth of the time of torch's topk of a flat tensor.
    values = flat.float().numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    threshold = np.partition(values, -n)[-n]  # nan counts as the largest, as for torch
    only_nan = np.isnan(threshold)
    chosen = np.flatnonzero(np.isnan(values) if only_nan else ~(values < threshold))
    if len(chosen) > n:
        ties = np.arange(len(chosen)) if only_nan else np.flatnonzero(values[chosen] == threshold)
        chosen = np.delete(chosen, ties[n - len(chosen) :])
    return torch.from_numpy(chosen)


def largest_by_blocks(flat: Tensor, n: int) -> Tensor:
    """Returns the indices of the n largest values [N], ascending. Any of several equal values may be chosen.

    The n largest values lie in the n blocks with the largest maxima. torch's `topk` of a flat tensor goes over it
    several times. Here one pass over all values finds the maxima, and `topk` sees only these and the n blocks.
    """
    n_blocks, rest = divmod(len(flat), _BLOCK)
    if rest or n_blocks < 2 * n:
        return flat.topk(n, sorted=False).indices.sort().values
    blocks_WM = flat.view(_BLOCK, n_blocks)  # a block is every n_blocks-th value, as in `largest_of_rows`
    blocks_N = blocks_WM.amax(0).topk(n, sorted=False).indices
    places_N = blocks_WM[:, blocks_N].flatten().topk(n, sorted=False).indices
    return (blocks_N[places_N % n] + places_N.div(n, rounding_mode="floor") * n_blocks).sort().values


def largest_of_rows(values_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest values of each row and their columns, both [B, k], in no particular order.

    Any of several equal values may be chosen. The features are divided into blocks. The k largest
    values lie in the k blocks with the largest maxima. So one pass over all values finds the maxima, and the slow
    search for the k largest is only needed among the maxima and then within those k blocks.
    """
    n_rows, n_features = values_BF.shape
    n_blocks, rest = divmod(n_features, _BLOCK)
    if rest or n_blocks < 4 * k:
        values, features = values_BF.topk(min(k, n_features), dim=-1, sorted=False)
        return values, features
    # A block is every n_blocks-th feature, so that the computation of the maxima is vectorized.
    blocks_BWN = values_BF.view(n_rows, _BLOCK, n_blocks)
    blocks_BK = _columns_of_largest(blocks_BWN.amax(1), k)
    candidates = blocks_BWN.gather(2, blocks_BK[:, None].expand(-1, _BLOCK, -1)).flatten(1)
    places_BK = _columns_of_largest(candidates, k)
    features_BK = blocks_BK.gather(1, places_BK % k) + places_BK.div(k, rounding_mode="floor") * n_blocks
    return candidates.gather(1, places_BK), features_BK


def _columns_of_largest(values_BC: Tensor, k: int) -> Tensor:
    """Returns the columns [B, k] of the k largest values of each row."""
    if values_BC.device.type == "cpu" and values_BC.dtype != torch.bfloat16:
        # This is faster than torch's topk, as in `largest`. If a row holds nan, or if values tie for the last place, it
        # does not find exactly k columns, and torch's topk is used.
        values = values_BC.numpy()
        n_rows, n_columns = values.shape
        found = np.flatnonzero(values >= np.partition(values, -k)[:, -k, None])
        if len(found) == n_rows * k:
            columns = found.reshape(n_rows, k) - np.arange(0, values.size, n_columns)[:, None]
            if columns.min() >= 0 and columns.max() < n_columns:
                return torch.from_numpy(columns)
    return values_BC.topk(k, dim=-1, sorted=False).indices


def among_largest(values_BC: Tensor, n: int, ranks: Ranks) -> Tensor:
    """Returns which of this rank's values [B, C] are among the n largest of their row on all ranks, boolean [B, C].

    With a single rank all values are chosen, since they are already the n largest of their row.
    """
    if ranks.is_alone:
        return torch.ones_like(values_BC, dtype=torch.bool)
    all_BM = torch.cat(ranks.gather(values_BC), dim=1)
    chosen_BM = torch.zeros_like(all_BM, dtype=torch.bool)
    chosen_BM.scatter_(1, all_BM.topk(min(n, all_BM.shape[1]), dim=1, sorted=False).indices, True)
    return chosen_BM.chunk(ranks.size, dim=1)[ranks.rank]
