"""What a sweep found: a table, the Pareto front, and the command of the best trial."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.page import front_trace, legend, over_l0, runs_page
from sae_toolkit.many_runs.sweep.trials import Trial, in_order, pareto_front
from sae_toolkit.reports.tables import MARKS, format_value

Outcomes = Sequence[tuple[Trial, Mapping[str, Any]]]


def render_sweep(outcomes: Outcomes) -> RenderableType:
    """A row for each trial, the best first, and the command of the best."""
    table = Table()
    for name in _names(outcomes):
        table.add_column(name, justify="right")
    for title in (*(standard.title for standard in STANDARDS), "Healthy"):
        table.add_column(title, justify="right")
    for row in _rows(outcomes):
        table.add_row(*row)
    parts: list[RenderableType] = [table, Text(legend())]
    if best := in_order(outcomes):
        parts.append(Text(f"best: {command(best[0][0])}", overflow="fold"))
    return Group(*parts)


def command(trial: Trial) -> str:
    """What trains the trial's SAE by itself."""
    return shlex.join(["python", "sae_lens_train.py", *trial.flags])


def sweep_table(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each trial, the best first."""
    return [*_names(outcomes), *(standard.title for standard in STANDARDS), "Healthy"], _rows(outcomes)


def _names(outcomes: Outcomes) -> list[str]:
    return list(dict.fromkeys(name for trial, _ in outcomes for name in trial.values))


def _rows(outcomes: Outcomes) -> list[list[str]]:
    names, evaluated = _names(outcomes), in_order(outcomes)
    rows = []
    for trial, outcome in evaluated:
        health, metrics = outcome["health"], outcome["metrics"]
        cells = [f"{format_value(s.metric, metrics[s.metric])} {MARKS[health[s.metric]]}" for s in STANDARDS]
        verdict = "?" if health["healthy"] is None else f"{health['healthy']}/{health['of']}"
        rows.append([*(trial.values.get(name, "") for name in names), *cells, verdict])
    for trial, outcome in outcomes:
        if "metrics" not in outcome:
            why = next(key for key in ("refused", "failed", "stopped") if key in outcome)
            rows.append([*(trial.values.get(name, "") for name in names), *[""] * len(STANDARDS), why])
    return rows


def write_sweep(outcomes: Outcomes, directory: Path) -> Path:
    """Writes sweep.json, sweep.md and sweep.html; returns the last."""
    header, rows = sweep_table(outcomes)
    best = in_order(outcomes)
    front = [trial.number for trial, _ in pareto_front(outcomes)]
    content = {
        "trials": [
            {
                "number": trial.number,
                "values": trial.values,
                "command": command(trial),
                "on_front": trial.number in front,
            }
            | dict(outcome)
            for trial, outcome in outcomes
        ],
        "best": best[0][0].number if best else None,
    }
    (directory / "sweep.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    lines = [header, ["---"] * len(header), *rows]
    markdown = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    reasons = [
        f"Trial {trial.number} ({trial.name}): {outcome.get('refused') or outcome.get('failed')}"
        for trial, outcome in outcomes
        if "refused" in outcome or "failed" in outcome
    ]
    best_command = command(best[0][0]) if best else "no trial was evaluated"
    (directory / "sweep.md").write_text(
        "\n\n".join([f"# Sweep {directory.name}", markdown, *reasons, f"Best: `{best_command}`"]) + "\n"
    )
    page = directory / "sweep.html"
    lead = "<p>Best, by the number of healthy metrics, then by loss recovered:</p>"
    lead += f"<p><code>{escape(best_command)}</code></p>"
    figure = front_figure(outcomes)
    page.write_text(
        runs_page(f"Sweep {directory.name}", lead, figure, [("", (header, rows))], reasons, words=False),
        encoding="utf-8",
    )
    return page


def front_figure(outcomes: Outcomes) -> go.Figure:
    """Loss recovered over L0 of all trials, dead features as colour, the Pareto front as a line."""
    shown = [
        (trial, outcome["metrics"])
        for trial, outcome in in_order(outcomes)
        if None not in (outcome["metrics"]["l0"], outcome["metrics"]["loss_recovered"])
    ]
    front = [outcome["metrics"] for _, outcome in pareto_front(outcomes)]
    return over_l0(
        [
            front_trace([(metrics["l0"], metrics["loss_recovered"]) for metrics in front]),
            go.Scatter(
                x=[metrics["l0"] for _, metrics in shown],
                y=[metrics["loss_recovered"] for _, metrics in shown],
                mode="markers",
                marker={
                    "size": 12,
                    "color": [metrics["dead_features"] for _, metrics in shown],
                    "colorscale": "Viridis",
                    "cmin": 0,
                    "colorbar": {
                        "title": "dead features",
                        "tickformat": ".0%",
                        "orientation": "h",  # beside the plot there is no room for it on a phone
                        "y": 1.02,
                        "yanchor": "bottom",
                        "thickness": 12,
                    },
                    "line": {"width": 1, "color": "#fff"},
                },
                text=[f"trial {trial.number}: {escape(trial.name)}" for trial, _ in shown],
                hovertemplate="%{text}<br>L0 %{x:.1f}<br>loss recovered %{y:.2%}<extra></extra>",
                name="trials",
            ),
        ]
    )
