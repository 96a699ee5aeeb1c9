"""Batches of whole contexts, for training steps that run the language model with an SAE in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextBatches:
    """Rows of tokens, in batches that have `batch_size` positions to train on, on average.

    A batch has whole rows, so it has up to half a row more or less. The first n batches together have n x `batch_size`
    positions, to half a row. Each row is in one batch, until all rows are used up and begin again, in another order.

    Args:
        rows_NT: token ids.
        keeps_NT: booleans, True at the positions to train on.
        row_ids: the rows to use, in the order in which they are used.
        n_kept: for each of them, the number of positions to train on.
        batch_size: the number of positions in a batch.
        seed: seed of the order of rows that are used again; None to keep their order.
    """

    rows_NT: np.ndarray
    keeps_NT: np.ndarray
    row_ids: np.ndarray
    n_kept: np.ndarray
    batch_size: int
    seed: int | None

    def batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids [R, T] of the n-th batch, and its part of `keeps_NT`. They depend on n only."""
        (first_pass, start), (last_pass, end) = (self._end_of(m * self.batch_size) for m in (n, n + 1))
        orders = [self._order(n_passes) for n_passes in range(first_pass, last_pass + 1)]
        orders[-1] = orders[-1][:end]
        orders[0] = orders[0][start:]
        ids = self.row_ids[np.concatenate(orders)]
        return self.rows_NT[ids], self.keeps_NT[ids]

    def _end_of(self, n_positions: int) -> tuple[int, int]:
        """Returns the whole passes and the further rows that have this many positions together, to half a row."""
        n_passes, rest = divmod(n_positions, int(self.n_kept.sum()))
        kept = self.n_kept[self._order(n_passes)]
        return n_passes, int(np.searchsorted(kept.cumsum() - kept / 2, rest))

    def _order(self, n_passes: int) -> np.ndarray:
        """Returns the places of all rows in the order in which they are used after so many passes."""
        places = np.arange(len(self.row_ids))
        if n_passes == 0 or self.seed is None:
            return places
        return np.random.default_rng((self.seed, len(self.rows_NT), n_passes)).permutation(places)


def split_rows(
    rows_NT: np.ndarray, keeps_NT: np.ndarray, *, share: float, batch_size: int, seed: int | None
) -> tuple[np.ndarray, ContextBatches]:
    """Divides rows between a stream of activations and batches of whole contexts.

    Args:
        rows_NT: token ids.
        keeps_NT: booleans, True at the positions that are trained on.
        share: the share of these positions that the batches get, above 0 and at most 1.
        batch_size: the number of positions in a batch.
        seed: seed of the choice of rows and of their order; None to take the last rows in their own order.

    Returns:
        The ids of the rows for the stream, ascending, and the batches. The batches get every row if the share is 1, and
        otherwise the stream gets at least one row of several.
    """
    n_kept = keeps_NT.sum(1)
    order = np.arange(len(rows_NT))
    if seed is not None:
        order = np.random.default_rng((seed, len(rows_NT))).permutation(order)
    n_first = 0
    if share < 1:
        ends = n_kept[order].cumsum()
        n_first = min(int(np.searchsorted(ends, (1 - share) * ends[-1])) + 1, len(order) - 1)
    last = order[n_first:]
    return np.sort(order[:n_first]), ContextBatches(rows_NT, keeps_NT, last, n_kept[last], batch_size, seed)
