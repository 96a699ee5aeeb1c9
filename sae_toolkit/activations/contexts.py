"""Batches of whole contexts, for training steps that run the language model with an SAE in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextBatches:
    """Rows of tokens, in batches that have `batch_size` positions to train on, on average.

    A batch has whole rows, so it has up to half a row more or less. The first n batches together have n x `batch_size`
    positions, to half a row. Each row is in one batch, until all rows are used up and begin again.

    Args:
        rows_NT: token ids.
        keeps_NT: booleans, True at the positions to train on.
        row_ids: the rows to use, in the order in which they are used.
        n_kept: for each of them, the number of positions to train on.
        batch_size: the number of positions in a batch.
    """

    rows_NT: np.ndarray
    keeps_NT: np.ndarray
    row_ids: np.ndarray
    n_kept: np.ndarray
    batch_size: int

    def batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids [R, T] of the n-th batch, and its part of `keeps_NT`. They depend on n only."""
        places = np.arange(self._end_of(n * self.batch_size), self._end_of((n + 1) * self.batch_size))
        ids = self.row_ids[places % len(self.row_ids)]
        return self.rows_NT[ids], self.keeps_NT[ids]

    def _end_of(self, n_positions: int) -> int:
        """Returns the number of rows that have this many positions together, to half a row."""
        ends = self.n_kept.cumsum()
        passes, rest = divmod(n_positions, int(ends[-1]))
        return passes * len(self.row_ids) + int(np.searchsorted(ends - self.n_kept / 2, rest))


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
        otherwise the stream gets at least one row.
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
    return np.sort(order[:n_first]), ContextBatches(rows_NT, keeps_NT, last, n_kept[last], batch_size)
