"""What a further evaluation shows of its results in the terminal and the reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """One table of results, and how to read it.

    Args:
        title: what was measured.
        columns: titles of the columns.
        rows: cells, as many in each row as there are columns.
        how_to_read: one or a few sentences that say what the numbers mean, and what they do not.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    how_to_read: str
