"""No damage to a checkpoint goes unnoticed: the run goes on from the one before it."""

import os
import shutil
import signal
import time

import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.files.whole_directory import MANIFEST_FILENAME, check_manifest
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.training.directory import RunDirectory
from support.trainings import assert_same, paths_in, run_flags

pytestmark = pytest.mark.faults
RANGES = 16  # of each file


@pytest.fixture(scope="module")
def stopped_run(trainings, tiny_model, text_file, tmp_path_factory):
    """A run that was killed with two checkpoints, and the SAE of one that was left alone."""
    directory = tmp_path_factory.mktemp("stopped")

    def kill(pid):
        while len(paths_in(directory)) < 2:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    assert trainings.run(run_flags(tiny_model, text_file, directory / "whole"))[0] == 0
    whole = trainings.finished_sae()
    shutil.move(whole.parents[2], directory.parent / f"{directory.name}_whole")
    assert trainings.run(run_flags(tiny_model, text_file, directory), kill)[0] == -signal.SIGKILL
    (run,) = directory.glob("*/*")
    return run, directory.parent / f"{directory.name}_whole" / whole.relative_to(directory / "whole")


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def is_noticed(run, checkpoint):
    try:
        run.check_checkpoint(checkpoint)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def test_every_byte_range_of_a_checkpoint_is_guarded(stopped_run, tmp_path, record_fault):
    run = RunDirectory(stopped_run[0])
    run.claim()
    checkpoint = shutil.copytree(run.checkpoints()[0], tmp_path / "4096")
    manifest = run.check_checkpoint(checkpoint)
    n_flipped = n_missing = n_cut = 0
    for file in sorted(checkpoint.iterdir()):
        size = file.stat().st_size
        for i in range(RANGES):
            position = int((i + 0.5) * size / RANGES)
            flip(file, position)
            if file.name == MANIFEST_FILENAME and not is_noticed(run, checkpoint):
                same = check_manifest(checkpoint, "")  # a byte that says nothing, such as a space
                assert (same["files"], same["run"]) == (manifest["files"], manifest["run"])
            else:
                assert is_noticed(run, checkpoint), (file.name, position)
            flip(file, position)
            n_flipped += 1
        content = file.read_bytes()
        file.write_bytes(content[: size // 2])
        assert is_noticed(run, checkpoint), file.name
        file.unlink()
        assert is_noticed(run, checkpoint), file.name
        file.write_bytes(content)
        n_cut, n_missing = n_cut + 1, n_missing + 1
    assert not is_noticed(run, checkpoint)
    run.release()
    refused = "refused, naming the file; the checkpoint before it serves"
    record_fault("a byte of a checkpoint's files flipped, 16 ranges of each", n_flipped, refused, "nothing")
    record_fault("a checkpoint's file cut in half", n_cut, refused, "nothing")
    record_fault("a checkpoint's file missing", n_missing, refused, "nothing")


def test_a_run_whose_newest_checkpoint_is_damaged_ends_the_same(stopped_run, trainings, record_fault):
    run, whole = stopped_run
    (weights,) = RunDirectory(run).checkpoints()[0].glob("sae_weights.safetensors")
    flip(weights, weights.stat().st_size // 2)
    assert trainings.run(["--resume", str(run)])[0] == 0, trainings.shown()
    assert_same(whole, trainings.finished_sae())
    record_fault("the newest checkpoint damaged", 1, "said; resumed from the one before; every tensor equal", "nothing")


def test_every_byte_range_of_a_finished_sae_is_guarded(stopped_run, tmp_path, record_fault):
    sae = shutil.copytree(stopped_run[1], tmp_path / "sae")
    n_flipped = 0
    for file in sorted(sae.iterdir()):
        if file.name != MANIFEST_FILENAME:
            for i in range(RANGES):
                position = int((i + 0.5) * file.stat().st_size / RANGES)
                flip(file, position)
                with pytest.raises(UserError, match=f"damaged: {file.name} is not what was written there"):
                    load_sae(sae, "cpu")
                flip(file, position)
                n_flipped += 1
    load_sae(sae, "cpu")
    record_fault("a byte of a finished SAE's files flipped", n_flipped, "refused, naming the file", "nothing")
