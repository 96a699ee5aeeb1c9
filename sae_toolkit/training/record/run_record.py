"""The interface of a run's record, which holds its configuration, its metrics and its results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_toolkit.errors import one_line

log = logging.getLogger(__name__)


class RunRecord:
    """Base class of all records, which records nothing. The methods of its subclasses log errors and raise none."""

    service = ""  # name of the service, for messages
    _has_warned = False

    def log(self, values: dict[str, Any], step: int) -> None:
        """Records numbers of a step."""

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Records a distribution at a step. The values are [N]."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table of results."""

    def summarize(self, values: dict[str, Any]) -> None:
        """Sets values of the summary of the run, which a table of runs shows."""

    def save_sae(self, directory: Path, metadata: dict[str, Any], *, with_weights: bool) -> None:
        """Records a finished SAE, either with its weights or with the path of their directory."""

    def finish(self) -> None:
        """Waits until the record is written, up to a time limit."""

    def _safely(self, action: Callable[[], Any]) -> None:
        """Calls `action`. Raises none of its exceptions, and logs the first one of this record."""
        try:
            action()
        except Exception as error:  # such as a full disk
            if not self._has_warned:
                message = "%s: %s; the run goes on, and its record may be incomplete"
                log.warning(message, self.service, one_line(error))
            self._has_warned = True
