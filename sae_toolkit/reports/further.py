"""The tables of the further evaluations, in the terminal and the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.probing.table import show_probing
from sae_toolkit.evaluation.shown import Shown

# The function that makes a table of the results, by their key in evaluation.json.
_SHOW: dict[str, Callable[[Mapping[str, Any]], Shown]] = {
    "probing": show_probing,
}


def further_tables(summary: Mapping[str, Any]) -> list[Shown]:
    """Returns the table of each further evaluation that a summary has results of.

    Args:
        summary: content of evaluation.json.
    """
    return [show(summary[name]) for name, show in _SHOW.items() if summary.get(name)]


def render_further(shown: Shown) -> RenderableType:
    """Returns a table for the terminal, with its title above and how to read it below."""
    table = Table()
    for number, column in enumerate(shown.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*row)
    return Group(Text(), Text(shown.title, "bold"), table, Text(shown.how_to_read))
