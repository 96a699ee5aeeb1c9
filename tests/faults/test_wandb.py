"""Whatever the wandb host does, the training goes on, ends in time, and its record is on disk."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Outcome, run_process
from safetensors.torch import load_file
from wandb_reader import read_offline_runs

from faults.loopback_wandb import KEY, LoopbackWandb

pytestmark = pytest.mark.faults


def train(tiny_run: list[object], environment: dict[str, str], *flags: object) -> tuple[Outcome, float]:
    start = time.monotonic()
    online = ("--wandb_mode", "online", "--set", "logger.wandb_log_frequency=1")
    done = run_process(sys.executable, "sae_lens_train.py", *tiny_run, *online, *flags, **environment)
    return done, time.monotonic() - start


def weights(done: Outcome) -> dict[str, torch.Tensor]:
    assert done.status == 0, done.stderr
    return load_file(Path(done.stdout.strip()) / "sae_weights.safetensors")


@pytest.fixture
def undisturbed(tiny_run):
    return weights(run_process(sys.executable, "sae_lens_train.py", *tiny_run))


@pytest.mark.parametrize("behaviour", ["refuses", "hangs", 401, 403, 404, 429, 500])
def test_a_host_that_fails_at_the_start_makes_the_run_an_offline_one(
    tiny_run, undisturbed, tmp_path, record_fault, behaviour
):
    host = LoopbackWandb(behaviour if behaviour != "refuses" else "works")
    if behaviour == "refuses":
        host.close()
    done, seconds = train(tiny_run, host.environment(tmp_path))
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(done).items())
    assert seconds < 60
    assert re.search(r"wandb: .*; the run is recorded offline; `wandb sync \S+` uploads it", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr + done.stdout
    (run,) = read_offline_runs(tmp_path)
    assert any("losses/overall_loss" in row for row in run.history)
    record_fault(
        f"wandb host at the start: {behaviour}",
        host.injected[str(behaviour)] or 1,
        f"recorded offline after at most 20 s (the whole run took {seconds:.0f} s); the same SAE",
        "nothing",
    )


@pytest.mark.parametrize("behaviour", ["hangs", 500, "refuses"])
def test_a_host_that_dies_in_the_middle_does_not_hold_the_run(tiny_run, undisturbed, tmp_path, record_fault, behaviour):
    host = LoopbackWandb("works")
    host.becomes = behaviour
    environment = host.environment(tmp_path) | {"WANDB_FINISH_TIMEOUT": "15"}
    done, seconds = train(tiny_run, environment, "--training_tokens", 2048)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(done).items())
    assert seconds < 75
    found = re.search(r"the record is whole on disk: `wandb sync (\S+)`", done.stderr)
    assert found, done.stderr
    assert list(Path(found[1]).glob("run-*.wandb"))
    record_fault(
        f"wandb host in the middle: {behaviour}",
        host.injected[str(behaviour)] or 1,
        f"training went on; the end waited 15 s and named `wandb sync` (the whole run took {seconds:.0f} s)",
        "nothing: the record is on disk",
    )


def test_a_host_that_works_gets_the_record(tiny_run, tmp_path):
    host = LoopbackWandb("works")
    done, _ = train(tiny_run, host.environment(tmp_path))
    assert done.status == 0, done.stderr
    host.close()
    assert any("losses/overall_loss" in row for row in host.history)
