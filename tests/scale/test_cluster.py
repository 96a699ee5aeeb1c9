"""A sweep outlasts a machine that is lost, a training that dies, and its own end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.processes import HANGS, ROOT
from support.trainings import assert_same

pytestmark = pytest.mark.scale

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
GRID = ["--grid", "k=4,8,12,16"]
# Long enough to be caught in the middle: some seconds a trial.
LONGER = [
    "--training_tokens",
    "40000",
    "--expansion_factor",
    "128",
    "--checkpoint_every",
    "4096",
    "--set",
    "logger.wandb_log_frequency=1",
]


class Sweep:
    def __init__(self, args: Path, directory: Path, *more: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [
                sys.executable,
                "sweep_saes.py",
                f"@{args}",
                *LONGER,
                "--sweep_dir",
                str(directory),
                "--num_samples",
                "12",
                *more,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float = HANGS) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode, stdout, stderr

    def saes(self) -> dict[str, Path]:
        """The finished SAE of each k."""
        content = json.loads((self.directory / "sweep.json").read_text())
        assert all("metrics" in trial for trial in content["trials"]), content["trials"]
        return {trial["values"]["k"]: Path(trial["sae"]) for trial in content["trials"]}

    def wait_for_a_checkpoint(self) -> None:
        while not any(self.directory.glob("trials/*/*/*/[1-9]*")):
            assert self.process.poll() is None, self.finish()
            time.sleep(0.02)


def trainings_of(directory: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (words := process.info["cmdline"])
        and str(directory) in " ".join(words)
        and "sae_lens_train.py" in " ".join(words)
    ]


@pytest.fixture
def whole(tiny_args, tmp_path):
    """The SAEs of a sweep that was left alone."""
    sweep = Sweep(tiny_args, tmp_path / "whole", *GRID)
    status, _, stderr = sweep.finish()
    assert status == 0, stderr
    return sweep.saes()


def test_a_training_that_is_killed_goes_on_and_takes_nothing_down(tiny_args, tmp_path, whole):
    sweep = Sweep(tiny_args, tmp_path / "killed", *GRID)
    sweep.wait_for_a_checkpoint()
    trainings_of(tmp_path / "killed")[0].kill()
    status, _, stderr = sweep.finish()
    assert status == 0, stderr
    assert "going on from its last checkpoint" in stderr
    for k, sae in sweep.saes().items():
        assert_same(whole[k], sae)


@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_sweep_that_is_ended_goes_on_with_the_same_command(tiny_args, tmp_path, whole, number, exit_status):
    sweep = Sweep(tiny_args, tmp_path / "ended", *GRID)
    sweep.wait_for_a_checkpoint()
    os.kill(sweep.process.pid, number)
    status, _, stderr = sweep.finish()
    assert status == exit_status, stderr
    deadline = time.monotonic() + 30
    while trainings_of(tmp_path / "ended"):  # nothing is left that trains
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = Sweep(tiny_args, tmp_path / "ended", *GRID)
    status, _, stderr = again.finish()
    assert status == 0, stderr
    for k, sae in again.saes().items():
        assert_same(whole[k], sae)


def test_trials_that_promise_too_little_are_stopped_and_can_go_on(tiny_args, tmp_path):
    grid = ["--grid", "lr=3e-3,1e-3,1e-6", "k=16"]
    status, _, stderr = Sweep(tiny_args, tmp_path / "sweep", *grid, "--early_stop").finish()
    assert status == 0, stderr
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    stopped = [trial["values"]["lr"] for trial in content["trials"] if "stopped" in trial]
    assert "1e-6" in stopped and len(stopped) < 3
    whole = Sweep(tiny_args, tmp_path / "sweep", *grid)
    status, _, stderr = whole.finish()
    assert status == 0, stderr
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert all("metrics" in trial for trial in content["trials"])


@pytest.fixture
def cluster(monkeypatch):
    """A head and one more machine, both on loopback, one core each; what is killed of the second is its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    start = [*RAY, "start", "--num-cpus=1", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # of the machines, and of the sweep that comes to them
    try:
        subprocess.run([*start, "--head", f"--port={port}", "--include-dashboard=false"], check=True)
        before = {process.pid for process in psutil.process_iter() if process.name() == "raylet"}
        subprocess.run([*start, f"--address={address}"], check=True)
        (second,) = [p for p in psutil.process_iter() if p.name() == "raylet" and p.pid not in before]
        yield address, second
    finally:
        subprocess.run([*RAY, "stop", "--force"], check=False, capture_output=True)


def test_a_machine_that_is_lost_takes_no_trial_with_it(cluster, tiny_args, tmp_path, whole):
    address, raylet = cluster
    sweep = Sweep(tiny_args, tmp_path / "lost", *GRID, "--address", address)

    def on_second() -> list[psutil.Process]:
        mine = {child.pid for child in raylet.children(recursive=True)}
        return [process for process in trainings_of(tmp_path / "lost") if process.pid in mine]

    while not (on_second() and any((tmp_path / "lost").glob("trials/*/*/*/[1-9]*"))):
        assert sweep.process.poll() is None, sweep.finish()
        time.sleep(0.05)
    raylet.kill()
    status, _, stderr = sweep.finish()
    assert status == 0, stderr
    for k, sae in sweep.saes().items():
        assert_same(whole[k], sae)
