"""One run on two hosts: two network namespaces with a cable between them, and no other way to each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from support.many_processes import Launch, after_a_checkpoint, assert_close, kill_rank
from support.processes import ROOT, run_process
from support.trainings import run_flags

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces take root and iproute2"
    ),
]

ADDRESSES = ("10.77.13.1", "10.77.13.2")


@pytest.fixture(scope="module")
def hosts():
    """Their names; each sees its own loopback and the other's address."""
    names = [f"sae-host-{n}-{os.getpid()}" for n in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for n, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{n}")
            ip("-n", name, "link", "set", f"cable{n}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def on_hosts(hosts: list[str], n: int, flags: list[object], **more: str) -> list[Launch]:
    """Starts n processes on each."""
    return [
        Launch(
            n,
            flags,
            ("ip", "netns", "exec", host),
            NNODES="2",
            NODE_RANK=str(rank),
            MASTER_ADDR=ADDRESSES[0],
            MASTER_PORT="29477",
            **more,
        )
        for rank, host in enumerate(hosts)
    ]


def finished_sae(launches: list[Launch], timeout: float):
    """The SAE that one of the hosts names; both end well."""
    ended = [launch.finish(timeout) for launch in launches]
    assert [status for status, _, _ in ended] == [0, 0], ended
    (sae,) = [stdout.strip() for _, stdout, _ in ended if stdout]
    return type(ROOT)(sae)


def test_two_hosts_make_the_sae_of_one_process(hosts, trainings, tiny_model, text_file, tmp_path):
    def flags(name):
        return [*run_flags(tiny_model, text_file, tmp_path / name), "--dtype", "float64", "--lr", "1e-4"]

    status, _ = trainings.run(flags("one"))
    assert status == 0, trainings.shown()
    one = trainings.finished_sae()
    assert_close(finished_sae(on_hosts(hosts, 1, flags("two")), 120), one)


def test_a_process_that_dies_ends_the_run_on_both_hosts(hosts, tiny_model, text_file, tmp_path):
    flags = [*run_flags(tiny_model, text_file, tmp_path / "killed"), "--dtype", "float64"]
    launches = on_hosts(hosts, 1, flags)
    victim = next(launch for launch in launches if 1 in wait_for_ranks(launch))
    killed_at = after_a_checkpoint(victim, tmp_path / "killed", kill_rank(victim, 1))
    ended = {launch: launch.finish(60) for launch in launches}
    assert time.monotonic() - killed_at < 60
    assert [status for status, _, _ in ended.values()] == [1, 1]
    assert "rank 1 was killed by SIGKILL" in ended.pop(victim)[2]
    ((_, _, stderr),) = ended.values()
    assert "another rank is gone or hangs" in stderr


def wait_for_ranks(launch: Launch) -> dict[int, int]:
    while not (ranks := launch.ranks()):
        assert launch.process.poll() is None, launch.finish()
        time.sleep(0.05)
    return ranks


def test_a_host_that_is_not_there_is_said_in_one_line(hosts, tiny_model, text_file, tmp_path):
    launch = Launch(
        1,
        run_flags(tiny_model, text_file, tmp_path),
        ("ip", "netns", "exec", hosts[1]),
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.77.13.9",
        MASTER_PORT="29477",
        JOIN_TIMEOUT="5",
    )
    status, _, stderr = launch.finish(120)
    assert status == 1
    (error,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "MASTER_ADDR 10.77.13.9" in error and "Traceback" not in stderr


def test_four_processes_on_two_hosts_train_the_demo_to_a_healthy_sae(hosts, tmp_path):
    flags = ["@presets/demo.args", "--wandb_mode", "disabled", "--checkpoint_path", tmp_path, "--device", "cpu"]
    sae = finished_sae(on_hosts(hosts, 2, flags), 3000)
    done = run_process(
        sys.executable, "evaluate_sae_real_activations.py", "--sae_path", sae, "--device", "cpu", timeout=1200
    )
    assert done.status == 0, done.stderr
    assert "4/4 metrics healthy" in done.stdout, done.stdout
