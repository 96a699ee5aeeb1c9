"""A run is recorded in TensorBoard as in wandb, and measuring held-out text changes nothing of it.

What else wandb records, of the demo, is in tests/test_end_to_end.py.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.short_demo import PANELS, SHORT_DEMO
from support.wandb_reader import read_offline_runs

OF_FINETUNING = {"learning/kl_loss", "learning/finetune_weight"}


@pytest.fixture
def train(trainings, tiny_model, text_file, tmp_path):
    """Trains the short demo, on the tiny model and its text, and returns the finished SAE."""
    own = [
        *("--model_name", tiny_model, "--layer", 1, "--dataset_path", text_file, "--context_size", 64, "--k", 8),
        *("--held_out_fraction", 0.02, "--eval_every", 6_000, "--checkpoint_path", tmp_path),
    ]

    def run(*flags: object) -> Path:
        done = trainings.script("sae_lens_train.py", *SHORT_DEMO, *own, *flags, WANDB_DIR=str(tmp_path))
        assert done.status == 0, done.stderr
        return Path(done.stdout.strip())

    return run


def test_an_sae_is_measured_on_the_same_held_out_text_each_time_which_changes_nothing_of_it(train, tmp_path):
    measured = train("--wandb_mode", "offline")
    one, other = (json.loads(line) for line in (measured.parent / "held_out.jsonl").read_text().splitlines())
    assert (one["n_training_samples"], other["n_training_samples"]) == (6_144, 12_288)
    assert one["held_out/ce_clean"] == other["held_out/ce_clean"]
    assert one["held_out/ce_sae"] != other["held_out/ce_sae"]
    (record,) = read_offline_runs(tmp_path)
    recorded = [float(row["held_out/loss_recovered"]) for row in record.history if "held_out/loss_recovered" in row]
    assert recorded == [line["held_out/loss_recovered"] for line in (one, other)]
    names = {name.removesuffix("/bins") for row in record.history for name in row}
    assert len(PANELS) > 20
    assert set(PANELS) - OF_FINETUNING <= names
    assert re.search(
        r" held out after 6,144 tokens: loss recovered .*, dead [\d.]+% \(over [\d,]+ tokens\)$",
        (measured.parent / "run.log").read_text(),
        re.MULTILINE,
    )
    not_measured = train("--eval_every", 0, "--wandb_mode", "disabled")
    assert not (not_measured.parent / "held_out.jsonl").exists()
    ours, theirs = (load_file(path / "sae_weights.safetensors") for path in (measured, not_measured))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensorboard_has_the_same_names(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sae_path = train("--logger", "tensorboard", "--finetune_loss", "kl")
    events = EventAccumulator(str(sae_path.parent / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(PANELS) <= {*tags["scalars"], *tags["histograms"]}
    assert tags["histograms"] == ["alive/log10_firing_rate"]
    assert len(events.Scalars("held_out/loss_recovered")) == 2
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(config.strip().strip("`").removeprefix("json"))["preset"] == "demo"
    assert not list(tmp_path.glob("wandb*"))
