"""The tables of the further evaluations, in the terminal and the reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.shown import Shown
from sae_toolkit.evaluation.stability.table import show_stability

# The function that makes a table of the results, by their key in evaluation.json.
_SHOW: dict[str, Callable[[Mapping[str, Any]], Shown]] = {
    "stability": show_stability,
}


def further_tables(summary: Mapping[str, Any]) -> list[Shown]:
    """Returns the table of each further evaluation that a summary has results of.

    Args:
        summary: content of evaluation.json.
    """
    return [show(summary[name]) for name, show in _SHOW.items() if summary.get(name)]


def render_further(summaries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Yields the tables for the terminal: those of each SAE under its title, and once how to read them."""
    how_to_read: dict[str, None] = {}
    for summary in summaries:
        for shown in further_tables(summary):
            name = f"{summary['sae']['name']}: " if len(summaries) > 1 else ""
            yield Group(Text(), Text(f"{name}{shown.title}", "bold"), _table(shown))
            how_to_read[shown.how_to_read] = None
    yield from map(Text, how_to_read)


def _table(shown: Shown) -> Table:
    table = Table()
    for number, column in enumerate(shown.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*row)
    return table
