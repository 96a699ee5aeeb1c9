"""The directory of a sweep or comparison: the lock on it, and the files that each of its runs leaves."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.files.names import METRICS_FILENAME

RESULT_FILENAME = "result.json"


@contextmanager
def claimed(directory: Path, flag: str) -> Iterator[None]:
    """Locks a directory, so that no other process works in it. Creates the directory where it does not exist.

    Args:
        directory: the directory of a sweep or comparison.
        flag: the flag that names it, for messages.

    Raises:
        UserError: another process holds the lock, or the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{flag} {directory}: cannot be written to ({error.strerror}); name another one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{flag} {directory}: another process works in it; wait for that one, or name another directory"
            ) from None
        yield


def finished_sae(directory: Path) -> Path | None:
    """Returns the newest finished SAE below a --checkpoint_path, or None where no training has finished."""
    finished = sorted(directory.glob("*/*/final_*"), key=lambda path: path.stat().st_mtime)
    return finished[-1] if finished else None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the metrics that the newest training below a --checkpoint_path logged, oldest first."""
    files = sorted(directory.glob(f"*/*/{METRICS_FILENAME}"), key=lambda file: file.stat().st_mtime)
    try:
        return [json.loads(line) for line in files[-1].read_text().splitlines()]
    except (IndexError, OSError, ValueError):
        return []


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes the result of a finished run. If the process is killed meanwhile, the file is either whole or absent."""
    partial = directory / f".{RESULT_FILENAME}"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(directory / RESULT_FILENAME)


def read_result(directory: Path) -> dict[str, Any] | None:
    """Returns the result of a finished run, or None where the run has not finished."""
    try:
        return json.loads((directory / RESULT_FILENAME).read_text())
    except (OSError, ValueError):
        return None
