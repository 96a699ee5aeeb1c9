"""Renders an evaluation as a single HTML file that opens without a network, and as Markdown."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from sae_toolkit.evaluation.feature_browser import Feature
from sae_toolkit.evaluation.health import STANDARDS, Standard
from sae_toolkit.evaluation.saebench.reliability import reliability_note
from sae_toolkit.reports.figures import make_figures
from sae_toolkit.reports.further import further_tables
from sae_toolkit.reports.reference_figure import reference_figure
from sae_toolkit.reports.references import references_table
from sae_toolkit.reports.tables import (
    MARKS,
    beside_rows,
    documents,
    first_position_note,
    format_interval,
    format_range,
    format_value,
    health_table,
    in_markdown,
    markdown_table,
    place,
    positions,
    shape,
    verdict,
)

# Right end of the scale that is drawn for a standard, unless the value lies beyond it.
_SCALE_ENDS = {"loss_recovered": 1.0, "l0": 240.0, "dead_features": 0.4, "decoder_absorption": 0.6}
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
_TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}


def render_html(
    summary: Mapping[str, Any],
    plots: Mapping[str, Any],
    features: Sequence[Feature],
    of_features: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Returns the report as one HTML page, to be saved as UTF-8.

    The numbers are in HTML tables. A script in the page draws the plots and the feature browser from data in the page.

    Args:
        summary: content of evaluation.json.
        plots: `log10_firing_rate`, `l0` and `decoder_cosine` are histograms: edges [n + 1] and counts [n].
            `never_fired` is a number of features. Optional: `checkpoints`, with the `tokens` and `metrics` of each
            checkpoint of a run, and `layers`, with the `layer` and `metrics` of SAEs at several layers.
        features: features for the feature browser.
        of_features: numbers for each feature of the SAE [F], by the title that the browser shows them under.
    """
    figures = make_figures(summary, plots)
    references = reference_figure(summary)
    data = {
        "figures": [json.loads(figure.to_json()) for _, _, figure in figures],
        "references": references and json.loads(references.figure.to_json()),
        "features": [
            asdict(feature)
            | {"measured": {title: values_F[feature.index].item() for title, values_F in (of_features or {}).items()}}
            for feature in features
        ],
    }
    health = summary["health"]
    return _TEMPLATES.get_template("page.html").render(
        summary=summary,
        subtitle=f"{shape(summary)}, {summary['hook_name']} of {summary['model']}",
        verdict=verdict(summary),
        note=first_position_note(summary),
        verdict_status=_worst_status(health),
        cards=[_card(standard, summary) for standard in STANDARDS],
        measured_on=_measured_on(summary),
        beside=beside_rows(summary),
        saebench=list(_saebench(summary)),
        references=references,
        references_table=references_table(summary),
        further=further_tables(summary),
        figures=figures,
        n_features=len(features),
        data=_rounded(data),
        plotly=_packed_plotly(),
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Returns the verdict, the numbers and what they were measured on, as Markdown."""
    return "\n".join(
        [
            f"# {in_markdown(summary['sae']['name'])}",
            "",
            f"**{verdict(summary)}**",
            "",
            *([in_markdown(note), ""] if (note := first_position_note(summary)) else []),
            *markdown_table(*health_table(summary)),
            *_diagnosis_in_markdown(summary),
            "",
            *markdown_table(("Beside them", "Value", "95% interval"), beside_rows(summary)),
            "",
            *(f"- {title}: {in_markdown(text)}" for title, text in _measured_on(summary)),
            "",
            *(
                line
                for title, rows, note in _saebench(summary)
                for line in (
                    f"## {title}",
                    "",
                    *([in_markdown(note), ""] if note else []),
                    *markdown_table(("Metric", "Value"), rows),
                    "",
                )
            ),
            *(
                line
                for shown in (references_table(summary), *further_tables(summary))
                if shown is not None
                for line in (
                    f"## {shown.title}",
                    "",
                    *markdown_table(shown.columns, shown.rows),
                    "",
                    in_markdown(shown.how_to_read),
                    "",
                )
            ),
        ]
    )


def _diagnosis_in_markdown(summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary.get("diagnosis"):
        return
    yield from ("", "## Why, and what to change first", "")
    for number, finding in enumerate(summary["diagnosis"], 1):
        yield f"{number}. **{in_markdown(finding['cause'])}**: {in_markdown(finding['says'])}"
        yield f"   `{finding['command']}`"


def _rounded(data: Any) -> Any:
    """Returns data as JSON stores it, with floats rounded to 4 significant digits and None for NaN and infinity."""
    return json.loads(
        json.dumps(data), parse_float=lambda digits: float(f"{float(digits):.4g}"), parse_constant=lambda _: None
    )


@functools.cache
def _packed_plotly() -> str:
    """Returns plotly.js as base64 of gzip, 2 MB instead of 4.8. Its MIT licence is part of the file."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _worst_status(health: Mapping[str, Any]) -> str:
    statuses = {health[standard.metric] for standard in STANDARDS}
    return next(s for s in ("unhealthy", "unsettled", "borderline", "healthy") if s in statuses)


def _card(standard: Standard, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the page shows for one health metric: value, status, interval, ranges and scale."""
    metric, status = standard.metric, summary["health"][standard.metric]
    value = summary["metrics"][metric]
    interval = format_interval(metric, summary)
    shown = f"95%: {interval}" if interval and interval != "exact" else interval
    if metric == "dead_features":
        shown = f"over {summary['dead_feature_estimates']['tokens']:,} tokens"
    return {
        "title": standard.title,
        "value": format_value(metric, value),
        "status": status,
        "mark": MARKS[status],
        "interval": shown,
        "scale": _scale(standard, value, summary["intervals"].get(metric)),
        "healthy": format_range(standard, standard.healthy),
        "borderline": format_range(standard, standard.borderline),
    }


def _scale(standard: Standard, value: float | None, interval: Sequence[float] | None) -> list[tuple[str, str, str]]:
    """Returns the parts of a standard's scale, each as its CSS class, its left end and its width, both in percent."""
    points = [p for p in (value, *(interval or ())) if p is not None]
    low, high = min([0.0, *points]), max([_SCALE_ENDS[standard.metric], *points])
    spans = [("borderline-zone", *standard.borderline), ("healthy-zone", *standard.healthy)]
    if interval:
        spans.append(("whisker", interval[0], interval[1]))
    if value is not None:
        spans.append(("marker", value, value))
    parts = []
    for kind, *ends in spans:
        left, right = ((min(max(end, low), high) - low) / (high - low) * 100 for end in ends)
        parts.append((kind, f"{left:.2f}", f"{right - left:.2f}"))
    return parts


def _measured_on(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns titles and descriptions of the SAE, the model and the text."""
    sae = summary["sae"]
    config = f", {summary['dataset_config']}" if summary["dataset_config"] else ""
    fallback = f", in place of {summary['fallback_from']}" if summary["fallback_from"] else ""
    return [
        ("SAE", f"{sae['path']} ({sae['library']}, {sae['form']})"),
        ("Shape", shape(summary)),
        ("Model and hook", f"{summary['model']}, {place(summary)}"),
        ("Text", f"{summary['dataset']}{config}{fallback}, {documents(summary)}"),
        ("Contexts", f"{summary['context_length']:,} tokens each"),
        ("Tokens", f"{summary['tokens']:,} in {summary['sequences']:,} sequences"),
        ("Tokens for the losses", f"{summary['loss_tokens']:,} in {summary['loss_sequences']:,} sequences"),
        ("Tokens for dead features", f"{summary['dead_feature_estimates']['tokens']:,}"),
        ("Intervals", f"95%, bootstrap over {summary['interval_units']}"),
        ("Positions", positions(summary)),
        ("SAELens", summary["sae_lens_version"]),
    ]


def _saebench(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]], str | None]]:
    """Yields tables of SAEBench's metrics under its own names: a title, rows of name and value, and a note."""
    tables: list[tuple[str, Any, str | None]] = [
        ("SAEBench's core metrics, measured here", summary.get("saebench_core"), None)
    ]
    tables += [
        (f"sae-bench itself: {name}", results, reliability_note([name]))
        for name, results in summary.get("saebench", {}).items()
    ]
    for title, results, note in tables:
        if results:
            yield title, [(name, f"{value:.6g}") for name, value in _numbers(results)], note


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers in nested mappings, with their names."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield name, value
