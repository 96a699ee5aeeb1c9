"""A run's record in TensorBoard, in the run's own directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.training.record.run_record import RunRecord

log = logging.getLogger(__name__)

DIRECTORY = "tensorboard"


class TensorBoardRun(RunRecord):
    """Event files under {run directory}/tensorboard, by the names that wandb has; tables and settings are texts.

    Args:
        directory: the run's.
        config: what it was started with.
        first_step: what was recorded of it and later steps is forgotten.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path, *, config: dict[str, Any] | None = None, first_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError(
                f"--logger tensorboard: {error.name} is not installed here: pip install -c constraints.txt tensorboard"
            ) from None
        self._has_warned = False
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

    def _safely(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # such as a full disk
            if not self._has_warned:
                log.warning("tensorboard: %s; the run goes on, and its record may be incomplete", one_line(error))
            self._has_warned = True
