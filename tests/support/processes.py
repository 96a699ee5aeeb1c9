"""Commands as processes of their own, and how they ended."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from sae_toolkit import ROOT

HOOK = "blocks.12.hook_resid_post"
HANGS = 1800.0  # seconds; many times what anything here takes on a busy machine


@dataclass
class Outcome:
    """How a script ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def run_process(*command: object, timeout: float = HANGS, **environment: str) -> Outcome:
    """Runs a command as a process of its own, in the project's root."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
