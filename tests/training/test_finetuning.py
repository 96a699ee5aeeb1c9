"""A run whose last steps have --finetune_loss: what it records, and that it goes on where it was."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from sae_toolkit.errors import UserError
from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.record.panels import panels
from support.trainings import assert_same, run_flags

N_BEFORE, N_STEPS, BATCH = 14, 20, 128


def finetuning_flags(tiny_model, text_file, directory):
    return [
        *run_flags(tiny_model, text_file, directory),
        *("--training_tokens", str(N_STEPS * BATCH), "--train_batch_size_tokens", str(BATCH)),
        *("--finetune_loss", "kl", "--finetune_fraction", "0.3", "--checkpoint_every", str(2 * BATCH)),
    ]


@pytest.fixture(scope="module")
def whole(trainings, tiny_model, text_file, tmp_path_factory):
    """The SAE of a run that was left alone, and what the run showed."""
    status, _ = trainings.run(finetuning_flags(tiny_model, text_file, tmp_path_factory.mktemp("whole")))
    assert status == 0, trainings.shown()
    return trainings.finished_sae(), trainings.shown()


def test_the_phase_is_shown_and_recorded(whole):
    sae, shown = whole
    assert re.search(r"time +about .*, then 6 fine-tuning steps of \d", shown)
    assert "the last 6 of 20 steps are fine-tuning: --finetune_loss kl" in shown
    assert re.search(r"fine-tuning: 100.0% tokens=2560 .* KL=\d", shown)
    lines = [json.loads(line) for line in (sae.parent / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] >= N_BEFORE for line in lines} == {False, True}
    for line in lines:
        assert ("losses/kl_loss" in line) == ("metrics/finetune_weight" in line) == (line["step"] >= N_BEFORE)
    assert panels({"": lines[-1]})["learning/kl_loss"] == lines[-1]["losses/kl_loss"] > 0
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    assert (metadata["finetune_loss"], metadata["finetune_fraction"]) == ("kl", 0.3)
    assert metadata["finetune_weight"] > 0


def test_a_run_that_is_killed_goes_on_in_either_phase(trainings, tiny_model, text_file, tmp_path, whole, record_fault):
    flags = finetuning_flags(tiny_model, text_file, tmp_path)

    def kill(pid):
        while not list(tmp_path.glob(f"*/*/{(N_BEFORE + 2) * BATCH}")):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    status, _ = trainings.run(flags, kill)
    assert status == -signal.SIGKILL
    (run,) = tmp_path.glob("*/*")
    for n_steps in (N_BEFORE, N_BEFORE + 2):  # where the phase begins, and within it
        copied = shutil.copytree(run, tmp_path / f"from_{n_steps}" / run.parent.name / run.name)
        status, _ = trainings.run(["--resume", str(copied / str(n_steps * BATCH))])
        assert status == 0, trainings.shown()
        assert_same(whole[0], trainings.finished_sae())
    record_fault("SIGKILL while fine-tuning with --finetune_loss", 1, "resumed; every tensor equal", "nothing")


def test_a_whole_run_of_fine_tuning_reads_all_rows_and_measures_held_out_text(script, tiny_run):
    done = script(
        "sae_lens_train.py", *tiny_run, "--finetune_loss", "ce", "--finetune_fraction", 1, "--eval_every", 2048
    )
    assert done.status == 0, done.stderr
    assert "the last 2 of 2 steps are fine-tuning: --finetune_loss ce" in done.stderr
    assert "held out after 2,048 tokens" in done.stderr
    assert "left out 0 of 2," in done.stderr  # the activations that were trained on are counted


def test_activations_of_a_cache_are_for_the_steps_before(script, tiny_run, tmp_path):
    """The model is loaded for the fine-tuning, and the SAE does not depend on whether the cache was there."""
    flags = [*tiny_run, "--finetune_loss", "kl", "--finetune_fraction", 0.5, "--cache_activations", tmp_path / "cache"]
    first, second = (script("sae_lens_train.py", *flags) for _ in range(2))
    assert (first.status, second.status) == (0, 0), second.stderr
    assert " 0 contexts read" in first.stderr
    assert " 0 computed" in second.stderr
    weights = [load_file(f"{done.stdout.strip()}/sae_weights.safetensors") for done in (first, second)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layers", "1", "2"], "--finetune_loss kl: for an SAE at one hook, not at several"),
        (["--shard_features", "--architecture", "topk"], "--finetune_loss kl, --shard_features: "),
        ([], "--finetune_loss kl: for a single process, not for 2"),
    ],
)
def test_what_fine_tuning_cannot_do_is_refused(more, says):
    flags = ["--finetune_loss", "kl", "--train_batch_size_tokens", "4096", "--training_tokens", "50000", *more]
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
        check_world_size(parse_training_flags(flags), 2)
