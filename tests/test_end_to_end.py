"""The whole job on the real embedded model, in processes of their own, with few tokens."""

import copy
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.files.embedded import EMBEDDED_TEXT
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows
from sae_toolkit.text.sources import HeldOutSplit, open_text
from support.short_demo import SHORT_DEMO
from support.wandb_reader import read_offline_runs

N_SEQUENCES, CONTEXT = 8, 128


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the run is, and its record in wandb."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def finished(trainings, directory):
    """The short demo, recorded in wandb, and its evaluation in float32."""
    trained = trainings.script(
        *("sae_lens_train.py", *SHORT_DEMO, "--eval_every", 0, "--checkpoint_path", directory),
        *("--wandb_mode", "offline"),
        WANDB_DIR=str(directory),
    )
    assert trained.status == 0, trained.stderr
    assert re.fullmatch(r"\S+\n", trained.stdout)
    sae_path = Path(trained.stdout.strip())
    evaluated = trainings.script(
        *("evaluate_sae_real_activations.py", "--sae_path", sae_path, "--lm_dtype", "float32"),
        *("--num_samples", N_SEQUENCES, "--context_length", CONTEXT, "--n_features", 8),
        WANDB_DIR=str(directory),
    )
    assert evaluated.status == 0, evaluated.stderr
    return sae_path, trained, evaluated


@pytest.fixture(scope="module")
def recorded(finished, directory):
    """What wandb recorded of the training, and of the evaluation."""
    training, evaluation = read_offline_runs(directory)
    return training, evaluation


def test_the_table_says_what_the_json_says(finished):
    sae_path, _, evaluated = finished
    result = json.loads((sae_path / "evaluation.json").read_text())
    assert {"model", "dataset", "tokens", "metrics", "health"} <= result.keys()
    metrics, health = result["metrics"], result["health"]
    assert set(metrics) >= {
        *("loss_recovered", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "explained_variance", "cosine_similarity"),
        *("l2_ratio", "l0", "dead_features", "decoder_absorption", "replaced_share"),
    }
    assert (result["model"], result["dataset"]) == ("embedded:smollm2-135m", EMBEDDED_TEXT)
    assert f"{metrics['loss_recovered']:.2%}" in evaluated.stdout
    assert f"{health['healthy']}/4 metrics healthy" in evaluated.stdout
    for standard in STANDARDS:  # so few tokens may leave a metric unsettled
        assert health[standard.metric] in (standard.status(metrics[standard.metric]), "unsettled")
    assert health["decoder_absorption"] != "unsettled"
    # A real model on real text: an untrained one would be near ln 49152 = 10.8 nats.
    assert 2.5 < metrics["ce_clean"] < 4.5
    assert metrics["ce_zero"] > 10


def test_saelens_own_evaluation_agrees(finished, language_model, tokenizer):
    """The checkpoint loads in plain SAELens, and its `run_evals` finds the same on the same tokens."""
    sae_path, *_ = finished
    result = json.loads((sae_path / "evaluation.json").read_text())
    metrics = result["metrics"]
    assert metrics["replaced_share"] == 1.0  # no massive activation here: both tools replace the same positions
    sae = SAE.load_from_disk(sae_path, device="cpu")
    assert sae.cfg.metadata.hook_name == "blocks.12.hook_resid_post"

    rows, _ = collect_evaluation_rows(
        open_text(EMBEDDED_TEXT, flag="--dataset"),
        tokenizer,
        ContextFormat(CONTEXT),
        HeldOutSplit(0.2, 42),
        n_rows=N_SEQUENCES,
        seed=42,
    )
    # run_evals measures sparsity on the rows after those of the losses: the same rows, once more.
    dataset = datasets.Dataset.from_dict({"input_ids": [*rows.tolist(), *rows.tolist()]})
    bridge = TransformerBridge.boot_transformers(
        "embedded", hf_model=copy.deepcopy(language_model.model), tokenizer=tokenizer, dtype=torch.float32
    )
    store = ActivationsStore.from_sae(bridge, sae, dataset, context_size=CONTEXT, store_batch_size_prompts=4)
    n_batches = N_SEQUENCES // 4
    theirs, _ = run_evals(
        sae,
        store,
        bridge,
        ActivationScaler(),
        get_eval_everything_config(4, n_batches, n_batches),
        exclude_special_tokens=result["positions"]["special_token_ids"],
    )
    losses = theirs["model_performance_preservation"]
    assert metrics == pytest.approx(
        metrics
        | {
            "loss_recovered": losses["ce_loss_score"],
            "ce_clean": losses["ce_loss_without_sae"],
            "ce_sae": losses["ce_loss_with_sae"],
            "ce_zero": losses["ce_loss_with_ablation"],
            "kl_sae": theirs["model_behavior_preservation"]["kl_div_with_sae"],
            "l0": theirs["sparsity"]["l0"],
            "explained_variance": theirs["reconstruction_quality"]["explained_variance"],
            "cosine_similarity": theirs["reconstruction_quality"]["cossim"],
            "l2_ratio": theirs["shrinkage"]["l2_ratio"],
        },
        rel=1e-3,
        abs=5e-4,  # the loss recovered is a small difference of losses after so few steps
    )


@torch.no_grad()
def test_the_l0_on_held_out_text_is_k(finished, language_model, tokenizer):
    """By SAELens's SAE, on the rows that the run kept for it: half as many tokens as it was trained on."""
    sae_path, trained, _ = finished
    sae = SAE.load_from_disk(sae_path, device="cpu")
    metadata = sae.cfg.metadata
    rows_NT = torch.from_numpy(np.load(sae_path.parent / "held_out.npy").astype(np.int64))
    kept_NT = ~torch.isin(rows_NT, torch.tensor(tokenizer.all_special_ids))
    kept_NT[:, 0] = False  # --skip_positions 1
    acts_ND = torch.cat([language_model.activations(rows) for rows in rows_NT.split(8)])[kept_NT]
    acts_ND = acts_ND[acts_ND.norm(dim=-1) <= metadata.max_activation_norm]
    assert len(acts_ND) == pytest.approx(metadata.calibrated_on_tokens, abs=2)  # the run's model is in bfloat16
    assert metadata.calibrated_on_text == "held-out"
    assert len(acts_ND) > 8 * 1000
    l0 = (sae.encode(acts_ND) > 0).sum(dim=-1).double().mean().item()
    assert l0 == pytest.approx(64, rel=0.005)
    assert f"L0 of the finished SAE on {metadata.calibrated_on_tokens:,} tokens of the held-out text: 64.0" in (
        trained.stderr
    )


def test_progress_is_said_from_the_first_step_in_lines_to_search(finished):
    _, trained, _ = finished
    lines = [line for line in trained.stderr.splitlines() if line.startswith("training: ")]
    assert float(re.match(r"training: ([\d.]+)% ", lines[0])[1]) < 10
    assert lines[-1].startswith("training: 100.0% tokens=16384 ")
    for line in lines:
        assert re.fullmatch(
            r"training: \S+% tokens=\d+ loss=\S+ L0=[\d.]+ explained_variance=-?[\d.]+ dead=[\d.]+%"
            r" tokens_per_second=\d+ memory_gib=[\d.]+( seconds_left=\d+)?",
            line,
        ), line
    assert "\r" not in trained.stderr  # no bars of libraries either


def test_the_record_says_what_the_run_was_made_from(finished, recorded):
    sae_path, *_ = finished
    training, _ = recorded
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


def test_the_evaluation_adds_the_tables_of_health_and_of_features(finished, recorded):
    sae_path, *_ = finished
    training, evaluation = recorded
    assert evaluation.id == training.id
    result = json.loads((sae_path / "evaluation.json").read_text())
    assert float(evaluation.summary["evaluation/metrics/l0"]) == result["metrics"]["l0"]
    health = evaluation.table("evaluation/health_table")
    assert [row[0] for row in health["data"]] == ["Loss recovered", "L0", "Dead features", "Decoder absorption"]
    assert health["data"][1][1] == f"{result['metrics']['l0']:.1f}"
    features = evaluation.table("evaluation/features")
    assert len(features["data"]) == 8
    assert all("[" in row[features["columns"].index("top contexts")] for row in features["data"] if row[1] > 0)
