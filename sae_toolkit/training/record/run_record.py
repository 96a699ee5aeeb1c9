"""A run's record: what it was started with, what was measured on the way, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class RunRecord:
    """Records nothing, as of a run that nobody wants recorded; its subclasses do, and raise nothing."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers of a step."""

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """A distribution at a step, [N]."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of what the run came to."""

    def summarize(self, values: dict[str, Any]) -> None:
        """Sets values of the run's summary, which is what a table of runs shows."""

    def save_sae(self, directory: Path, metadata: dict[str, Any], *, with_weights: bool) -> None:
        """Records a finished SAE, with its files or with where they lie."""

    def finish(self) -> None:
        """Waits until all of it is written, or for as long as that may take."""
