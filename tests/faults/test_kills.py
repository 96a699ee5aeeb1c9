"""Killed at any moment and resumed, a run ends in the same SAE, bit for bit, as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.trainings import assert_same, paths_in, run_flags

ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "standard", "gated")


def flags_of_a_run(*args: Any) -> list[str]:
    """With ten checkpoints, so that there is time to kill it in."""
    return [*run_flags(*args), "--training_tokens", "40960"]


def after(seconds: float) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        time.sleep(seconds)
        try_to_kill(pid)

    return kill


def inside_a_checkpoint(directory: Path, number: int, delay: float, killed: list[Path]) -> Callable[[int], None]:
    """Kills some seconds into the writing of the checkpoint of that number, or a later one if it was done by then."""

    def kill(pid: int) -> None:
        seen: set[Path] = set()
        while Path(f"/proc/{pid}").exists():
            for partial in paths_in(directory, "*/*/.[1-9]*.partial"):
                if partial not in seen:
                    seen.add(partial)
                    if len(seen) >= number:
                        time.sleep(delay)
                        if partial.exists():
                            try_to_kill(pid)
                            if partial.exists():
                                killed.append(partial)
                                return
            time.sleep(0.0005)

    return kill


def after_the_next_checkpoint(directory: Path, delay: float) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        def newest() -> int:
            return max((int(path.name) for path in paths_in(directory)), default=0)

        before = newest()
        while Path(f"/proc/{pid}").exists() and newest() == before:
            time.sleep(0.001)
        time.sleep(delay)
        try_to_kill(pid)

    return kill


def try_to_kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_and_resume(trainings, flags, kills) -> tuple[int, Path]:
    """Kills a run in each of these ways, resuming it after each, and lets it end; how many died, and the SAE."""
    n_killed = 0
    for kill in kills:
        status, _ = trainings.run([*flags, "--resume"], kill)
        if status == 0:
            return n_killed, trainings.finished_sae()
        assert status == -signal.SIGKILL, trainings.shown()
        n_killed += 1
    status, _ = trainings.run([*flags, "--resume"])
    assert status == 0, trainings.shown()
    return n_killed, trainings.finished_sae()


def kill_evenly(trainings, tiny_model, text_file, tmp_path, architecture, n_kills, n_inside) -> tuple[int, int]:
    """Kills at times spread evenly over an undisturbed run's, and inside checkpoints until there are so many of these;
    how many there were of all, and of these. A kill misses where the run, or the checkpoint, is done by then.
    """
    flags = flags_of_a_run(tiny_model, text_file, tmp_path / "whole", architecture)
    status, _ = trainings.run(flags)
    assert status == 0, trainings.shown()
    whole = trainings.finished_sae()
    _, seconds = trainings.run(flags_of_a_run(tiny_model, text_file, tmp_path / "timed", architecture))

    n_killed, inside = 0, list[Path]()
    for i in range(n_kills):
        flags = flags_of_a_run(tiny_model, text_file, tmp_path / f"{i}", architecture)
        n, sae = kill_and_resume(trainings, flags, [after(seconds * (i + 0.5) / n_kills)])
        n_killed += n
        assert_same(whole, sae)
    for i in range(4 * n_inside):
        if len(inside) == n_inside:
            break
        directory = tmp_path / f"inside_{i}"
        kill = inside_a_checkpoint(directory, 1 + i % 8, random.Random(i).uniform(0, 0.015), inside)
        n, sae = kill_and_resume(trainings, flags_of_a_run(tiny_model, text_file, directory, architecture), [kill])
        n_killed += n
        assert_same(whole, sae)
    return n_killed, len(inside)


@pytest.mark.faults
def test_two_hundred_kills_end_in_the_same_sae(trainings, tiny_model, text_file, tmp_path, record_fault):
    n_killed = n_inside = 0
    for architecture in ARCHITECTURES:
        killed, inside = kill_evenly(trainings, tiny_model, text_file, tmp_path / architecture, architecture, 38, 10)
        n_killed, n_inside = n_killed + killed, n_inside + inside
    assert n_killed >= 200
    assert n_inside >= 40
    record_fault(
        "SIGKILL at times spread evenly over the run", n_killed - n_inside, "resumed; every tensor equal", "nothing"
    )
    record_fault("SIGKILL while a checkpoint is written", n_inside, "resumed; every tensor equal", "nothing")


@pytest.mark.faults
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_sae(
    trainings, tiny_model, text_file, tmp_path, record_fault
):
    assert trainings.run(flags_of_a_run(tiny_model, text_file, tmp_path / "whole"))[0] == 0, trainings.shown()
    whole, directory = trainings.finished_sae(), tmp_path / "killed"
    kills = [after_the_next_checkpoint(directory, random.Random(i).uniform(0, 0.03)) for i in range(8)]
    n, sae = kill_and_resume(trainings, flags_of_a_run(tiny_model, text_file, directory), kills)
    assert n >= 5
    assert_same(whole, sae)
    record_fault("SIGKILL again and again in one run", n, "resumed each time; every tensor equal", "nothing")


def test_some_kills_end_in_the_same_sae(trainings, tiny_model, text_file, tmp_path):
    """The short form."""
    n_killed, n_inside = kill_evenly(trainings, tiny_model, text_file, tmp_path, "batchtopk", 3, 1)
    assert n_killed >= 3
    assert n_inside == 1
