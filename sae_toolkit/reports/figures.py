"""The report's plots as plotly figures. Their colours are CSS variables, which the page's script resolves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from plotly import graph_objects as go

from sae_toolkit.evaluation.health import STANDARDS, Standard
from sae_toolkit.reports.tables import format_range, format_value


def make_figures(summary: Mapping[str, Any], plots: Mapping[str, Any]) -> list[tuple[str, str, go.Figure]]:
    """Returns the title, caption and figure of each plot; empty histograms are left out.

    Args:
        summary: content of evaluation.json.
        plots: as `render_html` takes them.
    """
    figures = [("Losses", *_losses(summary)), ("Dead features over tokens", *_silent_share(summary))]
    for name, title, histogram in (
        ("log10_firing_rate", "Firing rates", _firing_rates),
        ("l0", "Active features a token", _l0),
        ("decoder_cosine", "Largest decoder cosine", _cosines),
    ):
        if sum(plots[name][1]):
            figures.append((title, *histogram(summary, plots)))
    checkpoints = sorted(plots.get("checkpoints", ()), key=lambda checkpoint: checkpoint["tokens"])
    if checkpoints:
        x = titled_axis("tokens trained on", tickformat="~s", nticks=5)
        tokens = [checkpoint["tokens"] for checkpoint in checkpoints]
        figures += [
            (f"{s.title} over training", *_over(s, tokens, checkpoints, x, "after %{x:,} tokens")) for s in STANDARDS
        ]
    layers = sorted(plots.get("layers", ()), key=lambda layer: layer["layer"])
    if layers:
        numbers = [layer["layer"] for layer in layers]
        x = titled_axis("layer", tickvals=numbers)
        figures += [(f"{s.title} over layers", *_over(s, numbers, layers, x, "at layer %{x}")) for s in STANDARDS]
    return figures


def styled_figure(traces: Sequence[Any], x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Returns a figure with the look that all plots share.

    Args:
        traces: plotly's traces.
        x: settings of the x axis.
        y: settings of the y axis.
        layout: settings of the layout, in place of the shared ones.
    """
    axis: dict[str, Any] = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zerolinecolor": "var(--line)",
        "automargin": True,
        "fixedrange": True,
    }
    return go.Figure(
        traces,
        {
            "template": "none",
            "height": 270,
            "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--muted)"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"bgcolor": "var(--panel)", "font": {"color": "var(--ink)"}, "bordercolor": "var(--line)"},
            "showlegend": False,
            "dragmode": False,
            "xaxis": {"showgrid": False, **axis, **x},
            "yaxis": {**axis, **y},
            **layout,
        },
    )


def titled_axis(title: str, **axis: Any) -> dict[str, Any]:
    """Returns the settings of an axis: its title, and others by plotly's names."""
    return {"title": {"text": title, "font": {"size": 13}}, **axis}


def _line(axis: str, value: float, text: str, **label: Any) -> dict[str, Any]:
    """Returns a dashed line across the plot at a value of one axis, with a label."""
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": value,
        f"{axis}1": value,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": f"{other} domain",
        "line": {"color": "var(--ink)", "width": 1.5, "dash": "dash"},
        "label": {"text": text, "font": {"color": "var(--ink)", "size": 12}, **label},
    }


def _losses(summary: Mapping[str, Any]) -> tuple[str, go.Figure]:
    metrics = summary["metrics"]
    names = {"ce_zero": "hook zeroed", "ce_sae": "with the SAE", "ce_clean": "model alone"}
    values = [metrics[metric] for metric in names]
    bars = go.Bar(
        y=list(names.values()),
        x=values,
        orientation="h",
        marker_color=["var(--muted)", "var(--accent)", "var(--accent)"],
        marker_opacity=[0.6, 1, 0.6],
        text=[format_value("ce_sae", value) for value in values],
        textposition="outside",
        cliponaxis=False,
        textfont_color="var(--ink)",
        hovertemplate="%{y}: %{x:.3f} nats<extra></extra>",
    )
    end = max((value for value in values if value is not None), default=1) * 1.25
    caption = "Mean cross-entropy of the next token, in nats."
    if metrics["loss_recovered"] is not None:
        share = format_value("loss_recovered", metrics["loss_recovered"])
        caption += f" The SAE recovers {share} of the loss that zeros at the hook add."
    return caption, styled_figure([bars], titled_axis("nats", range=[0, end], showgrid=True), {"showgrid": False})


def _silent_share(summary: Mapping[str, Any]) -> tuple[str, go.Figure]:
    dead = summary["dead_feature_estimates"]
    tokens, shares = zip(*dead["curve"], strict=True)
    twice = dead["expected_at_twice_the_tokens"]
    look = {"color": "var(--accent)"}
    seen = go.Scatter(
        x=tokens,
        y=shares,
        mode="lines+markers",
        line=look,
        hovertemplate="%{y:.2%} silent after %{x:,} tokens<extra></extra>",
    )
    expected = go.Scatter(
        x=[tokens[-1], 2 * tokens[-1]],
        y=[shares[-1], twice],
        mode="lines+markers",
        line=look | {"dash": "dot"},
        marker={"symbol": ["circle", "circle-open"], "size": [6, 9]},
        hovertemplate="%{y:.2%} at %{x:,} tokens<extra></extra>",
    )
    top = max(0.02, *shares) * 1.08
    standard = next(s for s in STANDARDS if s.metric == "dead_features")
    lines = [
        _line("y", bounds[1], f"{name} up to {bounds[1]:.0%}", textposition="start", yanchor="bottom")
        for name, bounds in (("healthy", standard.healthy), ("borderline", standard.borderline))
        if bounds[1] < top
    ]
    ticks = [m * 10**e for e in range(2, 12) for m in (1, 3) if tokens[0] <= m * 10**e <= 2 * tokens[-1]]
    x = titled_axis(
        "tokens looked at",
        type="log",
        tickvals=ticks,
        tickformat="~s",
        range=[math.log10(tokens[0] * 0.85), math.log10(2 * tokens[-1] * 1.2)],
    )
    y = titled_axis("still silent", tickformat=".0%" if top > 0.05 else ".1%", range=[0, top])
    caption = (
        f"Share of features without one firing: {shares[-1]:.2%} after {tokens[-1]:,} tokens. The hollow point is"
        f" the share to expect after as many tokens again: {twice:.2%}."
    )
    return caption, styled_figure([seen, expected], x, y, shapes=lines)


def _bars(edges: Sequence[float], counts: Sequence[int], hover: Sequence[str]) -> go.Bar:
    return go.Bar(
        x=[(low + high) / 2 for low, high in pairwise(edges)],
        width=[high - low for low, high in pairwise(edges)],
        y=list(counts),
        hovertext=hover,
        hovertemplate="%{hovertext}: %{y:,}<extra></extra>",
        marker={"color": "var(--accent)", "line": {"color": "var(--panel)", "width": 1}},
    )


def _trimmed(histogram: tuple[Sequence[float], Sequence[int]]) -> tuple[Sequence[float], Sequence[int]]:
    """Returns a histogram without the empty bins at its ends."""
    edges, counts = histogram
    full = [i for i, count in enumerate(counts) if count]
    return edges[full[0] : full[-1] + 2], counts[full[0] : full[-1] + 1]


def _firing_rates(summary: Mapping[str, Any], plots: Mapping[str, Any]) -> tuple[str, go.Figure]:
    edges, counts = _trimmed(plots["log10_firing_rate"])
    hover = [f"{_rate(a)} to {_rate(b)}" for a, b in pairwise(edges)]
    first, last = math.floor(edges[0]), math.ceil(edges[-1])
    ticks = list(range(first, last + 1))
    x = titled_axis(
        "share of tokens that a feature fires on",
        tickvals=ticks,
        ticktext=[_rate(tick) for tick in ticks],
        range=[first - 0.1, last + 0.1],
    )
    never, d_sae = plots["never_fired"], summary["sae"]["d_sae"]
    caption = f"{sum(counts):,} features that fired; {never:,} of {d_sae:,} ({never / d_sae:.2%}) never did."
    return caption, styled_figure([_bars(edges, counts, hover)], x, titled_axis("features"))


def _rate(log10: float) -> str:
    """Returns 10**log10 as a percentage with one significant digit or more."""
    return f"{10**log10:.{max(0, math.ceil(-log10 - 2))}%}"


def _l0(summary: Mapping[str, Any], plots: Mapping[str, Any]) -> tuple[str, go.Figure]:
    edges, counts = _trimmed(plots["l0"])
    wholes = [(math.ceil(low), math.ceil(high) - 1) for low, high in pairwise(edges)]
    hover = [f"{low} active" if low == high else f"{low} to {high} active" for low, high in wholes]
    mean = summary["metrics"]["l0"]
    span = [max(edges[0] - 10, -0.5), edges[-1] + 10]  # wide enough if all tokens have the same number
    lines = [] if mean is None else [_line("x", mean, f"mean {mean:.1f}", **_beside_line(mean, span))]
    standard = next(s for s in STANDARDS if s.metric == "l0")
    caption = (
        f"{sum(counts):,} tokens by their number of active features. The standard of"
        f" {format_range(standard, standard.healthy)} is for the mean."
    )
    x = titled_axis("features active at once", range=span)
    return caption, styled_figure(
        [_bars(edges, counts, hover)], x, titled_axis("tokens", range=[0, 1.15 * max(counts)]), shapes=lines
    )


def _beside_line(value: float, span: Sequence[float]) -> dict[str, Any]:
    """Returns where to put the label of a vertical line: upright, on the side of the line with more room."""
    left = value > (span[0] + span[-1]) / 2
    return {
        "textangle": 0,
        "textposition": "end",
        "yanchor": "top",
        "xanchor": "right" if left else "left",
        "padding": 6,
    }


def _cosines(summary: Mapping[str, Any], plots: Mapping[str, Any]) -> tuple[str, go.Figure]:
    edges, counts = _trimmed(plots["decoder_cosine"])
    hover = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(edges)]
    cosines = summary["decoder_cosines"]
    random = cosines["random_directions"]
    span = [min(edges[0], random) - 0.03, max(edges[-1], random) + 0.03]
    lines = [_line("x", random, f"random directions {random:.3f}", **_beside_line(random, span))]
    caption = (
        f"Each feature's largest cosine to another one's decoder vector. Their mean is {cosines['mean']:.3f}; that of"
        f" as many random directions is {random:.3f}."
    )
    x = titled_axis("largest cosine to another feature", range=span)
    return caption, styled_figure(
        [_bars(edges, counts, hover)], x, titled_axis("features", range=[0, 1.15 * max(counts)]), shapes=lines
    )


def _over(
    standard: Standard,
    places: Sequence[int],
    measured: Sequence[Mapping[str, Any]],
    x: Mapping[str, Any],
    hover: str,
) -> tuple[str, go.Figure]:
    """Returns the caption and figure of one metric over several SAEs.

    Args:
        standard: standard of the metric.
        places: position of each SAE on the x axis, such as its layer.
        measured: mapping of each SAE that holds its `metrics`.
        x: settings of the x axis.
        hover: end of the text that is shown at a point.
    """
    values = [each["metrics"][standard.metric] for each in measured]
    known = [value for value in values if value is not None]
    low, high = standard.healthy
    ends = [*known, *(end for end in (low, high) if math.isfinite(end) and end >= 0)]
    pad = 0.08 * (max(ends) - min(ends)) or 0.1
    bottom, top = max(0, min(ends) - pad) if min(ends) >= 0 else min(ends) - pad, max(ends) + pad
    zone = {
        "type": "rect",
        "x0": 0,
        "x1": 1,
        "xref": "x domain",
        "y0": max(low, bottom),
        "y1": min(high, top),
        "fillcolor": "var(--good)",
        "opacity": 0.12,
        "line": {"width": 0},
        "layer": "below",
    }
    curve = go.Scatter(
        x=places,
        y=values,
        mode="lines+markers",
        line={"color": "var(--accent)"},
        hovertext=[format_value(standard.metric, value) for value in values],
        hovertemplate=f"%{{hovertext}} {hover}<extra></extra>",
    )
    percent = {"tickformat": ".0%"} if standard.metric in ("loss_recovered", "dead_features") else {}
    caption = f"Shaded: healthy, {format_range(standard, standard.healthy)}."
    return caption, styled_figure([curve], x, percent | {"range": [bottom, top]}, shapes=[zone])
