"""The tables of the further evaluations, in the terminal and the reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.l0_check.shown import show_l0_check
from sae_toolkit.evaluation.probing.table import show_probing
from sae_toolkit.evaluation.shown import Shown
from sae_toolkit.evaluation.stability.table import show_stability
from sae_toolkit.evaluation.synthetic.table import show_synthetic

# The function that makes a table of the results, by their key in evaluation.json.
_SHOW: dict[str, Callable[[Mapping[str, Any]], Shown]] = {
    "stability": show_stability,
    "l0_check": show_l0_check,
    "synthetic": show_synthetic,
    "probing": show_probing,
}


def further_tables(summary: Mapping[str, Any]) -> list[Shown]:
    """Returns the table of each further evaluation that a summary has results of.

    Args:
        summary: content of evaluation.json.
    """
    return [show(summary[name]) for name, show in _SHOW.items() if summary.get(name)]


def render_further(summaries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Yields the tables for the terminal, and once how to read those of one kind."""
    of_shown: dict[Shown, list[str]] = {}  # a table about several SAEs is the same for each of them
    for summary in summaries:
        for shown in further_tables(summary):
            of_shown.setdefault(shown, []).append(summary["sae"]["name"])
    for shown, names in of_shown.items():
        name = f"{names[0]}: " if len(names) == 1 < len(summaries) else ""
        yield Group(Text(), Text(f"{name}{shown.title}", "bold"), _table(shown))
    yield from map(Text, dict.fromkeys(shown.how_to_read for shown in of_shown))


def _table(shown: Shown) -> Table:
    table = Table()
    for number, column in enumerate(shown.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*row)
    return table
