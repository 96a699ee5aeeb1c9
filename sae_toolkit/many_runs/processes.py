"""Starts the scripts as child processes, and finds out why one failed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from sae_toolkit import ROOT

_PR_SET_PDEATHSIG = 1


def start_process(
    command: Sequence[str | Path],
    *,
    output: IO[str],
    log: IO[str],
    cwd: str | Path | None = None,
    stdin: int = subprocess.DEVNULL,
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Starts a child process and returns it. It is killed when this process ends, and so never writes to a run alone.

    Args:
        command: the program and its arguments.
        output: the file for its standard output.
        log: the file for its standard error.
        cwd: its working directory (default: this process's).
        stdin: as `subprocess.Popen` takes it.
        environment: variables to add to this process's environment.
    """
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=stdin,
        stdout=output,
        stderr=log,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def script_command(name: str) -> list[str | Path]:
    """Returns the start of a command that runs one of the project's scripts."""
    return [sys.executable, ROOT / name]


def failure_reason(log: Path) -> str:
    """Returns the last `error:` line in the log of a failed process, or the last line if no line starts with that."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").split("\n") if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")
