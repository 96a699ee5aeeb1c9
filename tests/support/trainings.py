"""Runs of the scripts in processes of their own, which start in no time and can be killed."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from sae_toolkit import ROOT
from support.processes import Outcome


class Trainings:
    """Starts runs, one after the other, from a process that has imported what they need (`fork_server.py`).

    Args:
        directory: where their output goes.
        environment: further variables of the environment of that process and of all runs.
    """

    def __init__(self, directory: Path, **environment: str) -> None:
        self.output, self.errors = directory / "output.txt", directory / "errors.txt"
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def script(self, name: str, *flags: object, **environment: str) -> Outcome:
        """How a script ended. Variables that libraries read as they are imported have no effect here."""
        self._start(name, flags, environment, self.errors)
        self._answer()
        return Outcome(int(self._answer()), self.output.read_text(), self.errors.read_text())

    def run(self, flags: list[str], disturb: Callable[[int], None] | None = None) -> tuple[int, float]:
        """Exit status and wall time of a training; `disturb` is called in a thread beside it, with its process's id."""
        self._start("sae_lens_train.py", flags, {}, self.output)
        pid, start = int(self._answer()), time.monotonic()
        beside = threading.Thread(target=disturb, args=(pid,)) if disturb else None
        if beside:
            beside.start()
        status, seconds = int(self._answer()), time.monotonic() - start
        if beside:
            beside.join()
        return status, seconds

    def _start(self, script: str, flags: Sequence[object], environment: dict[str, str], errors: Path) -> None:
        assert self._server.stdin is not None
        for file in (self.output, errors):  # `disturb` must not see what the run before showed
            file.write_text("")
        request = {
            **{"script": str(ROOT / script), "flags": [str(flag) for flag in flags], "environment": environment},
            **{"stdout": str(self.output), "stderr": str(errors)},
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)

    def shown(self) -> str:
        """All that the last training wrote, on standard output and standard error."""
        return self.output.read_text()

    def finished_sae(self) -> Path:
        return Path(self.shown().strip().splitlines()[-1])

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def run_flags(tiny_model: Path, text_file: Path, directory: Path, architecture: str = "batchtopk") -> list[str]:
    """Of a run of a second that is saved every 4,096 tokens; a checkpoint takes a few hundredths of one."""
    flags = {
        "model_name": tiny_model,
        "layer": 1,
        "dataset_path": text_file,
        "context_size": 64,
        "architecture": architecture,
        "k": 8,
        "expansion_factor": 32,
        "normalize_activations": "expected_average_only_in",
        "training_tokens": 20480,
        "n_batches_in_buffer": 64,
        "lr": 1e-3,
        "dead_feature_window": 5,
        "checkpoint_every": 4096,
        "checkpoint_path": directory,
        "wandb_mode": "disabled",
        "device": "cpu",
        "lm_dtype": "float32",
        "set": "n_batches_for_norm_estimate=1",
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def paths_in(directory: Path, pattern: str = "*/*/[1-9]*") -> list[Path]:
    """Returns the checkpoints, or what else fits a pattern, under a directory, also while runs rename theirs there.

    `Path.glob` fails if a directory is gone that it has just seen.
    """
    return [directory / name for name in glob.glob(pattern, root_dir=directory)]  # noqa: PTH207


def assert_same(one: Path, other: Path, but: Collection[str] = ()) -> None:
    """Two finished SAEs are equal, bit for bit, except for some fields of their metadata."""
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), (one, other)
    cfgs = [json.loads((sae / "cfg.json").read_text()) for sae in (one, other)]
    for cfg in cfgs:
        cfg["metadata"] = {name: value for name, value in cfg["metadata"].items() if name not in but}
    assert cfgs[0] == cfgs[1]
