"""The page of many runs: a plot of loss recovered over L0, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from plotly import graph_objects as go

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.reports.tables import MARKS

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

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows


def runs_page(
    title: str, lead: str, figure: go.Figure, tables: Sequence[tuple[str, Table]], notes: Sequence[str], *, words: bool
) -> str:
    """The page as HTML.

    Args:
        title: of the page.
        lead: HTML that stands before the plot.
        figure: the plot.
        tables: each with its heading, which may be empty.
        notes: text that stands last, a paragraph each.
        words: whether the first column of the tables is text.
    """
    parts = []
    for heading, (columns, rows) in tables:
        header = "".join(f"<th>{escape(cell)}</th>" for cell in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>{escape(heading)}</h2>" if heading else "")
        parts.append(f'<div class="table{" words" if words else ""}"><table><tr>{header}</tr>{body}</table></div>')
    return _PAGE.format(
        title=escape(title),
        lead=lead,
        figure=figure.to_html(
            full_html=False, include_plotlyjs=True, config={"responsive": True, "displayModeBar": False}
        ),
        tables="".join(parts),
        marks=escape(legend()),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
    )


def legend() -> str:
    """What the marks mean."""
    return ", ".join(f"{mark} {status}" for status, mark in MARKS.items())


def over_l0(traces: Sequence[go.Scatter]) -> go.Figure:
    """A plot of loss recovered over L0, its healthy range shaded, that fits a phone too."""
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


def front_trace(points: Sequence[tuple[float, float]]) -> go.Scatter:
    """The Pareto front's points, by L0, as a line."""
    return go.Scatter(
        x=[l0 for l0, _ in points],
        y=[recovered for _, recovered in points],
        mode="lines",
        line={"color": "#888", "shape": "hv", "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )
