"""Runs on several processes, as `run_simple.sh` starts them, and what is done to them from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from support.processes import HANGS, ROOT
from support.trainings import paths_in


class Launch:
    """A run on n processes of this machine, or of one that `prefix` leads to."""

    def __init__(self, n: int, flags: list[object], prefix: tuple[str, ...] = (), **environment: str) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "sae_toolkit.distributed.launch", str(n), *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that runs."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error, KeyError):
                if "sae_lens_train.py" in " ".join(process.cmdline()):
                    found[int(process.environ()["RANK"])] = process.pid
        return found

    def finish(self, timeout: float = HANGS) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode, stdout, stderr

    def finished_sae(self, timeout: float = HANGS) -> Path:
        status, stdout, stderr = self.finish(timeout)
        assert status == 0, stderr
        return Path(stdout.strip())


def after_a_checkpoint(launch: Launch, directory: Path, action: Callable[[], None]) -> float:
    """Does something as soon as a run has written a checkpoint; returns when."""
    while not paths_in(directory):
        assert launch.process.poll() is None, launch.finish()
        time.sleep(0.01)
    action()
    return time.monotonic()


def kill_rank(launch: Launch, rank: int) -> Callable[[], None]:
    return lambda: os.kill(launch.ranks()[rank], signal.SIGKILL)


def largest_difference(one: Path, other: Path, but: str | None = None) -> float:
    """Between the weights of two finished SAEs, relative to the largest weight of each tensor, `but` one."""
    ours, theirs = (load_file(sae / "sae_weights.safetensors") for sae in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in ours if key != but)


def assert_close(one: Path, other: Path) -> None:
    """Equal to the rounding of the sums in a float32 language model, in an SAE of float64.

    BatchTopK's threshold is set on a sample, and the ranks draw another than one process does.
    """
    assert largest_difference(one, other, but="threshold") < 1e-5, largest_difference(one, other, but="threshold")
    assert largest_difference(one, other) < 5e-3, largest_difference(one, other)
    ours, theirs = (load_file(sae / "sparsity.safetensors")["sparsity"] for sae in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
