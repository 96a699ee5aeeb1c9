"""What a comparison found: a table, the plot over L0, and where each SAE lies."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.comparison.contenders import Contender, Entry
from sae_toolkit.many_runs.page import front_trace, legend, over_l0, runs_page
from sae_toolkit.many_runs.processes import pareto_front
from sae_toolkit.reports.tables import MARKS, format_value, markdown_table

_WORST_FIRST = ("unhealthy", "unsettled", "borderline", "healthy")
_SYMBOLS = {"saelens": "circle", "sparsify": "diamond", "dictionary_learning": "square"}
_COLORS = {
    **{"standard": "#1f77b4", "topk": "#ff7f0e", "batchtopk": "#2ca02c", "jumprelu": "#d62728", "gated": "#9467bd"},
    **{"matryoshka": "#8c564b", "p_anneal": "#e377c2"},
}
_COLUMNS = [
    *(standard.title for standard in STANDARDS),
    *("Explained variance", "Healthy", "Seconds", "Peak memory, GiB", "Parameters"),
]


@dataclass(frozen=True)
class Outcome:
    """What one SAE of a comparison came to.

    Args:
        entry: which.
        trained: from `Entry.trained`; None where it could not be trained.
        evaluation: from `Entry.evaluation`; None where it could not be evaluated.
        failed: why it could not.
    """

    entry: Entry
    trained: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    failed: str | None


Groups = dict[tuple[Contender, int], list[Outcome]]


def by_contender(outcomes: Sequence[Outcome]) -> Groups:
    """Outcomes that differ in the seed alone, by contender and L0."""
    groups: Groups = {}
    order = list(dict.fromkeys(outcome.entry.contender for outcome in outcomes))
    for outcome in sorted(outcomes, key=lambda o: (order.index(o.entry.contender), o.entry.l0, o.entry.seed)):
        groups.setdefault((outcome.entry.contender, outcome.entry.l0), []).append(outcome)
    return groups


def _metric(outcomes: Sequence[Outcome], name: str) -> list[float]:
    values = [o.evaluation["metrics"][name] for o in outcomes if o.evaluation]
    return [value for value in values if value is not None]


def _mean_and_spread(values: Sequence[float], form: str) -> str:
    """Mean, and the sample standard deviation where there are several."""
    if not values:
        return "no number"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def _form(metric: str) -> str:
    return {"loss_recovered": ".2%", "dead_features": ".2%", "l0": ".1f"}.get(metric, ".3f")


def summary_table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """A row for each contender and L0: means over the seeds, with their spread, and the mark of the worst seed."""
    rows = []
    for (contender, l0), group in by_contender(outcomes).items():
        evaluated = [outcome for outcome in group if outcome.evaluation]
        if not evaluated:
            rows.append([contender.name, str(l0), *[""] * 5, "failed, see below", "", "", ""])
            continue
        cells = []
        for standard in STANDARDS:
            statuses = {o.evaluation["health"][standard.metric] for o in evaluated if o.evaluation}
            worst = next(status for status in _WORST_FIRST if status in statuses)
            cells.append(
                f"{_mean_and_spread(_metric(evaluated, standard.metric), _form(standard.metric))} {MARKS[worst]}"
            )
        trained = [o.trained for o in evaluated if o.trained]
        counts = sorted({_healthy(o.evaluation) for o in evaluated if o.evaluation})
        peaks = [t["peak_bytes"] / 2**30 for t in trained if t["peak_bytes"]]
        parameters = {o.evaluation["sae"]["parameters"] for o in evaluated if o.evaluation}
        rows.append(
            [
                contender.name,
                str(l0),
                *cells,
                _mean_and_spread(_metric(evaluated, "explained_variance"), ".3f"),
                " to ".join(counts),
                f"{statistics.mean(t['seconds'] for t in trained):.0f}",
                f"{statistics.mean(peaks):.2f}" if peaks else "not measured",
                f"{max(parameters):,}",
            ]
        )
    return ["SAE", "Target L0", *_COLUMNS], rows


def _healthy(evaluation: Mapping[str, Any]) -> str:
    health = evaluation["health"]
    return "?" if health["healthy"] is None else f"{health['healthy']}/{health['of']}"


def checkpoint_table(outcomes: Sequence[Outcome], directory: Path) -> tuple[list[str], list[list[str]]]:
    """A row for each SAE that was trained, with where it lies, seen from the comparison's directory."""
    rows = []
    for group in by_contender(outcomes).values():
        for outcome in group:
            if outcome.trained is None:
                continue
            metrics = outcome.evaluation["metrics"] if outcome.evaluation else {}
            penalty = outcome.trained.get("penalty")
            rows.append(
                [
                    outcome.entry.contender.name,
                    str(outcome.entry.l0),
                    str(outcome.entry.seed),
                    *(format_value(s.metric, metrics[s.metric]) if metrics else "" for s in STANDARDS),
                    _healthy(outcome.evaluation) if outcome.evaluation else outcome.failed or "",
                    "" if penalty is None else f"{penalty:.3g}, of {len(outcome.trained['tried'])} tried",
                    os.path.relpath(outcome.trained["sae"], directory),
                ]
            )
    columns = ["SAE", "Target L0", "Seed", *(s.title for s in STANDARDS), "Healthy", "Penalty found", "Checkpoint"]
    return columns, rows


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Why some could not be trained or evaluated, each reason once."""
    return list(dict.fromkeys(f"{o.entry.contender.name}: {o.failed}" for o in outcomes if o.failed))


def render_comparison(outcomes: Sequence[Outcome]) -> RenderableType:
    """The table for the terminal."""
    columns, rows = summary_table(outcomes)
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for row in rows:
        table.add_row(*row)
    return Group(table, Text(legend()), *(Text(line, "yellow") for line in failures(outcomes)))


def write_comparison(outcomes: Sequence[Outcome], directory: Path, notes: Sequence[str]) -> Path:
    """Writes comparison.json, comparison.md and comparison.html; returns the last.

    Args:
        outcomes: of all SAEs.
        directory: of the comparison.
        notes: what the numbers are of, a paragraph each.
    """
    content = [
        {
            "contender": asdict(outcome.entry.contender),
            "l0": outcome.entry.l0,
            "seed": outcome.entry.seed,
            "trained": outcome.trained,
            "metrics": outcome.evaluation and outcome.evaluation["metrics"],
            "health": outcome.evaluation and outcome.evaluation["health"],
            "failed": outcome.failed,
        }
        for outcome in outcomes
    ]
    (directory / "comparison.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    title = f"Comparison {directory.name}"
    tables = [("", summary_table(outcomes)), ("Checkpoints", checkpoint_table(outcomes, directory))]
    why = failures(outcomes)
    parts = [f"# {title}", *notes, "\n".join(markdown_table(*tables[0][1])), f"{legend()}.", *why]
    parts += ["## Checkpoints", "\n".join(markdown_table(*tables[1][1]))]
    (directory / "comparison.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page = directory / "comparison.html"
    lead = "".join(f"<p>{escape(note)}</p>" for note in notes)
    page.write_text(runs_page(title, lead, comparison_figure(outcomes), tables, why, words=True), encoding="utf-8")
    return page


def comparison_figure(outcomes: Sequence[Outcome]) -> go.Figure:
    """Loss recovered over L0, a line for each contender through its L0s, and the Pareto front of all."""
    lines: dict[Contender, list[tuple[float, float, float, int]]] = {}
    for (contender, target), group in by_contender(outcomes).items():
        l0s, recovered = _metric(group, "l0"), _metric(group, "loss_recovered")
        if l0s and recovered:
            spread = statistics.stdev(recovered) if len(recovered) > 1 else 0.0
            point = statistics.mean(l0s), statistics.mean(recovered), spread, target
            lines.setdefault(contender, []).append(point)
    points = [(l0, recovered) for line in lines.values() for l0, recovered, *_ in line]
    traces = [front_trace([points[i] for i in pareto_front(points)])]
    for contender, line in lines.items():
        traces.append(
            go.Scatter(
                x=[l0 for l0, *_ in line],
                y=[recovered for _, recovered, *_ in line],
                error_y={"array": [spread for *_, spread, _ in line], "visible": any(s for *_, s, _ in line)},
                mode="lines+markers",
                marker={
                    "symbol": _SYMBOLS[contender.library] + ("" if contender.lr is None else "-open"),
                    "size": 9,
                    "color": _COLORS[contender.architecture],
                },
                line={
                    "width": 1,
                    "color": _COLORS[contender.architecture],
                    "dash": "solid" if contender.lr is None else "dot",
                },
                name=contender.name,
                text=[f"target {target}" for *_, target in line],
                hovertemplate=f"{escape(contender.name)}, %{{text}}<br>L0 %{{x:.1f}}<br>%{{y:.2%}}<extra></extra>",
            )
        )
    figure = over_l0(traces)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    figure.update_layout(margin={"t": 30}, height=560 + 14 * len(lines))  # a phone shows the legend's rows one by one
    spans = [l0 for l0, *_ in points if l0 > 0]
    if spans and max(spans) > 4 * min(spans):
        figure.update_xaxes(type="log")
        healthy = next(standard for standard in STANDARDS if standard.metric == "l0").healthy
        low, high = (math.log10(f(spans + list(healthy))) for f in (min, max))
        ticks = [5 * 2**n for n in range(12)]  # L0s as one asks for them: 10, 20, 40, ...
        figure.update_xaxes(range=[low - 0.1, high + 0.1], tickvals=ticks)
    return figure
