"""An evaluation as one HTML file that opens without a network, and as Markdown to paste."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from sae_toolkit.evaluation.feature_browser import Feature
from sae_toolkit.evaluation.health import STANDARDS, Standard
from sae_toolkit.reports.figures import make_figures
from sae_toolkit.reports.tables import (
    MARKS,
    beside_rows,
    format_interval,
    format_range,
    format_value,
    health_table,
    in_markdown,
    markdown_table,
    verdict,
)

_TEMPLATE = Path(__file__).with_name("page.html")
# How far the scale of a standard is drawn, where the value lies on it.
_SCALE_ENDS = {"loss_recovered": 1.0, "l0": 240.0, "dead_features": 0.4, "decoder_absorption": 0.6}


def render_html(summary: Mapping[str, Any], plots: Mapping[str, Any], features: Sequence[Feature]) -> str:
    """The report as one page.

    Args:
        summary: the content of evaluation.json.
        plots: `log10_firing_rate`, `l0` and `decoder_cosine`, histograms as edges [n + 1] and counts [n];
            `never_fired`, a number of features; and, for the curves of a run, `checkpoints`: each one's
            `tokens` and `metrics`; for those over layers, `layers`: each one's `layer` and `metrics`.
        features: for the feature browser.

    Returns:
        HTML to be saved as UTF-8: the numbers as tables, and what needs scripts (plots, feature browser) as data.
    """
    figures = make_figures(summary, plots)
    data = {
        "figures": [json.loads(figure.to_json()) for _, _, figure in figures],
        "features": [asdict(feature) for feature in features],
    }
    health = summary["health"]
    parts = {
        "title": escape(summary["sae"]["name"]),
        "subtitle": escape(_subtitle(summary)),
        "verdict": escape(verdict(health)),
        "verdict_status": _overall_status(health),
        "diagnosis": _diagnosis(summary),
        "cards": "".join(_card(standard, summary) for standard in STANDARDS),
        "measured_on": "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _measured_on(summary)),
        "beside": "".join(_table_row(row) for row in beside_rows(summary)),
        "saebench": "".join(
            f"<details><summary>{escape(title)}</summary><table>{''.join(map(_table_row, rows))}</table></details>"
            for title, rows in _saebench(summary)
        ),
        "plots": "".join(
            f'<figure><h3>{escape(title)}</h3><div class="plot"></div><figcaption>{escape(text)}</figcaption></figure>'
            for title, text, _ in figures
        ),
        "n_features": str(len(features)),
        "data": _json_in_script(data),
        "plotly": _packed_plotly(),
    }
    # In one pass: what is put in is not searched for further names.
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _TEMPLATE.read_text(encoding="utf-8"))


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The verdict, the numbers and what they were measured on."""
    return "\n".join(
        [
            f"# {in_markdown(summary['sae']['name'])}",
            "",
            f"**{verdict(summary['health'])}**",
            "",
            *markdown_table(*health_table(summary)),
            *(
                ["", "## Why, and what to change first", "", *_diagnosis_in_markdown(summary)]
                if summary.get("diagnosis")
                else []
            ),
            "",
            *markdown_table(("Beside them", "Value", "95% interval"), beside_rows(summary)),
            "",
            *(f"- {title}: {in_markdown(text)}" for title, text in _measured_on(summary)),
            "",
            *(
                line
                for title, rows in _saebench(summary)
                for line in (f"## {title}", "", *markdown_table(("Metric", "Value"), rows), "")
            ),
        ]
    )


def _diagnosis_in_markdown(summary: Mapping[str, Any]) -> Iterator[str]:
    for number, finding in enumerate(summary["diagnosis"], 1):
        yield f"{number}. **{in_markdown(finding['cause'])}**: {in_markdown(finding['says'])}"
        yield f"   `{finding['command']}`"


def _diagnosis(summary: Mapping[str, Any]) -> str:
    """A list of causes, the first thing to change first; nothing where there is none to say."""
    if not summary.get("diagnosis"):
        return ""
    items = "".join(
        f"<li><strong>{escape(finding['cause'])}</strong>: {escape(finding['says'])}"
        f"<pre><code>{escape(finding['command'])}</code></pre></li>"
        for finding in summary["diagnosis"]
    )
    return f'<section class="diagnosis"><h2>Why, and what to change first</h2><ol>{items}</ol></section>'


def _json_in_script(data: Any) -> str:
    """JSON that no text in it can end the script element of, without NaN, in 4 significant digits."""
    return json.dumps(_rounded(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.4g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return data


@functools.cache
def _packed_plotly() -> str:
    """plotly.js (MIT licence, which it carries) as base64 of gzip, 2 MB in place of 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _subtitle(summary: Mapping[str, Any]) -> str:
    sae = summary["sae"]
    return (
        f"{sae['architecture']}, {sae['d_sae']:,} features on {sae['d_in']:,} dimensions,"
        f" {summary['hook_name']} of {summary['model']}"
    )


def _overall_status(health: Mapping[str, Any]) -> str:
    statuses = {health[standard.metric] for standard in STANDARDS}
    return next(s for s in ("unhealthy", "unsettled", "borderline", "healthy") if s in statuses)


def _card(standard: Standard, summary: Mapping[str, Any]) -> str:
    """One health metric: its value, its status in words, and where it lies on the scale of its standard."""
    metric, status = standard.metric, summary["health"][standard.metric]
    value = summary["metrics"][metric]
    interval = format_interval(metric, summary)
    shown = "exact" if interval == "exact" else f"95%: {interval}" if interval else ""
    if metric == "dead_features":
        shown = f"over {summary['dead_feature_estimates']['tokens']:,} tokens"
    return (
        f'<article class="card {status}"><h3>{standard.title}</h3>'
        f'<p class="value">{format_value(metric, value)}</p>'
        f'<p class="status">{MARKS[status]} {status}</p><p class="interval">{shown}</p>'
        f"{_scale(standard, value, summary['intervals'].get(metric))}"
        f'<p class="ranges">healthy {escape(format_range(standard, standard.healthy))}<br>'
        f"borderline {escape(format_range(standard, standard.borderline))}</p></article>"
    )


def _scale(standard: Standard, value: float | None, interval: Sequence[float] | None) -> str:
    points = [p for p in (value, *(interval or ())) if p is not None]
    low, high = min([0.0, *points]), max([_SCALE_ENDS[standard.metric], *points])

    def span(kind: str, start: float, end: float) -> str:
        left, right = ((min(max(x, low), high) - low) / (high - low) * 100 for x in (start, end))
        return f'<i class="{kind}" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'

    spans = [span("borderline-zone", *standard.borderline), span("healthy-zone", *standard.healthy)]
    if interval:
        spans.append(span("whisker", *interval))
    if value is not None:
        spans.append(span("marker", value, value))
    return f'<div class="scale" aria-hidden="true">{"".join(spans)}</div>'


def _measured_on(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    sae, dataset = summary["sae"], summary["dataset"]
    which = "documents held out of training" if summary["held_out"] else f"split {summary['dataset_split']}"
    config = f", {summary['dataset_config']}" if summary["dataset_config"] else ""
    fallback = f", in place of {summary['fallback_from']}" if summary["fallback_from"] else ""
    rows = [
        ("SAE", f"{sae['path']} ({sae['library']}, {sae['form']})"),
        ("Shape", f"{sae['architecture']}, {sae['d_sae']:,} features on {sae['d_in']:,} dimensions"),
        ("Model and hook", f"{summary['model']}, {summary['hook_name']}"),
        ("Text", f"{dataset}{config}{fallback}, {which}"),
        ("Contexts", f"{summary['context_length']:,} tokens each"),
        ("Tokens", f"{summary['tokens']:,} in {summary['sequences']:,} sequences"),
        ("Tokens for the losses", f"{summary['loss_tokens']:,} in {summary['loss_sequences']:,} sequences"),
        ("Tokens for dead features", f"{summary['dead_feature_estimates']['tokens']:,}"),
    ]
    if (positions := summary["positions"]) is None:
        where = "the SAE stands in at every position (SAEBench's protocol)"
    else:
        skipped, limit = positions["skip_positions"], positions["max_activation_norm"]
        n_special = len(positions["special_token_ids"])
        without = [
            f"{n_special} special tokens" if n_special else "",
            f"the first {'position' if skipped == 1 else f'{skipped} positions'} of a context" if skipped else "",
            f"activations of a norm above {limit:,.0f}" if limit else "",
        ]
        where = f"without {', '.join(filter(None, without))}" if any(without) else "all"
    rows.append(("Intervals", f"95%, bootstrap over {summary['interval_units']}"))
    return [*rows, ("Positions", where), ("SAELens", summary["sae_lens_version"])]


def _table_row(cells: Sequence[str]) -> str:
    first, *others = map(escape, cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _saebench(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Tables of SAEBench's metrics under its own names: title, rows of name and value."""
    tables = {"SAEBench's core metrics, measured here": summary.get("saebench_core")}
    tables |= {f"sae-bench itself: {name}": results for name, results in summary.get("saebench", {}).items()}
    for title, results in tables.items():
        if results:
            yield title, [(name, f"{value:.6g}") for name, value in _numbers(results)]


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield name, value
