"""The report of a comparison: tables, a plot over L0, and the checkpoint of each SAE."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from rich.console import Group, RenderableType
from rich.text import Text

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.comparison.contenders import Contender, Outcome
from sae_toolkit.many_runs.comparison.learning_rates import Choice
from sae_toolkit.many_runs.comparison.ranking import ranking_note, ranking_table
from sae_toolkit.many_runs.page import (
    LEGEND,
    Table,
    count_healthy,
    front_trace,
    plot_over_l0,
    runs_page,
    terminal_table,
)
from sae_toolkit.reports.tables import MARKS, format_value, markdown_table

_WORST_FIRST = ("unhealthy", "unsettled", "borderline", "healthy")
_SYMBOLS = {"saelens": "circle", "sparsify": "diamond", "dictionary_learning": "square"}
_COLORS = {
    **{"standard": "#1f77b4", "topk": "#ff7f0e", "batchtopk": "#2ca02c", "jumprelu": "#d62728", "gated": "#9467bd"},
    **{"matryoshka": "#8c564b", "p_anneal": "#e377c2"},
}
_COLUMNS = [
    *(standard.title for standard in STANDARDS),
    *("Explained variance", "Healthy", "Learning rate", "Seconds", "Peak memory, GiB", "Parameters"),
]


def _by_contender(outcomes: Sequence[Outcome]) -> dict[tuple[Contender, int], list[Outcome]]:
    """Returns the outcomes by contender and target L0. The outcomes in one list differ only in the seed."""
    groups: dict[tuple[Contender, int], list[Outcome]] = {}
    order = list(dict.fromkeys(outcome.entry.contender for outcome in outcomes))
    for outcome in sorted(outcomes, key=lambda o: (order.index(o.entry.contender), o.entry.l0, o.entry.seed)):
        groups.setdefault((outcome.entry.contender, outcome.entry.l0), []).append(outcome)
    return groups


def _evaluations(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    return [outcome.evaluation for outcome in outcomes if outcome.evaluation]


def _metric(evaluations: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    values = (evaluation["metrics"][metric] for evaluation in evaluations)
    return [value for value in values if value is not None]


def _mean_and_spread(evaluations: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Returns the mean over the seeds, and the sample standard deviation where there are several."""
    values = _metric(evaluations, metric)
    mean = format_value(metric, statistics.mean(values) if values else None)
    return mean if len(values) <= 1 else f"{mean} ± {format_value(metric, statistics.stdev(values))}"


def summary_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns a row for each contender and L0: means over the seeds, their spread, and the mark of the worst seed."""
    rows = []
    for (contender, l0), group in _by_contender(outcomes).items():
        evaluations = _evaluations(group)
        if not evaluations:
            rows.append([contender.name, str(l0), *[""] * 5, "failed, see below", *[""] * 4])
            continue
        cells = []
        for standard in STANDARDS:
            statuses = {evaluation["health"][standard.metric] for evaluation in evaluations}
            worst = next(status for status in _WORST_FIRST if status in statuses)
            cells.append(f"{_mean_and_spread(evaluations, standard.metric)} {MARKS[worst]}")
        trained = [outcome.trained for outcome in group if outcome.evaluation and outcome.trained]
        peaks = [each["peak_bytes"] / 2**30 for each in trained if each["peak_bytes"]]
        rows.append(
            [
                contender.name,
                str(l0),
                *cells,
                _mean_and_spread(evaluations, "explained_variance"),
                " to ".join(sorted({count_healthy(evaluation["health"]) for evaluation in evaluations})),
                " to ".join(dict.fromkeys(_rate(outcome) for outcome in group if outcome.evaluation)),
                f"{statistics.mean(each['seconds'] for each in trained):.0f}",
                f"{statistics.mean(peaks):.2f}" if peaks else "not measured",
                f"{max(evaluation['sae']['parameters'] for evaluation in evaluations):,}",
            ]
        )
    return ["SAE", "Target L0", *_COLUMNS], rows


def _rate(outcome: Outcome) -> str:
    return "the library's own" if outcome.lr is None else f"{outcome.lr:.3g}"


def _choice_table(choices: Sequence[Choice]) -> Table:
    """Returns a row for each choice of a learning rate: those that were tried, and what they led to on other text."""
    rows = []
    for choice in choices:
        tried = []
        for outcome in choice.tried:
            measured = "failed"
            if outcome.evaluation:
                metrics = outcome.evaluation["metrics"]
                recovered, l0 = (format_value(name, metrics[name]) for name in ("loss_recovered", "l0"))
                measured = f"{recovered} at L0 {l0}"
            tried.append(f"{_rate(outcome)}: {measured}")
        chosen = _rate(choice.chosen) if choice.chosen else "none"
        border = f", the {choice.border} tried" if choice.border else ""
        rows.append([choice.contender.name_at(None), str(choice.l0), f"{chosen}{border}", "; ".join(tried)])
    return ["SAE", "Target L0", "Chosen", "Tried: loss recovered on validation text"], rows


def _checkpoint_table(outcomes: Sequence[Outcome], directory: Path) -> Table:
    """Returns a row for each trained SAE, with the path of its checkpoint relative to the comparison's directory."""
    rows = []
    for outcome in (outcome for group in _by_contender(outcomes).values() for outcome in group):
        if outcome.trained is None:
            continue
        evaluation, penalty = outcome.evaluation, outcome.trained.get("penalty")
        rows.append(
            [
                outcome.entry.contender.name,
                str(outcome.entry.l0),
                str(outcome.entry.seed),
                *(format_value(s.metric, evaluation["metrics"][s.metric]) if evaluation else "" for s in STANDARDS),
                count_healthy(evaluation["health"]) if evaluation else outcome.failed or "",
                "" if penalty is None else f"{penalty:.3g}, of {len(outcome.trained['tried'])} tried",
                os.path.relpath(outcome.trained["sae"], directory),
            ]
        )
    columns = ["SAE", "Target L0", "Seed", *(s.title for s in STANDARDS), "Healthy", "Penalty found", "Checkpoint"]
    return columns, rows


def _failures(outcomes: Sequence[Outcome], choices: Sequence[Choice]) -> list[str]:
    """Returns the reasons why SAEs could not be trained or evaluated, each with its contender, without duplicates."""
    tried = [outcome for choice in choices for outcome in choice.tried]
    failed = [outcome for outcome in (*outcomes, *tried) if outcome.failed]
    return list(dict.fromkeys(f"{o.entry.contender.name_at(o.entry.lr)}: {o.failed}" for o in failed))


def render_comparison(outcomes: Sequence[Outcome], choices: Sequence[Choice]) -> RenderableType:
    """Returns the tables for the terminal, followed by the failures."""
    tables = [("", summary_table(outcomes)), *_tables(outcomes, choices)]
    parts: list[RenderableType] = []
    for heading, table in tables:
        parts += [Text(f"\n{heading}", "bold")] * bool(heading) + [terminal_table(table, names_first=True)]
        parts += [] if heading else [Text(LEGEND)]
    return Group(*parts, Text(ranking_note(outcomes)), *(Text(line, "yellow") for line in _failures(outcomes, choices)))


def _tables(outcomes: Sequence[Outcome], choices: Sequence[Choice]) -> list[tuple[str, Table]]:
    """Returns the tables beside the summary, with their headings: the choices of learning rates, and the ranking."""
    of_choices = [("Learning rates that were tried", _choice_table(choices))] if choices else []
    return [*of_choices, ("First at each L0", ranking_table(outcomes))]


def write_comparison(
    outcomes: Sequence[Outcome], choices: Sequence[Choice], directory: Path, notes: Sequence[str]
) -> Path:
    """Writes comparison.json, comparison.md and comparison.html, and returns the path of the last.

    Args:
        outcomes: the outcomes of all SAEs.
        choices: the choices of learning rates.
        directory: the directory of the comparison.
        notes: paragraphs that say how the SAEs were trained and measured.
    """
    tried = {
        (choice.contender, choice.l0): [
            {
                "lr": outcome.lr,
                "seed": outcome.entry.seed,
                "validation_metrics": outcome.evaluation and outcome.evaluation["metrics"],
                "failed": outcome.failed,
                "chosen": outcome is choice.chosen,
            }
            for outcome in choice.tried
        ]
        for choice in choices
    }
    content = [
        {
            "contender": asdict(outcome.entry.contender),
            "l0": outcome.entry.l0,
            "seed": outcome.entry.seed,
            "learning_rates": tried.get((outcome.entry.contender, outcome.entry.l0)),
            "trained": outcome.trained,
            "metrics": outcome.evaluation and outcome.evaluation["metrics"],
            "health": outcome.evaluation and outcome.evaluation["health"],
            "failed": outcome.failed,
        }
        for outcome in outcomes
    ]
    (directory / "comparison.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    title = f"Comparison {directory.name}"
    summary = summary_table(outcomes)
    tables = [*_tables(outcomes, choices), ("Checkpoints", _checkpoint_table(outcomes, directory))]
    failures = _failures(outcomes, choices)
    parts = [f"# {title}", *notes, "\n".join(markdown_table(*summary)), f"{LEGEND}.", *failures]
    parts += [part for heading, table in tables for part in (f"## {heading}", "\n".join(markdown_table(*table)))]
    parts.insert(parts.index("## Checkpoints"), ranking_note(outcomes))
    (directory / "comparison.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page = directory / "comparison.html"
    lead = "".join(f"<p>{escape(note)}</p>" for note in notes)
    notes_below = [f"First at each L0: {ranking_note(outcomes)}", *failures]
    html = runs_page(title, lead, _figure(outcomes), [("", summary), *tables], notes_below, names_first=True)
    page.write_text(html, encoding="utf-8")
    return page


def _figure(outcomes: Sequence[Outcome]) -> go.Figure:
    """Returns a plot with a line for each contender through its L0s, and the Pareto front of all contenders."""
    lines: dict[Contender, list[tuple[float, float, float, int]]] = {}
    for (contender, target), group in _by_contender(outcomes).items():
        l0s, recovered = (_metric(_evaluations(group), metric) for metric in ("l0", "loss_recovered"))
        if l0s and recovered:
            spread = statistics.stdev(recovered) if len(recovered) > 1 else 0.0
            point = statistics.mean(l0s), statistics.mean(recovered), spread, target
            lines.setdefault(contender, []).append(point)
    points = [(l0, recovered) for line in lines.values() for l0, recovered, *_ in line]
    figure = plot_over_l0([front_trace(points), *(_trace(contender, line) for contender, line in lines.items())])
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    # A phone shows the legend in one column, which takes a row for each contender.
    figure.update_layout(margin={"t": 30}, height=560 + 14 * len(lines))
    _scale_l0_axis(figure, [l0 for l0, _ in points if l0 > 0])
    return figure


def _trace(contender: Contender, line: Sequence[tuple[float, float, float, int]]) -> go.Scatter:
    """Returns the line of a contender.

    Args:
        line: mean L0, mean of loss recovered, its standard deviation and the target L0, for each target.
    """
    color, has_own_lr = _COLORS[contender.architecture], bool(contender.lr or contender.rates)
    return go.Scatter(
        x=[l0 for l0, *_ in line],
        y=[recovered for _, recovered, *_ in line],
        error_y={"array": [spread for *_, spread, _ in line], "visible": any(s for *_, s, _ in line)},
        mode="lines+markers",
        marker={"symbol": _SYMBOLS[contender.library] + "-open" * has_own_lr, "size": 9, "color": color},
        line={"width": 1, "color": color, "dash": "dot" if has_own_lr else "solid"},
        name=contender.name,
        text=[f"target {target}" for *_, target in line],
        hovertemplate=f"{escape(contender.name)}, %{{text}}<br>L0 %{{x:.1f}}<br>%{{y:.2%}}<extra></extra>",
    )


def _scale_l0_axis(figure: go.Figure, l0s: Sequence[float]) -> None:
    """Makes the axis logarithmic if the L0s differ by more than a factor of 4."""
    if l0s and max(l0s) > 4 * min(l0s):
        healthy = next(standard for standard in STANDARDS if standard.metric == "l0").healthy
        low, high = (math.log10(f([*l0s, *healthy])) for f in (min, max))
        ticks = [5 * 2**n for n in range(12)]  # 10, 20, 40, ... as people choose L0s
        figure.update_xaxes(type="log", range=[low - 0.1, high + 0.1], tickvals=ticks)
