"""Shows the results of a sweep or comparison: tables, a plot of loss recovered over L0, and an HTML page with both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly import graph_objects as go
from rich.table import Column
from rich.table import Table as TerminalTable

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.reports.tables import MARKS

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows

LEGEND = ", ".join(f"{mark} {status}" for status, mark in MARKS.items())
"""The meaning of the marks in the tables."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222 }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse }} code {{ overflow-wrap: anywhere }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th {{ white-space: normal; vertical-align: bottom }}
.words th:first-child, .words td:first-child {{ text-align: left }}
</style></head><body><h1>{title}</h1>
{lead}
{figure}
{tables}<p>{marks}</p>{notes}</body></html>
"""


def runs_page(
    title: str,
    lead: str,
    figure: go.Figure,
    tables: Sequence[tuple[str, Table]],
    notes: Sequence[str],
    *,
    names_first: bool,
) -> str:
    """Returns the page as HTML.

    Args:
        title: the title of the page.
        lead: HTML before the plot.
        figure: the plot.
        tables: each with its heading, which may be empty.
        notes: paragraphs of text at the end.
        names_first: whether the first column of each table holds names, which are aligned to the left.
    """
    parts, css_classes = [], "table words" if names_first else "table"
    for heading, (columns, rows) in tables:
        header = "".join(f"<th>{escape(cell)}</th>" for cell in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>{escape(heading)}</h2>" if heading else "")
        parts.append(f'<div class="{css_classes}"><table><tr>{header}</tr>{body}</table></div>')
    return _PAGE.format(
        title=escape(title),
        lead=lead,
        figure=figure.to_html(
            full_html=False, include_plotlyjs=True, config={"responsive": True, "displayModeBar": False}
        ),
        tables="".join(parts),
        marks=escape(LEGEND),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
    )


def terminal_table(table: Table, *, names_first: bool) -> TerminalTable:
    """Returns a table for the terminal. Its cells are aligned to the right, except for names in the first column."""
    columns, rows = table
    shown = TerminalTable(*(Column(column, justify="right") for column in columns))
    if names_first:
        shown.columns[0].justify = "left"
    for row in rows:
        shown.add_row(*row)
    return shown


def count_healthy(health: Mapping[str, Any]) -> str:
    """Returns how many metrics are healthy, such as `3/4`; `?` for an evaluation without a verdict."""
    return "?" if health["healthy"] is None else f"{health['healthy']}/{health['of']}"


def plot_over_l0(traces: Sequence[go.Scatter]) -> go.Figure:
    """Returns a plot of loss recovered over L0 with the healthy range shaded. It also fits on a phone."""
    figure = go.Figure(traces)
    l0 = next(standard for standard in STANDARDS if standard.metric == "l0")
    figure.add_vrect(x0=l0.healthy[0], x1=l0.healthy[1], fillcolor="#2a2", opacity=0.08, line_width=0)
    figure.update_layout(
        template="plotly_white",
        xaxis={"title": "L0 (shaded: healthy)"},
        yaxis={"title": "loss recovered", "tickformat": ".0%"},
        showlegend=False,
        margin={"l": 60, "r": 20, "t": 90, "b": 50},
        height=480,
    )
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (L0, loss recovered) on the Pareto front, in the order of their L0.

    A point is on the front if all other points with the same or a lower L0 have a lower loss recovered.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def front_trace(points: Sequence[tuple[float, float]]) -> go.Scatter:
    """Returns a line through the Pareto front of the points (L0, loss recovered)."""
    front = [points[i] for i in pareto_front(points)]
    return go.Scatter(
        x=[l0 for l0, _ in front],
        y=[recovered for _, recovered in front],
        mode="lines",
        line={"color": "#888", "shape": "hv", "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )
