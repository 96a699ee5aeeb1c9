"""A run on several processes is the run of one, and loses nothing when one of them dies."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from support.many_processes import Launch, after_a_checkpoint, assert_close, kill_rank
from support.trainings import assert_same, run_flags


@pytest.fixture
def flags(tiny_model, text_file, tmp_path):
    """Of a run of 20 steps that is saved every 4, in the directory of that name."""

    def of(name: str) -> list[object]:
        return [*run_flags(tiny_model, text_file, tmp_path / name), "--dtype", "float64", "--lr", "1e-4"]

    return of


def test_two_processes_make_the_sae_of_one(trainings, flags):
    status, _ = trainings.run(flags("one"))
    assert status == 0, trainings.shown()
    one = trainings.finished_sae()
    two = Launch(2, flags("two")).finished_sae()
    assert_close(two, one)
    assert calibrated_on(two) == calibrated_on(one) > 0


def calibrated_on(sae: Path) -> int:
    return json.loads((sae / "cfg.json").read_text())["metadata"]["calibrated_on_tokens"]


@pytest.mark.scale
def test_held_out_text_of_a_few_long_contexts_counts_once(trainings, flags, tiny_model, tmp_path):
    """Five contexts are too few for two processes to share, so that each runs all of them."""
    longer = tmp_path / "longer"
    shutil.copytree(tiny_model, longer)
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    own = ["--model_name", str(longer), "--context_size", "2048", "--training_tokens", "16384"]
    status, _ = trainings.run([*flags("one"), *own])
    assert status == 0, trainings.shown()
    one = trainings.finished_sae()
    two = Launch(2, [*flags("two"), *own]).finished_sae()
    assert_close(two, one)
    assert calibrated_on(two) == calibrated_on(one) > 0


@pytest.mark.scale
def test_two_processes_train_on_what_the_assistant_says_as_one_does(trainings, flags, text_file, tmp_path):
    chat = tmp_path / "chat.jsonl"
    with chat.open("w") as file:
        for text in text_file.read_text().split("\n\n"):
            messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")
    own = ["--dataset_path", str(chat), "--chat_tokens", "assistant", "--training_tokens", "16384"]
    status, _ = trainings.run([*flags("one"), *own])
    assert status == 0, trainings.shown()
    one = trainings.finished_sae()
    assert_close(Launch(2, [*flags("two"), *own]).finished_sae(), one)


def test_a_process_that_dies_ends_the_run_with_its_reason(flags, tmp_path):
    launch = Launch(2, flags("killed"))
    killed_at = after_a_checkpoint(launch, tmp_path / "killed", kill_rank(launch, 1))
    status, stdout, stderr = launch.finish()
    assert time.monotonic() - killed_at < 60
    assert (status, stdout) == (1, "")
    assert "error: rank 1 was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.scale
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_features_spread_over_processes_make_the_sae_of_one(trainings, flags, architecture):
    status, _ = trainings.run([*flags("one"), "--architecture", architecture])
    assert status == 0, trainings.shown()
    one = trainings.finished_sae()
    sharded = Launch(2, [*flags("two"), "--architecture", architecture, "--shard_features"]).finished_sae()
    assert_close(sharded, one)
    ours, theirs = (json.loads((sae / "cfg.json").read_text()) for sae in (sharded, one))
    assert ours["d_sae"] == theirs["d_sae"]
    assert ours["metadata"]["num_dead_features"] == theirs["metadata"]["num_dead_features"]
    assert ours["metadata"]["l0"] == pytest.approx(theirs["metadata"]["l0"])


@pytest.mark.scale
@pytest.mark.parametrize("sharded", [[], ["--shard_features"]])
def test_several_processes_begin_with_the_sae_of_rank_0(trainings, flags, sharded):
    status, _ = trainings.run(flags("first"))
    assert status == 0, trainings.shown()
    begin = ["--init_from", str(trainings.finished_sae())]
    status, _ = trainings.run([*flags("one"), *begin])
    assert status == 0, trainings.shown()
    assert_close(Launch(2, [*flags("two"), *begin, *sharded]).finished_sae(), trainings.finished_sae())


@pytest.mark.scale
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (2, 1), (1, 2)])
def test_a_checkpoint_goes_on_on_whatever_number_of_shards(trainings, flags, tmp_path, before, after):
    """A checkpoint holds the whole SAE: with Adam's moments and counters it is spread anew."""
    status, _ = trainings.run(flags("whole"))
    assert status == 0, trainings.shown()
    whole = trainings.finished_sae()
    launch = Launch(before, [*flags("stopped"), "--shard_features"])
    after_a_checkpoint(launch, tmp_path / "stopped", launch.process.terminate)
    status, _, stderr = launch.finish()
    assert status == 143, stderr
    assert_close(Launch(after, [*flags("stopped"), "--shard_features", "--resume"]).finished_sae(), whole)


@pytest.mark.scale
@pytest.mark.parametrize("rank", [0, 1])
def test_max_restarts_goes_on_from_the_last_checkpoint_to_the_same_sae(flags, tmp_path, rank):
    whole = Launch(2, flags("whole")).finished_sae()
    launch = Launch(2, flags("killed"), MAX_RESTARTS="1")
    after_a_checkpoint(launch, tmp_path / "killed", kill_rank(launch, rank))
    assert_same(whole, launch.finished_sae())


@pytest.mark.scale
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (2, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(trainings, flags, tmp_path, before, after):
    """SIGTERM to the launcher: a checkpoint is written, exit status 143; then the SAE of an undisturbed run."""
    whole = Launch(before, flags("whole")).finished_sae()
    launch = Launch(before, flags("stopped"))
    after_a_checkpoint(launch, tmp_path / "stopped", launch.process.terminate)
    status, _, stderr = launch.finish()
    assert status == 143, stderr
    assert "stopped by SIGTERM; to go on: ./run_simple.sh" in stderr
    resumed = [*flags("stopped"), "--resume"]
    if after == 1:
        status, _ = trainings.run(resumed)
        assert status == 0, trainings.shown()
        sae = trainings.finished_sae()
    else:
        sae = Launch(after, resumed).finished_sae()
    assert_close(sae, whole)
    if before == after:
        assert_same(sae, whole)
