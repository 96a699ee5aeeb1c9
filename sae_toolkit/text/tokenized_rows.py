"""Cuts rows of token ids, which a data set holds in place of text, into contexts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np

from sae_toolkit.text.records import Document

log = logging.getLogger(__name__)

_ROWS_BEFORE_JUDGING = 1_000
_MUCH = 0.1  # share of the tokens


class LeftOut:
    """Counts the tokens of a data set's rows that are in no context.

    Args:
        context_size: number of tokens in a context.
    """

    def __init__(self, context_size: int) -> None:
        self.context_size = context_size
        self.n_rows = self.n_tokens = 0
        self.n_short = self.n_left = self.longest = 0

    def count(self, length: int, n_used: int) -> None:
        """Counts one row, of which `n_used` tokens are in contexts. Warns if most of the first 1,000 rows are left."""
        self.n_rows += 1
        self.n_tokens += length
        self.n_left += length - n_used
        self.n_short += length < self.context_size
        self.longest = max(self.longest, length)
        if self.n_rows == _ROWS_BEFORE_JUDGING and self.share > 1 / 2:
            log.warning("of the first %s rows of token ids, %s", f"{self.n_rows:,}", self.describe())

    @property
    def all_short(self) -> bool:
        """Whether there are rows, and all of them are shorter than a context."""
        return 0 < self.n_rows == self.n_short

    @property
    def share(self) -> float:
        """The share of the tokens that is left out, in [0, 1]."""
        return self.n_left / max(self.n_tokens, 1)

    def describe(self) -> str:
        """Returns a phrase that says how much is left out and why; empty if nothing is."""
        if not self.n_left:
            return ""
        why = []
        if self.n_short:
            why.append(
                f"{self.n_short:,} of {self.n_rows:,} rows are shorter than a context of {self.context_size} (the"
                f" longest has {self.longest:,} tokens)"
            )
        if self.n_short < self.n_rows:
            why.append("what follows the last whole context of a row is not used")
        return f"{self.share:.1%} of the tokens are left out: {', and '.join(why)}"

    def log(self) -> None:
        """Logs how much is left out, as a warning if it is more than 10%."""
        if said := self.describe():
            log.log(logging.WARNING if self.share > _MUCH else logging.INFO, "rows of token ids: %s", said)


def contexts_of_token_ids(
    rows: Iterable[Document],
    context_size: int,
    *,
    bos_token_id: int | None,
    first_only: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts rows of token ids into contexts.

    As SAELens does, this takes it that a row already has all the special tokens that it should have. So a row of
    `context_size` tokens is a context as it is, with or without a BOS token. A longer row is cut into consecutive
    contexts, which look as its first one does: if the row begins with `bos_token_id`, each context begins with exactly
    one, and otherwise none is added. (SAELens itself uses only the first `context_size` tokens of a row.) No context
    has tokens of two rows. Shorter rows, and the end of a row that fills no context, are left out.

    Args:
        rows: [T] token ids each; T differs from row to row.
        context_size: number of tokens in a context.
        bos_token_id: the BOS token to repeat; None to repeat none.
        first_only: use only the first context of each row.
        left_out: counts what is left out.

    Yields:
        The index of the row, from 0, and the context: [context_size] int64.
    """
    for i, row in enumerate(rows):
        ids_T = np.asarray(row, dtype=np.int64)
        repeats_bos = len(ids_T) > 0 and ids_T[0] == bos_token_id and context_size > 1
        start = 0
        while start < len(ids_T) and not (first_only and start):
            prefix = [bos_token_id] if start and repeats_bos and ids_T[start] != bos_token_id else []
            end = start + context_size - len(prefix)
            if end > len(ids_T):
                break
            yield i, np.concatenate((np.array(prefix, dtype=np.int64), ids_T[start:end]))
            start = end
        if left_out is not None:
            left_out.count(len(ids_T), start)
