"""A run that is stopped, damaged or short of room loses nothing: it goes on, and ends as if nothing had been."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from sae_lens import TrainingSAE

from sae_toolkit import ROOT
from sae_toolkit.settings.values import Interval
from sae_toolkit.terminal.stop_signals import TERMINATIONS, Stopped, hear_stop_signals
from support.processes import HANGS, run_process
from support.trainings import assert_same, paths_in, run_flags


@pytest.fixture(scope="module")
def whole(trainings, tiny_model, text_file, tmp_path_factory):
    """The SAE of a run that was left alone."""
    status, _ = trainings.run(run_flags(tiny_model, text_file, tmp_path_factory.mktemp("whole")))
    assert status == 0, trainings.shown()
    return trainings.finished_sae()


@pytest.fixture
def flags(tiny_model, text_file, tmp_path):
    return run_flags(tiny_model, text_file, tmp_path)


@pytest.fixture
def stopped_run(trainings, flags, tmp_path):
    """Directory of a run that was killed with two checkpoints."""

    def kill(pid):
        while len(paths_in(tmp_path)) < 2:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    status, _ = trainings.run(flags, kill)
    assert status == -signal.SIGKILL
    (run,) = tmp_path.glob("*/*")
    return run


def checkpoints(run):
    return sorted((path for path in run.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.faults) for n in (signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(trainings, flags, whole, number, record_fault):
    flags = [*flags, "--checkpoint_every", "0"]

    def stop(pid):
        while not re.search(r"training: \d", trainings.shown()):
            time.sleep(0.005)
        os.kill(pid, number)

    status, _ = trainings.run(flags, stop)
    assert status == 128 + number
    shown = trainings.shown()
    assert "Traceback" not in shown
    checkpoint = Path(re.search(r"to go on: \S+ sae_lens_train.py --resume (\S+)", shown)[1])
    assert 1024 <= int(checkpoint.name) < 20480
    status, _ = trainings.run(["--resume", str(checkpoint)])
    assert status == 0, trainings.shown()
    assert_same(whole, trainings.finished_sae())
    assert checkpoints(checkpoint.parent) == []  # they were there to resume from
    record_fault(f"{number.name} while training", 1, "saved, then resumed; every tensor equal", "nothing")


@pytest.mark.parametrize("number", TERMINATIONS)
def test_every_termination_stops_the_run_and_is_the_processs_own_again_afterwards(number):
    before = signal.getsignal(number)
    with hear_stop_signals() as signals:
        with signals.deferred():
            signal.raise_signal(number)
            assert signals.received == number
        with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
            signal.raise_signal(number)
    assert stopped.value.exit_status == 128 + number
    assert signal.getsignal(number) == before


def test_a_signal_before_the_first_step_ends_the_script_with_its_status(flags):
    process = subprocess.Popen(
        [sys.executable, "sae_lens_train.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    time.sleep(2)  # importing SAELens takes longer
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; nothing was trained yet" in process.stderr.read()


def test_a_terminal_that_closes_costs_nothing(tiny_model, text_file, tmp_path, record_fault):
    """As when an ssh session drops: SIGHUP, and a standard error that cannot be written to any more."""
    flags = run_flags(tiny_model, text_file, tmp_path)

    def open_session():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is switched off where the tests run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "sae_lens_train.py", *flags, "--train_batch_size_tokens", "32", "--checkpoint_every", "0"],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},  # with a live view
        start_new_session=True,
        preexec_fn=open_session,
    )
    os.close(theirs)
    shown = b""
    while not re.search(rb"training \d+%", shown):
        shown += os.read(ours, 1000)
    os.close(ours)
    assert shown.index(b"importing SAELens") < shown.index(b"model ")
    assert process.wait(60) == 128 + signal.SIGHUP
    (run,) = tmp_path.glob("*/*")
    assert len(checkpoints(run)) == 1
    assert "stopped by SIGHUP; to go on: " in (run / "run.log").read_text()
    record_fault(
        "the terminal closes (a dropped ssh session)", 1, "saved; exit status 129; run.log says how to go on", "nothing"
    )


def test_the_launcher_passes_a_termination_on(flags, tmp_path, record_fault):
    """Only the script itself gets the signal, as from a scheduler."""
    flags = [*flags, "--train_batch_size_tokens", "32", "--checkpoint_every", "0"]
    process = subprocess.Popen(
        ["./run_saelens_training.sh", "demo", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not paths_in(tmp_path, "*/*/run.log"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + signal.SIGTERM
    assert "to go on: " in stderr
    assert "healthy" not in stdout  # no evaluation of what is not finished
    record_fault("SIGTERM to the launcher alone", 1, "passed on, saved; exit status 143", "nothing")


def test_a_run_with_the_same_flags_is_found_and_one_without_a_checkpoint_begins_anew(trainings, flags, whole, tmp_path):
    def kill(pid):
        while not paths_in(tmp_path, "*/*/run.log"):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    status, _ = trainings.run([*flags, "--checkpoint_every", "0", "--resume", "auto"], kill)
    assert status == -signal.SIGKILL
    (run,) = tmp_path.glob("*/*")
    status, _ = trainings.run([*flags, "--checkpoint_every", "0", "--resume", "auto"])
    assert status == 0, trainings.shown()
    assert trainings.finished_sae().parent == run
    assert_same(whole, trainings.finished_sae())
    status, _ = trainings.run(["--resume", str(run)])
    assert status == 2
    assert "this run is finished" in trainings.shown()


def test_a_run_that_was_killed_while_its_directory_was_made_begins_anew(stopped_run, trainings, flags, whole):
    partial = stopped_run.with_name(f".{stopped_run.name}.partial")
    stopped_run.rename(partial)
    (partial / "manifest.json").unlink()  # it is written last
    for checkpoint in checkpoints(partial):
        shutil.rmtree(checkpoint)
    status, _ = trainings.run([*flags, "--resume"])
    assert status == 0, trainings.shown()
    assert_same(whole, trainings.finished_sae())


def test_a_sparsity_weight_that_is_adjusted_goes_on_where_it_was(trainings, tiny_model, text_file, tmp_path):
    flags = [*run_flags(tiny_model, text_file, tmp_path, architecture="standard"), "--target_l0", "40"]
    status, _ = trainings.run(flags)
    assert status == 0, trainings.shown()
    whole = trainings.finished_sae()
    assert json.loads((whole / "cfg.json").read_text())["metadata"]["l1_coefficient"] != 5.0

    def stop(pid):
        while not paths_in(tmp_path):
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)

    status, _ = trainings.run(flags, stop)
    assert status == 143
    status, _ = trainings.run([*flags, "--resume"])
    assert status == 0, trainings.shown()
    assert_same(whole, trainings.finished_sae())


def test_what_the_terminal_showed_is_in_run_log(stopped_run, trainings):
    status, _ = trainings.run(["--resume", str(stopped_run)])
    assert status == 0
    log = (stopped_run / "run.log").read_text()
    lines = [line.strip() for line in trainings.shown().split("\n") if line.startswith(("model ", "resuming after"))]
    assert len(lines) == 2
    assert all(line in log for line in lines)
    assert re.search(r"training: 100.0% .*explained_variance=", log)


def test_a_damaged_checkpoint_is_passed_over_and_named(stopped_run, trainings, whole):
    newest = checkpoints(stopped_run)[-1]
    weights = newest / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    status, _ = trainings.run(["--resume", str(newest)])
    assert status == 2
    assert "damaged: sae_weights.safetensors is not what was written there" in trainings.shown()
    status, _ = trainings.run(["--resume", str(stopped_run)])
    assert status == 0, trainings.shown()
    assert f"--resume {newest}: damaged" in trainings.shown()
    assert_same(whole, trainings.finished_sae())


def test_a_checkpoint_of_another_run_is_refused(stopped_run, trainings, flags, tmp_path, record_fault):
    other = tmp_path.parent / f"{tmp_path.name}_other"
    other_flags = [*flags, "--seed", "1", "--n_checkpoints", "1", "--checkpoint_path", str(other)]
    assert trainings.run(other_flags)[0] == 0
    (foreign,) = other.glob("*/*/[1-9]*")
    moved = shutil.copytree(foreign, stopped_run / "39000")
    status, _ = trainings.run(["--resume", str(moved)])
    assert status == 2
    assert f"--resume {moved}: belongs to another run" in trainings.shown()
    record_fault("a checkpoint swapped between runs", 1, "refused in one line", "nothing")


def test_a_run_that_another_process_is_writing_to_is_refused(trainings, flags, tmp_path, record_fault):
    refused = []

    def resume_as_well(pid):
        while not paths_in(tmp_path):
            time.sleep(0.001)
        (run,) = tmp_path.glob("*/*")
        os.kill(pid, signal.SIGSTOP)
        refused.append(run_process(sys.executable, "sae_lens_train.py", "--resume", run))
        refused.append(pid)
        os.kill(pid, signal.SIGCONT)

    assert trainings.run(flags, resume_as_well)[0] == 0
    outcome, pid = refused
    assert outcome.status == 2
    assert f"process {pid} on {os.uname().nodename} is writing to this run" in outcome.error_lines[0]
    record_fault("two processes on one run", 1, "the second is refused in one line", "nothing")


def test_readings_are_refused_where_the_run_kept_no_text_for_them(script, tiny_run):
    run = [*tiny_run, "--architecture", "standard", "--n_checkpoints", 1]
    final = Path(script("sae_lens_train.py", *run).stdout.strip())
    shutil.rmtree(final)  # so that the run is not finished
    done = script("sae_lens_train.py", *run, "--eval_every", 1024, "--resume")
    assert done.status == 2, done.stderr
    assert f"--eval_every 1024: the run in {final.parent} kept no held-out text" in done.error_lines[0]


def test_checkpoints_are_kept_as_asked(trainings, flags, tmp_path):
    seen = set()

    def watch(pid):
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            seen.add(tuple(int(path.name) for run in tmp_path.glob("*/*") for path in checkpoints(run)))
            time.sleep(0.001)

    assert trainings.run([*flags, "--keep", "1", "--n_checkpoints", "1"], watch)[0] == 0
    (milestone,) = checkpoints(trainings.finished_sae().parent)
    assert int(milestone.name) > 10000
    assert (
        max(len([n for n in names if n != int(milestone.name)]) for names in seen) <= 2
    )  # the last, until the next is whole
    TrainingSAE.load_from_disk(milestone)


def test_a_full_disk_costs_the_new_checkpoint_and_not_the_old_one_or_the_run(
    trainings, tiny_model, text_file, disk_of, whole, record_fault
):
    """A checkpoint takes 1.6 MB, the finished SAE 0.3 MB."""
    assert trainings.run(run_flags(tiny_model, text_file, disk_of("2m")))[0] == 0, trainings.shown()
    assert re.search(
        r"the checkpoint at 8,192 tokens is not saved: it takes .*; the last is \S+/4096", trainings.shown()
    )
    assert_same(whole, trainings.finished_sae())
    record_fault(
        "a disk with room for one checkpoint",
        trainings.shown().count("is not saved"),
        "each is announced and left out; the run ends in the same SAE",
        "those checkpoints",
    )


def test_a_disk_that_fails_in_the_middle_of_a_checkpoint_costs_that_checkpoint_alone(
    trainings, flags, whole, tmp_path, record_fault
):
    """A limit on the size of files stands for a quota: there is room, and then there is none."""

    def limit(pid):
        while not paths_in(tmp_path):
            time.sleep(0.001)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        while "not saved" not in trainings.shown():
            time.sleep(0.001)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert trainings.run(flags, limit)[0] == 0, trainings.shown()
    assert re.search(r"is not saved: .*; the last is", trainings.shown())
    assert not list(tmp_path.glob("*/*/.*.partial"))
    assert_same(whole, trainings.finished_sae())
    record_fault(
        "no room in the middle of a checkpoint (a limit on file size)",
        trainings.shown().count("is not saved"),
        "announced; the last one stays; the run ends in the same SAE",
        "that checkpoint",
    )


def test_losses_that_are_not_finite_stop_the_run_at_its_last_good_checkpoint(trainings, flags, record_fault):
    status, _ = trainings.run([*flags, "--lr", "1e15", "--architecture", "standard", "--checkpoint_every", "0"])
    assert status == 1, trainings.shown()
    (line,) = [line for line in trainings.shown().splitlines() if line.startswith("error:")]
    assert "10 steps in a row had a loss or gradient that is not finite" in line
    checkpoint = Path(line.rsplit(" ", 1)[1])
    assert (checkpoint / "manifest.json").is_file()
    record_fault(
        "losses that are not finite, 10 in a row",
        1,
        "not applied; stopped with exit status 1 and the last good checkpoint",
        "nothing",
    )


def test_intervals_are_read_as_they_are_written():
    assert Interval.parse("90s") == Interval(seconds=90)
    assert Interval.parse("30min") == Interval(seconds=1800)
    assert Interval.parse("2h") == Interval(seconds=7200)
    assert Interval.parse("1000000") == Interval(tokens=1_000_000)
    assert not Interval.parse("0").is_over(1e9, 10**9)
