"""SAEs of the embedded model are made sick on purpose, and the diagnosis names what was done to them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.steps.target_l0 import JUMPRELU
from support.processes import run_process, train_demo

pytestmark = pytest.mark.diagnosis

FEW = ["--training_tokens", 60_000, "--lr_decay_steps", 12, "--lr_warm_up_steps", 5, "--dead_feature_window", 5]
# The sparsity weight is at its full value from the first step on; --target_l0 would increase it over some steps.
ALL_AT_ONCE = {**JUMPRELU, "l0_warm_up_steps": 0}
SICK = {
    "massive activations": [
        *("--max_activation_norm_multiple", 0, "--skip_positions", 0, "--exclude_special_tokens", "false"),
    ],
    "too few tokens for so many features": FEW,
    "the sparsity weight does not fit": ["--architecture", "standard", "--l1_coefficient", 0.3],
    "the sparsity weight does not fit (too strong)": ["--architecture", "standard", "--l1_coefficient", 40],
    "k is not a healthy L0": ["--k", 400],
    "the learning rate is too low": ["--lr", 1e-4],
    "the learning rate is too high": ["--lr", 0.02],
    "the dead-feature window is too long": ["--dead_feature_window", 400],
    "too few steps for this learning rate and dead-feature window": ["--lr", 1e-4, "--dead_feature_window", 1000],
    "nothing revives features that are dead at birth": ["--set", "sae.aux_loss_coefficient=0"],
    "features died in training": [
        *("--architecture", "jumprelu", "--l0_coefficient", 0.25),
        *(word for name, value in ALL_AT_ONCE.items() for word in ("--set", f"sae.{name}={json.dumps(value)}")),
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("sick")


def train(directory: Path, *flags: object) -> Path:
    return train_demo(directory, "--eval_every", 0, *flags)


def diagnosis(sae_path: Path, *flags: object) -> list[dict]:
    """Returns the causes in evaluation.json, and checks that the first one is printed."""
    done = run_process(
        *(sys.executable, "evaluate_sae_real_activations.py", "--sae_path", sae_path, "--n_features", 0, *flags),
        timeout=1800,
    )
    assert done.status == 0, done.stderr
    found = json.loads((sae_path / "evaluation.json").read_text()).get("diagnosis", [])
    if found:
        assert f"1. {found[0]['cause']}" in " ".join(done.stdout.split())
    return found


@pytest.fixture(scope="module")
def healthy(directory):
    """The SAE of the demo."""
    return train(directory)


def test_a_healthy_sae_has_no_diagnosis(healthy):
    assert diagnosis(healthy) == []


@pytest.mark.parametrize("cause", SICK)
def test_what_was_done_in_training_is_found_first(directory, cause):
    first, *_ = diagnosis(train(directory, *SICK[cause]))
    assert first["cause"] == cause.partition(" (")[0]
    assert first["command"].startswith("./run_saelens_training.sh --like ")
    n_flags = sum(word.startswith("--") for word in first["command"].split()) - 1
    assert 1 <= n_flags <= 3


def test_features_that_were_copied_are_found_to_be_the_same(directory, healthy):
    """The training begins with a copy of each feature of a healthy SAE."""
    checkpoint = train(directory, "--training_tokens", 60_000, "--lr_decay_steps", 0, "--n_checkpoints", 1)
    start = next(path for path in checkpoint.parent.iterdir() if path.name.isdigit())
    weights = load_file(start / "sae_weights.safetensors")
    doubled = directory / "doubled"
    doubled.mkdir()
    cfg = json.loads((start / "cfg.json").read_text())
    cfg["d_sae"] *= 2
    (doubled / "cfg.json").write_text(json.dumps(cfg))
    twice = {
        name: torch.cat([tensor, tensor], dim=tensor.shape.index(2304)) if 2304 in tensor.shape else tensor
        for name, tensor in weights.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in twice.items()}, doubled / "sae_weights.safetensors")
    shutil.copy(start / "activation_scaler.json", doubled)
    sick = train(directory, "--expansion_factor", 8, "--init_from", doubled)
    first, *_ = diagnosis(sick)
    assert first["cause"] == "features that are the same"
    assert str(doubled) in first["says"]
    assert first["command"].endswith("--init_from none")


def test_a_sample_that_is_too_small_is_found_and_its_command_settles_it(healthy):
    first, *others = diagnosis(healthy, "--num_samples", 6)
    assert first["cause"] == "the evaluated sample is too small"
    assert not others
    words = first["command"].split()
    assert words[:2] == ["python", "evaluate_sae_real_activations.py"]
    assert diagnosis(healthy, *words[words.index(str(healthy)) + 1 :]) == []


def test_an_sae_of_another_layer_is_found_to_be_one(healthy):
    first, *_ = diagnosis(healthy, "--layer", 20)  # not 14, where its four metrics are healthy too
    assert first["cause"] == "evaluated at another hook than it was trained at"
    assert first["command"].endswith("--layer 12")


def test_an_sae_of_another_model_is_found_to_be_one(directory, healthy, embedded_source):
    """The other model has the same architecture, but what its lower layers write is 4 times as large."""
    quantized = load_language_model(embedded_source, "blocks.12.hook_resid_post", "cpu", torch.float32).model
    config = quantized.config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "quantization_config"}))
    model.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        for layer in model.model.layers[:13]:
            layer.mlp.down_proj.weight *= 4
            layer.self_attn.o_proj.weight *= 4
    other = directory / "other_model"
    model.save_pretrained(other)
    load_tokenizer(find_model("embedded:smollm2-135m")).save_pretrained(other)
    first, *_ = diagnosis(healthy, "--model_name", other)
    assert first["cause"] == "evaluated on another model than it was trained on"
    assert first["command"].endswith("--model_name embedded:smollm2-135m")
