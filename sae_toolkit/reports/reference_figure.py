"""The plot that places an evaluated SAE among published ones."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly import graph_objects as go

from sae_toolkit.reports.figures import styled_figure, titled_axis
from sae_toolkit.reports.references import SIZES, ReferenceSAE, is_placed, load_references, size_of
from sae_toolkit.reports.tables import format_value

# plotly's symbol of each class of model sizes, and the sign that stands for it in the page.
_SYMBOLS = dict(zip(SIZES, (("circle", "●"), ("square", "■"), ("diamond", "◆")), strict=True))

_NAMES = {
    "l0": "L0",
    "loss_recovered": "loss recovered",
    "explained_variance": "explained variance",
    "dead_features": "dead features",
}

# Characters in a line of what is shown at a point, so that it fits on a telephone.
_WIDTH = 48


@dataclass(frozen=True)
class ReferenceFigure:
    """The plot of loss recovered over L0.

    Args:
        figure: its traces of references have the class of their models' sizes in `meta`, for the filter; the trace of
            the evaluated SAE has none.
        caption: what is drawn.
        sizes: classes of model sizes to filter by: name, sign, and number of references drawn.
    """

    figure: go.Figure
    caption: str
    sizes: tuple[tuple[str, str, int], ...]


def reference_figure(summary: Mapping[str, Any]) -> ReferenceFigure | None:
    """Returns the plot that places an evaluated SAE among the references; None if it has no place among them.

    Args:
        summary: content of evaluation.json.
    """
    if not is_placed(summary):
        return None
    references = load_references()
    shown = [reference for reference in references if reference.loss_recovered is not None]
    metrics = summary["metrics"]
    x = [*(reference.l0 for reference in shown), metrics["l0"]]
    y = [*(reference.loss_recovered for reference in shown), metrics["loss_recovered"]]
    bottom, top = min(y), max(y)
    pad = 0.06 * (top - bottom)
    this = go.Scatter(
        x=[metrics["l0"]],
        y=[metrics["loss_recovered"]],
        mode="markers+text",
        text=["this SAE"],
        textposition="bottom center",
        textfont={"color": "var(--ink)", "size": 13},
        marker={"symbol": "star", "size": 17, "color": "var(--heat)", "line": {"color": "var(--ink)", "width": 1.5}},
        hovertext=["<br>".join(textwrap.wrap(_numbers(metrics), _WIDTH))],
        hovertemplate="<b>this SAE</b><br>%{hovertext}<extra></extra>",
    )
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000) if min(x) / 1.5 < tick < max(x) * 1.5]
    figure = styled_figure(
        [*_traces(shown), this],
        titled_axis("L0", type="log", tickvals=ticks, range=[math.log10(min(x) / 1.25), math.log10(max(x) * 1.25)]),
        titled_axis("loss recovered", tickformat=".0%", range=[bottom - 2 * pad, top + pad]),
        height=420,
    )
    without = len(references) - len(shown)
    caption = (
        f"{len(shown)} SAEs, published (grey) and of this project (coloured). Point at one for its numbers and their"
        f" source. {without} more are not drawn, because their sources give no loss recovered."
    )
    drawn = [size_of(reference.parameters) for reference in shown]
    return ReferenceFigure(
        figure, caption, tuple((size, sign, drawn.count(size)) for size, (_, sign) in _SYMBOLS.items())
    )


def _traces(references: Sequence[ReferenceSAE]) -> Iterator[go.Scatter]:
    """Yields the references as traces, one for each class of sizes and of this project or others."""
    for size, (symbol, _) in _SYMBOLS.items():
        for own in (False, True):
            chosen = [each for each in references if size_of(each.parameters) == size and each.own == own]
            if chosen:
                yield go.Scatter(
                    x=[each.l0 for each in chosen],
                    y=[each.loss_recovered for each in chosen],
                    mode="markers",
                    marker={
                        "symbol": symbol,
                        "size": 10,
                        "opacity": 0.8,
                        "color": "var(--accent)" if own else "var(--muted)",
                        "line": {"color": "var(--panel)", "width": 1},
                    },
                    hovertext=[_hover(each) for each in chosen],
                    hovertemplate="%{hovertext}<extra></extra>",
                    meta=size,
                )


def _hover(reference: ReferenceSAE) -> str:
    """Returns what is shown of a reference at its point."""
    width = "features: not said" if reference.d_sae is None else f"{reference.d_sae:,} features"
    tokens = "tokens: not said" if reference.training_tokens is None else f"{reference.training_tokens:,} tokens"
    lines = [
        f"{reference.model}, {reference.hook}",
        f"{width}, {tokens}",
        *textwrap.wrap(_numbers(vars(reference)), _WIDTH),
        *textwrap.wrap(reference.note, _WIDTH),
        *textwrap.wrap(reference.source, _WIDTH),
    ]
    return "<br>".join([f"<b>{escape(reference.name)}</b>", *map(escape, lines)])


def _numbers(values: Mapping[str, float | None]) -> str:
    """Returns the values that are known, each after its name."""
    known = [(name, metric, values[metric]) for metric, name in _NAMES.items() if values[metric] is not None]
    return ", ".join(f"{name} {format_value(metric, value)}" for name, metric, value in known)
