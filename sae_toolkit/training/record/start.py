"""Starts the record of a run in wandb or TensorBoard, with the configuration of the run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sae_toolkit import ROOT
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.settings.training import RecordingSettings
from sae_toolkit.training.directory import find_run_directory
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.record.run_record import RunRecord
from sae_toolkit.training.record.tensorboard_run import TensorBoardRun
from sae_toolkit.training.record.wandb_run import WandbRun


def run_config(run: PreparedRun) -> dict[str, Any]:
    """Returns the configuration for the record: SAELens's, and the flags, preset, data and code that the run uses."""
    return (
        run.cfg.to_dict()
        | run.lineage()
        | {
            "flags": dict(run.flags),
            "preset": run.flags["preset"],
            "data": data_of(run),
            "git": git_state(),
            "resumed_from": None if run.resume_from is None else run.resume_from.name,
        }
    )


def data_of(run: PreparedRun) -> dict[str, Any]:
    """Returns a description of the data: the text, the held-out documents, and a checksum of the tokens."""
    return run.metadata() | {
        "name": run.text.name,
        "context_size": run.cfg.context_size,
        "contexts": len(run.rows_NT),
        "tokens_xxh3": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(run.rows_NT).data),
    }


def _checkpoint(run: PreparedRun) -> dict[str, Any]:
    """Returns the run and the number of tokens of the checkpoint that a run resumes from."""
    return {"run": run.directory.name, "tokens": int(run.resume_from.name) if run.resume_from else 0}


def git_state() -> dict[str, Any] | None:
    """Returns the commit of this code, and whether files have changed since it; None if this is not a git clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def start_record(run: PreparedRun) -> RunRecord:
    """Starts the record of a training run. A resumed run continues its record."""
    if not run.ranks.is_main:
        return RunRecord()
    if run.recording.logger == "tensorboard":
        n_steps = int(run.resume_from.name) // run.cfg.train_batch_size_tokens if run.resume_from else 0
        return TensorBoardRun(run.directory, config=run_config(run), first_step=n_steps)
    logger = run.cfg.logger
    return WandbRun(
        run.recording.wandb_mode,
        run_id=run.directory.name,
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        name=logger.run_name or run.directory.name,
        job_type="training",
        config=run_config(run),
        uses={"data": data_of(run)} | ({"checkpoint": _checkpoint(run)} if run.resume_from else {}),
    )


def record_runs(
    kind: str,
    directory: Path,
    recording: RecordingSettings,
    started_with: Mapping[str, Any],
    saes: Mapping[str, Path],
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
) -> None:
    """Records a sweep or a comparison in a wandb run of its own, with links to the wandb runs of its trainings.

    Args:
        kind: `sweep` or `comparison`.
        directory: directory of the sweep or comparison.
        recording: settings of the record of the trainings.
        started_with: flags of the trainings, by name.
        saes: directories of the finished SAEs, by the names of the trainings.
        table: columns and rows of the results.
    """
    if recording.logger != "wandb":
        return
    runs = {name: path.absolute().parent.name for name, path in saes.items()}  # a run's directory is named by its id
    where = f"{recording.wandb_entity + '/' if recording.wandb_entity else ''}{recording.wandb_project}"
    record = WandbRun(
        recording.wandb_mode,
        run_id=xxhash.xxh3_64_hexdigest(str(directory.absolute()).encode())[:8],
        project=recording.wandb_project,
        entity=recording.wandb_entity,
        name=directory.name,
        job_type=kind,
        config={"flags": dict(started_with), "training_runs": runs, "git": git_state()},
    )
    record.log_table(f"{kind}/table", *table)
    columns = ["training", "run", "checkpoint"]
    rows = [[name, f"{where}/{runs[name]}", str(path)] for name, path in saes.items()]
    record.log_table(f"{kind}/training_runs", columns, rows)
    record.finish()


def record_of_training(sae_path: Path) -> RunRecord:
    """Returns the record of the training that wrote an SAE, to add to. Without one, the record does nothing."""
    directory = find_run_directory(sae_path)
    try:
        flags = dict(json.loads((directory / FLAGS_FILENAME).read_text())) if directory else {}
    except (OSError, ValueError, TypeError, RecursionError):  # not written by this project
        flags = {}
    if directory is None or not flags:
        return RunRecord()
    if flags.get("logger") == "tensorboard":
        return TensorBoardRun(directory)
    return WandbRun(
        flags.get("wandb_mode", "disabled"),
        run_id=directory.name,
        project=flags.get("wandb_project", ""),
        entity=flags.get("wandb_entity"),
    )
