"""An evaluation as a table for the terminal and as JSON for everything else."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sae_lens import __version__ as sae_lens_version

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation import Evaluation
from sae_toolkit.evaluation_setup import PreparedEvaluation
from sae_toolkit.health import LEAST_REPLACED_SHARE, STANDARDS, Standard

_MARKS = {
    "healthy": Text("✔ healthy", "green"),
    "borderline": Text("~ borderline", "yellow"),
    "unhealthy": Text("✘ unhealthy", "red"),
    "unsettled": Text("? unsettled", "yellow"),
}
_PERCENTAGES = {"loss_recovered", "dead_features", "replaced_share"}
_BESIDE = {
    "explained_variance": "Explained variance",
    "cosine_similarity": "Cosine similarity",
    "l2_ratio": "L2 norm, reconstruction / activation",
    "ce_clean": "Cross-entropy, model alone (nats)",
    "ce_sae": "Cross-entropy, with the SAE",
    "ce_zero": "Cross-entropy, hook zeroed",
    "kl_sae": "KL(model || with the SAE) (nats)",
    "replaced_share": "Tokens where the SAE stood in",
}


def format_value(metric: str, value: float) -> str:
    """A metric's value as the tables print it."""
    if metric in _PERCENTAGES:
        return f"{value:.2%}"
    return f"{value:.1f}" if metric == "l0" else f"{value:.3f}"


def _range(standard: Standard, bounds: tuple[float, float]) -> str:
    low, high = bounds
    if math.isinf(high):
        return f">= {low:.0%}"
    if standard.metric in _PERCENTAGES:
        return f"<= {high:.0%}" if low == 0 else f"{low:.0%} to {high:.0%}"
    return f"{low:g} to {high:g}" if low > 0 else f"<= {high:g}"


def verdict(health: Mapping[str, Any]) -> str:
    if health["healthy"] is None:
        return (
            f"no verdict (unsettled): the SAE stood in for less than {LEAST_REPLACED_SHARE:.0%} of the tokens,"
            " so the numbers say too little about it"
        )
    return f"{health['healthy']}/{health['of']} metrics healthy"


def render(prepared: PreparedEvaluation, evaluation: Evaluation, health: Mapping[str, Any]) -> RenderableType:
    """The four health metrics against their standards, the verdict, and what was measured beside them."""
    metrics, text = evaluation.metrics, prepared.text
    which = "documents held out of training" if prepared.held_out else f"split {text.split}"
    fallback = f", in place of {text.fallback_from}" if text.fallback_from else ""
    heading = f"{prepared.model.name}, {prepared.hook_name}\n{text.name}{fallback}, {which}"
    table = Table()
    for column, justify in (("Metric", "left"), ("Value", "right"), ("Healthy", "right"), ("Borderline", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("Status")
    titles = {"dead_features": f"Dead features\n(over {evaluation.tokens:,} tokens)"}
    for standard in STANDARDS:
        table.add_row(
            titles.get(standard.metric, standard.title),
            format_value(standard.metric, metrics[standard.metric]),
            _range(standard, standard.healthy),
            _range(standard, standard.borderline),
            _MARKS[health[standard.metric]],
        )
    beside = Table(show_header=False, box=None)
    beside.add_column()
    beside.add_column(justify="right")
    for metric, title in _BESIDE.items():
        beside.add_row(title, format_value(metric, metrics[metric]))
    beside.add_row("Tokens for the cross-entropies and KL", f"{evaluation.loss_tokens:,}")
    return Group(Text(heading), table, Text(verdict(health), "bold"), Text(), beside)


def summarize(prepared: PreparedEvaluation, evaluation: Evaluation, health: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json: the numbers, and all that they depend on."""
    return {
        "sae_lens_version": sae_lens_version,
        "model": prepared.model.name,
        "hook_name": prepared.hook_name,
        "dataset": prepared.text.name,
        "dataset_config": prepared.text.config,
        "dataset_split": prepared.text.split,
        "fallback_from": prepared.text.fallback_from,
        "held_out": prepared.held_out and asdict(prepared.held_out),
        "context_length": prepared.context.context_size,
        "positions": asdict(prepared.positions),
        "tokens": evaluation.tokens,
        "sequences": evaluation.sequences,
        "loss_tokens": evaluation.loss_tokens,
        "loss_sequences": evaluation.loss_sequences,
        "metrics": evaluation.metrics,
        "health": dict(health),
    }


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested mappings as one, with names joined by `/`, as wandb groups them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value
    return flat


def check_writable(path: Path) -> None:
    """Raises UserError where a result could not be written to `path`."""
    if path.exists() and not path.is_file():
        raise UserError(f"--output_json {path}: is no file that can be replaced; name another path")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--output_json {path}: cannot be written there ({error.strerror}); name another path"
        ) from None


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
