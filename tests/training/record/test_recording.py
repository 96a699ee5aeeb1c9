"""A run is recorded under the names in docs/training.md, in wandb or TensorBoard, with what it was made from."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import ROOT, run_process
from support.wandb_reader import read_offline_runs

PANELS = re.findall(r"`((?:learning|sparsity|alive|speed|held_out)/\w+)`", (ROOT / "docs" / "training.md").read_text())
OF_FINETUNING = {"learning/kl_loss", "learning/finetune_weight"}
TRAIN = [
    *(sys.executable, "sae_lens_train.py", "@presets/demo.args", "--training_tokens", 14 * 1024, "--lr_decay_steps", 4),
    *("--train_batch_size_tokens", 1024, "--lr_warm_up_steps", 4, "--eval_every", 6_000),
]


@pytest.fixture(scope="session")
def on_tiny_model(tiny_model, text_file):
    """Flags that put the tiny model and its text in the place of the demo's."""
    return ["--model_name", tiny_model, "--layer", 1, "--dataset_path", text_file, "--context_size", 64, "--k", 8]


def train(directory: Path, *flags: object, **environment: str):
    done = run_process(*TRAIN, "--checkpoint_path", directory, *flags, WANDB_DIR=str(directory), **environment)
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip()), done


@pytest.fixture(scope="module")
def in_wandb(tmp_path_factory):
    """The demo's run cut to 14 steps, measured on held-out text twice, and its evaluation."""
    directory = tmp_path_factory.mktemp("in_wandb")
    sae_path, done = train(directory, "--wandb_mode", "offline")
    evaluated = run_process(
        *(sys.executable, "evaluate_sae_real_activations.py", "--sae_path", sae_path, "--num_samples", 12),
        *("--context_length", 128, "--n_features", 8),
        WANDB_DIR=str(directory),
    )
    assert evaluated.status == 0, evaluated.stderr
    return sae_path, done, *read_offline_runs(directory)


def test_every_panel_of_the_documentation_is_in_the_record(in_wandb):
    *_, training, _ = in_wandb
    assert len(PANELS) > 20
    recorded = {name for row in training.history for name in row}
    of_histograms = {name.removesuffix("/bins") for name in recorded}
    assert set(PANELS) - OF_FINETUNING <= recorded | of_histograms


def test_the_record_says_what_the_run_was_made_from(in_wandb):
    sae_path, _, training, _ = in_wandb
    config = {name: json.loads(training.config[name]) for name in ("preset", "data", "git", "flags", "resumed_from")}
    assert config["preset"] == "demo"
    assert config["data"]["name"] == "embedded:wikipedia"
    assert config["data"]["held_out_fraction"] == 0.2
    assert re.fullmatch(r"[0-9a-f]{40}", config["git"]["commit"])
    assert config["resumed_from"] is None
    (artifact,) = training.artifacts
    assert artifact.type == "model"
    metadata = json.loads(artifact.metadata)
    assert metadata["data"] == config["data"]
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"cfg.json", "manifest.json"} <= names
    assert "sae_weights.safetensors" not in names  # it says where they lie; --set logger.log_weights_to_wandb=true
    assert any(sae_path.absolute().as_uri() in entry.ref for entry in artifact.manifest.contents)


def test_the_evaluation_adds_the_tables_of_health_and_of_features(in_wandb):
    sae_path, _, training, evaluation = in_wandb
    assert evaluation.id == training.id
    result = json.loads((sae_path / "evaluation.json").read_text())
    assert float(evaluation.summary["evaluation/metrics/l0"]) == result["metrics"]["l0"]
    health = evaluation.table("evaluation/health_table")
    assert [row[0] for row in health["data"]] == ["Loss recovered", "L0", "Dead features", "Decoder absorption"]
    assert health["data"][1][1] == f"{result['metrics']['l0']:.1f}"
    features = evaluation.table("evaluation/features")
    assert len(features["data"]) == 8
    assert all("[" in row[features["columns"].index("top contexts")] for row in features["data"] if row[1] > 0)


def test_what_is_measured_on_held_out_text_changes_nothing_of_the_sae(on_tiny_model, tmp_path):
    measured, _ = train(tmp_path, *on_tiny_model, "--wandb_mode", "disabled")
    other, _ = train(tmp_path, *on_tiny_model, "--eval_every", 0, "--wandb_mode", "disabled")
    assert (measured.parent / "held_out.jsonl").exists() and not (other.parent / "held_out.jsonl").exists()
    ours, theirs = (load_file(path / "sae_weights.safetensors") for path in (measured, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_sae_is_measured_on_the_same_held_out_text_each_time(in_wandb):
    sae_path, done, training, _ = in_wandb
    lines = [json.loads(line) for line in (sae_path.parent / "held_out.jsonl").read_text().splitlines()]
    assert [line["n_training_samples"] for line in lines] == [6_144, 12_288]
    measured = [row for row in training.history if "held_out/loss_recovered" in row]
    assert [float(row["held_out/loss_recovered"]) for row in measured] == [
        line["held_out/loss_recovered"] for line in lines
    ]
    assert lines[0]["held_out/ce_clean"] == lines[1]["held_out/ce_clean"] < lines[0]["held_out/ce_sae"]
    assert lines[0]["held_out/ce_sae"] != lines[1]["held_out/ce_sae"]
    assert "held out after 6,144 tokens: loss recovered " in done.stderr


def test_tensorboard_has_the_same_names(on_tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sae_path, _ = train(tmp_path, *on_tiny_model, "--logger", "tensorboard", "--finetune_loss", "kl")
    events = EventAccumulator(str(sae_path.parent / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(PANELS) <= {*tags["scalars"], *tags["histograms"]}
    assert tags["histograms"] == ["alive/log10_firing_rate"]
    assert len(events.Scalars("held_out/loss_recovered")) == 2
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(config.strip().strip("`").removeprefix("json"))["preset"] == "demo"
    assert not list(tmp_path.glob("wandb*"))
