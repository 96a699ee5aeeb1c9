"""What sweeps and comparisons have in common: a directory that is theirs alone, and runs as processes of their own."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError
from sae_toolkit.files.names import METRICS_FILENAME

RESULT_FILENAME = "result.json"
_PR_SET_PDEATHSIG = 1


@contextmanager
def claimed(directory: Path, flag: str) -> Iterator[None]:
    """Makes this process the only one that works in a directory, which is made if it is not there.

    Args:
        directory: of a sweep or a comparison.
        flag: that names it.

    Raises:
        UserError: another one does, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{flag} {directory}: cannot be written to ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{flag} {directory}: another one runs there; name another directory") from None
        yield


def start_process(
    command: Sequence[str | Path],
    *,
    output: IO[str],
    log: IO[str],
    cwd: str | Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Starts a process that dies with this one, so that nothing is left that writes to a run."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=stdin,
        stdout=output,
        stderr=log,
        preexec_fn=_die_with_parent,
    )


def script(name: str) -> list[str | Path]:
    """The start of a command that runs one of the project's scripts."""
    return [sys.executable, ROOT / name]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def last_line_of(log: Path) -> str:
    """What a process that ended badly said last: its error, if there is one."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(said) if line.startswith("error:")), said[-1] if said else "no output")


def finished_sae(directory: Path) -> Path | None:
    """The SAE that the training with this --checkpoint_path finished last."""
    finished = sorted(directory.glob("*/*/final_*"), key=lambda path: path.stat().st_mtime)
    return finished[-1] if finished else None


def readings_of(directory: Path) -> list[dict[str, Any]]:
    """What the training with this --checkpoint_path recorded, in order."""
    files = sorted(directory.glob(f"*/*/{METRICS_FILENAME}"), key=lambda file: file.stat().st_mtime)
    try:
        return [json.loads(line) for line in files[-1].read_text().splitlines()]
    except (IndexError, OSError, ValueError):
        return []


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes what a run came to, whole or not at all."""
    partial = directory / f".{RESULT_FILENAME}"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(directory / RESULT_FILENAME)


def read_result(directory: Path) -> dict[str, Any] | None:
    """What a run came to; None while it has not."""
    try:
        return json.loads((directory / RESULT_FILENAME).read_text())
    except (OSError, ValueError):
        return None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of some (L0, loss recovered) no other beats in both, by L0."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
