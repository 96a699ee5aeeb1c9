"""Whatever the wandb host does, the training goes on, ends in time, and its record is on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.loopback_wandb import KEY, LoopbackWandb
from support.processes import ROOT, run_process
from support.wandb_reader import read_offline_runs

pytestmark = pytest.mark.faults

RECORD = """
import json, time
from sae_toolkit.terminal.console import set_up_logging
from sae_toolkit.training.record.wandb_run import WandbRun
set_up_logging()
times = [time.monotonic()]
run = WandbRun("online", run_id="abc12345", project="p", entity=None, name="n", config={"a": 1})
times.append(time.monotonic())
for step in range(20):
    run.log({"loss": step}, step=step)
    time.sleep(0.1)
times.append(time.monotonic())
run.finish()
times.append(time.monotonic())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def record(host: LoopbackWandb, directory: Path):
    """A process that records 20 steps; with the seconds that its start, its steps and its end took."""
    done = run_process(sys.executable, "-c", RECORD, **(host.environment(directory) | {"PYTHONPATH": "."}))
    assert done.status == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr + done.stdout
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("behaviour", ["refuses", "hangs", 401, 403, 404, 429, 500])
def test_a_host_that_fails_at_the_start_makes_the_record_an_offline_one(tmp_path, record_fault, behaviour):
    host = LoopbackWandb(behaviour)
    done, (start, _, end) = record(host, tmp_path)
    assert start < 40
    assert end < 10
    found = re.search(
        r"^wandb: .*; the run is recorded offline; `wandb sync (\S+)` uploads it$", done.stderr, re.MULTILINE
    )
    assert found, done.stderr
    assert list(Path(found[1]).glob("run-*.wandb"))
    (run,) = read_offline_runs(tmp_path)
    assert [row["loss"] for row in run.history] == [str(step) for step in range(20)]
    record_fault(
        f"wandb host at the start: {behaviour}",
        host.injected[str(behaviour)],
        f"recorded offline, after {start:.0f} s",
        "nothing",
    )


@pytest.mark.parametrize("behaviour", ["refuses", "hangs", 500])
def test_a_host_that_dies_in_the_middle_does_not_hold_the_run(tmp_path, record_fault, behaviour):
    host = LoopbackWandb("works")
    host.becomes = behaviour
    done, (_, steps, end) = record(host, tmp_path)
    assert steps < 15  # recording waits for nobody
    assert end < 75
    found = re.search(r"the record is whole on disk: `wandb sync (\S+)` uploads it", done.stderr)
    assert found, done.stderr
    assert list(Path(found[1]).glob("run-*.wandb"))
    record_fault(
        f"wandb host in the middle: {behaviour}",
        host.injected[str(behaviour)],
        f"steps went on; the end waited {end:.0f} s and named `wandb sync`",
        "nothing: the record is on disk",
    )


def test_a_host_that_is_back_in_time_gets_the_whole_record(tmp_path, record_fault):
    host = LoopbackWandb("works")
    host.becomes = 500
    host.recovers_after = 6
    done, _ = record(host, tmp_path)
    assert "wandb sync" not in done.stderr
    assert [row["loss"] for row in host.history] == list(range(20))
    record_fault("wandb host answers 500 six times", host.injected["500"], "wandb retried by itself", "nothing")


@pytest.mark.parametrize("fault", ["the host hangs", "wandb's own process is killed"])
def test_the_training_comes_out_the_same(tiny_run, tmp_path, record_fault, fault):
    flags = [*tiny_run, "--training_tokens", 20_480]
    whole = run_process(sys.executable, "sae_lens_train.py", *flags)
    host = LoopbackWandb("works")
    if fault == "the host hangs":
        host.becomes = "hangs"
    environment = os.environ | host.environment(tmp_path) | {"WANDB_FINISH_TIMEOUT": "10"}
    online = ("--wandb_mode", "online", "--set", "logger.wandb_log_frequency=1")
    command = [str(part) for part in (sys.executable, "sae_lens_train.py", *flags, *online)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        shown = ""
        while not re.search(r"training: \d", shown):
            character = process.stderr.read(1)
            assert character, shown
            shown += character
        if fault != "the host hangs":
            (child,) = children(process.pid, "wandb-core")
            os.kill(child, signal.SIGKILL)
            host.injected["killed"] += 1
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, shown + stderr
    one, other = (load_file(f"{path.strip()}/sae_weights.safetensors") for path in (whole.stdout, stdout))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [line for line in stderr.splitlines() if re.match(r"wandb: .*(goes on|wandb sync)", line)]
    assert 1 <= len(lines) <= 2, stderr
    record_fault(
        f"wandb in the middle of training: {fault}",
        sum(host.injected.values()),
        "training went on to the same SAE, with one warning",
        "the record after the kill" if "killed" in fault else "nothing: the record is on disk",
    )


def test_a_signal_while_wandb_is_waited_for_costs_no_sae(tiny_run, tmp_path, record_fault):
    host = LoopbackWandb("works")
    host.becomes = "hangs"
    environment = os.environ | host.environment(tmp_path)
    flags = [*tiny_run, "--wandb_mode", "online", "--set", "logger.wandb_log_frequency=1"]
    command = [str(part) for part in (sys.executable, "sae_lens_train.py", *flags)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("checkpoints/*/*/final_*")):
            time.sleep(0.05)
        time.sleep(6)  # until it is wandb that is waited for
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    (final,) = tmp_path.glob("checkpoints/*/*/final_*")
    assert f"stopped by SIGTERM; the SAE is finished: {final}" in stderr
    record_fault("SIGTERM while wandb is waited for at the end", 1, "stopped; the finished SAE is named", "nothing")


def children(pid: int, name: str) -> list[int]:
    """The processes of a name below another process."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            _, comm, rest = re.split(r" \(|\) ", (directory / "stat").read_text(), maxsplit=2)
        except OSError:
            continue
        if int(rest.split()[1]) == pid and name in comm:
            found.append(int(directory.name))
    return found
