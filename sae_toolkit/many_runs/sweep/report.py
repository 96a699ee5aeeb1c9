"""The report of a sweep: a table, the Pareto front, and the command of the best trial."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from rich.console import Group, RenderableType
from rich.text import Text

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.page import (
    LEGEND,
    count_healthy,
    front_trace,
    pareto_front,
    plot_over_l0,
    runs_page,
    terminal_table,
)
from sae_toolkit.many_runs.sweep.trials import Trial, measured_otherwise
from sae_toolkit.reports.tables import MARKS, format_value, markdown_table

Outcomes = Sequence[tuple[Trial, Mapping[str, Any]]]  # from `run_trials`


def best_first(outcomes: Outcomes) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Returns the evaluated trials, ordered by the number of healthy metrics, then by loss recovered."""
    return sorted(
        (pair for pair in outcomes if "metrics" in pair[1]),
        key=lambda pair: (pair[1]["n_healthy"], pair[1]["metrics"]["loss_recovered"] or -math.inf),
        reverse=True,
    )


def trials_on_front(outcomes: Outcomes) -> list[int]:
    """Returns the numbers of the trials on the Pareto front of low L0 and high loss recovered, ordered by L0."""
    measured = _measured(outcomes)
    return [measured[i][0].number for i in pareto_front(_points(measured))]


def _measured(outcomes: Outcomes) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Returns the trials whose L0 and loss recovered could both be measured, each with its metrics."""
    evaluated = ((trial, outcome["metrics"]) for trial, outcome in outcomes if "metrics" in outcome)
    return [(trial, metrics) for trial, metrics in evaluated if None not in (metrics["l0"], metrics["loss_recovered"])]


def _points(measured: Sequence[tuple[Trial, Mapping[str, Any]]]) -> list[tuple[float, float]]:
    return [(metrics["l0"], metrics["loss_recovered"]) for _, metrics in measured]


def render_sweep(outcomes: Outcomes) -> RenderableType:
    """Returns the table for the terminal, followed by the command of the best trial."""
    parts: list[RenderableType] = [terminal_table(sweep_table(outcomes), names_first=False), Text(LEGEND)]
    if best := best_first(outcomes):
        parts.append(Text(f"best: {_command(best[0][0])}", overflow="fold"))
    parts += map(Text, _notes(outcomes))
    return Group(*parts)


def _notes(outcomes: Outcomes) -> list[str]:
    """Returns what is to be kept in mind when trials are compared."""
    evaluated = [trial for trial, _ in best_first(outcomes)]
    notes = []
    if names := measured_otherwise(evaluated):
        flags = ", ".join(f"--{name}" for name in names)
        notes.append(f"Trials that differ in {flags} are measured on different activations: compare within equal ones.")
    if len(evaluated) > 1:
        notes.append(
            f"The best of {len(evaluated)} is shown on the text that it was chosen by, and looks better than it is:"
            " measure it on other text (--dataset) before you report it."
        )
    return notes


def _command(trial: Trial) -> str:
    """Returns the command that trains the trial's SAE without a sweep."""
    return shlex.join(["python", "sae_lens_train.py", *trial.flags])


def sweep_table(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Returns columns, and a row for each trial: first the evaluated trials from best to worst, then the others."""
    names = list(dict.fromkeys(name for trial, _ in outcomes for name in trial.values))
    rows = []
    for trial, outcome in best_first(outcomes):
        health, metrics = outcome["health"], outcome["metrics"]
        cells = [f"{format_value(s.metric, metrics[s.metric])} {MARKS[health[s.metric]]}" for s in STANDARDS]
        rows.append([*(trial.values.get(name, "") for name in names), *cells, count_healthy(health)])
    for trial, outcome in outcomes:
        if "metrics" not in outcome:
            why = next(key for key in ("refused", "failed", "stopped") if key in outcome)
            rows.append([*(trial.values.get(name, "") for name in names), *[""] * len(STANDARDS), why])
    return [*names, *(standard.title for standard in STANDARDS), "Healthy"], rows


def write_sweep(outcomes: Outcomes, directory: Path) -> Path:
    """Writes sweep.json, sweep.md and sweep.html, and returns the path of the last."""
    best = best_first(outcomes)
    front = trials_on_front(outcomes)
    content = {
        "trials": [
            {
                "number": trial.number,
                "values": trial.values,
                "command": _command(trial),
                "on_front": trial.number in front,
                **outcome,
            }
            for trial, outcome in outcomes
        ],
        "best": best[0][0].number if best else None,
    }
    (directory / "sweep.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    title = f"Sweep {directory.name}"
    columns, rows = sweep_table(outcomes)
    reasons = [
        f"Trial {trial.number} ({trial.name}): {reason.removeprefix('error: ')}"
        for trial, outcome in outcomes
        if (reason := outcome.get("refused") or outcome.get("failed"))
    ]
    command = _command(best[0][0]) if best else "no trial was evaluated"
    notes = _notes(outcomes)
    parts = [f"# {title}", "\n".join(markdown_table(columns, rows)), *reasons, f"Best: `{command}`", *notes]
    (directory / "sweep.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page = directory / "sweep.html"
    lead = "<p>Best, by the number of healthy metrics, then by loss recovered:</p>"
    lead += f"<p><code>{escape(command)}</code></p>"
    html = runs_page(title, lead, _figure(outcomes), [("", (columns, rows))], [*reasons, *notes], names_first=False)
    page.write_text(html, encoding="utf-8")
    return page


def _figure(outcomes: Outcomes) -> go.Figure:
    """Returns a plot with a point for each trial, coloured by dead features, and the Pareto front as a line."""
    measured = _measured(best_first(outcomes))
    points = _points(measured)
    return plot_over_l0(
        [
            front_trace(points),
            go.Scatter(
                x=[l0 for l0, _ in points],
                y=[recovered for _, recovered in points],
                mode="markers",
                marker={
                    "size": 12,
                    "color": [metrics["dead_features"] for _, metrics in measured],
                    "colorscale": "Viridis",
                    "cmin": 0,
                    "colorbar": {
                        "title": "dead features",
                        "tickformat": ".0%",
                        "orientation": "h",  # a vertical one leaves no room for the plot on a phone
                        "y": 1.02,
                        "yanchor": "bottom",
                        "thickness": 12,
                    },
                    "line": {"width": 1, "color": "#fff"},
                },
                text=[f"trial {trial.number}: {escape(trial.name)}" for trial, _ in measured],
                hovertemplate="%{text}<br>L0 %{x:.1f}<br>loss recovered %{y:.2%}<extra></extra>",
                name="trials",
            ),
        ]
    )
