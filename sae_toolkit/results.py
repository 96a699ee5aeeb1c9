"""What an evaluation leaves: evaluation.json, report.html and report.md beside the SAE, and its record in wandb."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_lens import __version__ as sae_lens_version

from sae_toolkit.checkpoints import load_log_sparsity
from sae_toolkit.errors import UserError
from sae_toolkit.evaluation import Evaluation
from sae_toolkit.evaluation_setup import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.health import judge
from sae_toolkit.html_report import render_html, render_markdown
from sae_toolkit.metrics import without_nan
from sae_toolkit.sae_formats import SAEFile
from sae_toolkit.wandb_run import training_wandb_run

log = logging.getLogger(__name__)


def choose_outputs(output_json: Path | None, files: Sequence[SAEFile]) -> list[Path]:
    """Where each SAE's evaluation.json goes: beside its weights, or under `evaluations` where these are not ours.

    Raises:
        UserError: one of them could not be written.
    """
    if output_json is not None:
        if len(files) > 1:
            raise UserError(f"--output_json {output_json}: one file for {len(files)} SAEs; leave it out")
        outputs = [output_json]
    else:
        outputs = [_directory(file) / "evaluation.json" for file in files]
    for output in outputs:
        for path in (output, *_report_paths(output)):
            _check_writable(path)
    return outputs


def _directory(file: SAEFile) -> Path:
    if "snapshots" not in file.path.parts and os.access(file.path, os.W_OK):  # not the Hugging Face cache
        return file.path
    directory = Path("evaluations") / re.sub(r"[^\w.-]+", "_", file.name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_json: {directory} cannot be made ({error.strerror}); name a file") from None
    return directory


def _report_paths(output_json: Path) -> tuple[Path, Path]:
    """The HTML and the Markdown report: report.* beside evaluation.json, else of the same name."""
    stem = "report" if output_json.name == "evaluation.json" else output_json.stem
    return output_json.with_name(f"{stem}.html"), output_json.with_name(f"{stem}.md")


def _check_writable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"--output_json {path}: is no file that can be replaced; name another path")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--output_json {path}: cannot be written there ({error.strerror}); name another path"
        ) from None


def write_results(
    output_json: Path,
    summary: Mapping[str, Any],
    evaluation: Evaluation,
    sibling_summaries: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the results and the reports.

    Args:
        output_json: from `choose_outputs`.
        summary: from `summarize`.
        evaluation: what it summarizes.
        sibling_summaries: those of all SAEs evaluated with it; checkpoints of the same run make curves.
    """
    html, markdown = _report_paths(output_json)
    plots = dict(evaluation.plots)
    run = Path(summary["sae"]["path"]).parent
    checkpoints = [s for s in sibling_summaries if Path(s["sae"]["path"]).parent == run and _tokens_trained(s)]
    if len(checkpoints) > 1:
        plots["checkpoints"] = [{"tokens": _tokens_trained(s), "metrics": s["metrics"]} for s in checkpoints]
    _write_whole(output_json, json.dumps(summary, indent=2) + "\n")
    _write_whole(markdown, render_markdown(summary))
    _write_whole(html, render_html(summary, plots, evaluation.features))
    log.info("written to %s and %s", output_json, html)


def record_results(summary: Mapping[str, Any]) -> None:
    """Records results in the wandb run of the SAE's training, if there was one."""
    wandb_run = training_wandb_run(Path(summary["sae"]["path"]))
    wandb_run.summarize(_flatten(summary, "evaluation"))
    wandb_run.finish()


def _tokens_trained(summary: Mapping[str, Any]) -> int | None:
    """How many tokens a checkpoint was trained on, which its directory is named after; None elsewhere."""
    name = re.fullmatch(r"(?:final_)?(\d+)", Path(summary["sae"]["path"]).name)
    return int(name[1]) if name else None


def _write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested mappings as one, with names joined by `/`, as wandb groups them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value
    return flat


def summarize(prepared: PreparedEvaluation, evaluated: EvaluatedSAE, evaluation: Evaluation) -> dict[str, Any]:
    """The content of evaluation.json: the numbers, and all that they depend on."""
    cosines = asdict(evaluation.cosines)
    del cosines["histogram"], cosines["interval"]
    summary = {
        "sae_lens_version": sae_lens_version,
        "sae": {
            "name": evaluated.file.name,
            "path": str(evaluated.file.path),
            "library": evaluated.file.library,
            "form": evaluated.file.form,
            "architecture": evaluated.sae.cfg.architecture(),
            "d_in": evaluated.sae.cfg.d_in,
            "d_sae": evaluated.sae.cfg.d_sae,
        },
        "protocol": prepared.protocol,
        "model": prepared.model.name,
        "hook_name": prepared.hook_name,
        "dataset": prepared.text.name,
        "dataset_config": prepared.text.config,
        "dataset_split": prepared.text.split,
        "fallback_from": prepared.text.fallback_from,
        "held_out": prepared.held_out and asdict(prepared.held_out),
        "context_length": prepared.context.context_size,
        "positions": asdict(evaluated.positions) if prepared.protocol == "health" else None,
        "tokens": evaluation.tokens,
        "sequences": evaluation.sequences,
        "loss_tokens": evaluation.loss_tokens,
        "loss_sequences": evaluation.loss_sequences,
        "metrics": without_nan(evaluation.metrics),
        "intervals": evaluation.intervals,
        "dead_feature_estimates": asdict(evaluation.dead) | {"training_run": _training_run(evaluated, evaluation)},
        "decoder_cosines": cosines,
        "health": judge(
            evaluation.metrics,
            evaluation.intervals,
            evaluation.dead,
            loss_sequences=evaluation.loss_sequences,
            sequences=evaluation.sequences,
        ),
    }
    if evaluation.saebench_core is not None:
        summary["saebench_core"] = evaluation.saebench_core
    return summary


def _training_run(evaluated: EvaluatedSAE, evaluation: Evaluation) -> dict[str, float] | None:
    """What the training run itself counted in its last window, beside what was counted here.

    Returns:
        `dead`, the share of features that never fired there, and `dead_here_alive_there`, the share that fired
        there and not here; None where the checkpoint has no sparsity.safetensors.
    """
    log_sparsity_F = load_log_sparsity(evaluated.file.path)
    if log_sparsity_F is None or log_sparsity_F.shape != evaluation.firing_rates_F.shape:
        return None
    dead_there_F = log_sparsity_F <= -9.9  # SAELens adds 1e-10 before the logarithm
    dead_here_F = evaluation.firing_rates_F == 0
    return {
        "dead": dead_there_F.double().mean().item(),
        "dead_here_alive_there": (dead_here_F & ~dead_there_F).double().mean().item(),
    }
