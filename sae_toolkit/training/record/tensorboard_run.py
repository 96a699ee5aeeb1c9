"""The record of a run in TensorBoard, in the directory of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_toolkit.errors import UserError
from sae_toolkit.training.record.run_record import RunRecord

DIRECTORY = "tensorboard"


class TensorBoardRun(RunRecord):
    """Writes event files into {run directory}/tensorboard. Names are the same as in wandb. Tables become texts.

    Args:
        directory: directory of the run.
        config: what the run was started with.
        first_step: first step of this process. What an earlier one recorded of it and of later steps is deleted.

    Raises:
        UserError: TensorBoard is not installed.
    """

    service = "tensorboard"

    def __init__(self, directory: Path, *, config: dict[str, Any] | None = None, first_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError(
                f"--logger tensorboard: {error.name} is not installed; run `pip install -c constraints.txt tensorboard`"
            ) from None
        self._writer = SummaryWriter(str(directory / DIRECTORY), purge_step=first_step)
        if config is not None:
            self._text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, values: dict[str, Any], step: int) -> None:
        def write() -> None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

        self._safely(write)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._safely(lambda: self._writer.add_histogram(name, values, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._text(name, "\n".join(f"| {' | '.join(str(cell).replace('|', ' ') for cell in line)} |" for line in lines))

    def summarize(self, values: dict[str, Any]) -> None:
        self.log(values, step=0)

    def save_sae(self, directory: Path, metadata: dict[str, Any], *, with_weights: bool) -> None:
        self._text("sae", f"{directory}\n\n```json\n{json.dumps(metadata, indent=1, default=str)}\n```")

    def finish(self) -> None:
        self._safely(self._writer.close)

    def _text(self, name: str, text: str) -> None:
        self._safely(lambda: self._writer.add_text(name, text, 0))
