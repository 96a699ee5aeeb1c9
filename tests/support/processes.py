"""Commands as processes of their own, and how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


def train_demo(directory: Path, *flags: object) -> Path:
    """Trains the demo with these flags and returns the finished SAE. Its activations are kept for the next one."""
    done = run_process(
        *(sys.executable, "sae_lens_train.py", "@presets/demo.args", "--checkpoint_path", directory / "runs"),
        *("--cache_activations", directory / "activations", "--wandb_mode", "disabled", *flags),
    )
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())
