"""A synthetic model is a language model like any other: its text fits its predictions, its features are known."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from sae_lens.synthetic import FeatureDictionary, FoldedNormalMagnitudeConfig, SyntheticModel
from sae_lens.util import temporary_seed

from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.synthetic.directory import MADE_HERE, make_model, synthetic_directory
from sae_toolkit.synthetic.language_model import ROW_LENGTH, samples_of_row
from sae_toolkit.synthetic.text import rows_of_text
from sae_toolkit.text.sources import open_text
from support.loopback_hub import LoopbackHub
from support.processes import run_process

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def name(tiny_synthetic):
    return f"synthetic:{tiny_synthetic}"


@pytest.fixture(scope="module")
def model(name):
    return load_language_model(find_model(name), HOOK, "cpu", torch.float32)


@pytest.fixture(scope="module")
def rows_BT(tiny_synthetic):
    return torch.from_numpy(np.stack(list(islice(rows_of_text(tiny_synthetic), 12))).astype(np.int64))


def test_the_tokens_of_the_text_are_what_the_model_predicts(model, rows_BT):
    """Their cross-entropy is the entropy of the predictions, and worse without the activations."""
    logits_BTV, state = model.logits(rows_BT)
    log_p_NV = logits_BTV[:, :-1].flatten(0, 1).double().log_softmax(-1)
    surprise_N = -log_p_NV.gather(1, rows_BT[:, 1:].reshape(-1, 1))[:, 0]
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    error = (surprise_N - entropy_N).std() / len(surprise_N) ** 0.5
    assert abs((surprise_N - entropy_N).mean()) < 4 * error < 0.1
    without_BTV = model.logits_from_hook(rows_BT, state, torch.zeros_like(state.acts_BTD))
    assert without_BTV.std() == 0
    assert surprise_N.mean() < np.log(logits_BTV.shape[-1]) - 1


def test_activations_are_sparse_sums_of_the_true_features(model, tiny_synthetic, rows_BT):
    """Least squares over the features that SAELens's own generator activates gives its activations back."""
    synthetic = SyntheticModel.load_from_disk(tiny_synthetic)
    with temporary_seed(int(np.random.SeedSequence((7, 3, 1)).generate_state(1)[0])):  # row 3, its second 256 samples
        expected_ND, features_NF = synthetic.sample_with_features(256)
    found_ND = model.activations(rows_BT[3:4])[0, 256:512]
    assert torch.allclose(found_ND, expected_ND, atol=1e-5)
    assert 1 < (features_NF > 0).sum(1).float().mean() < 4


def test_a_row_depends_on_its_number_alone(model, tiny_synthetic, rows_BT):
    before = torch.get_rng_state()
    alone, together = model.activations(rows_BT[5:6]), model.activations(rows_BT[2:7])
    assert torch.equal(alone[0], together[3])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(samples_of_row(model.model.synthetic, 5, 300), alone[0, :300])
    assert not torch.equal(together[0], together[1])


def test_rows_are_drawn_once_and_kept(tiny_synthetic, rows_BT, monkeypatch):
    monkeypatch.setattr("sae_toolkit.synthetic.text._row", None)
    assert np.array_equal(np.stack(list(islice(rows_of_text(tiny_synthetic), 12))), rows_BT)


def test_one_layer_has_all_hooks_of_a_residual_stream(name):
    source = find_model(name)
    assert (source.config.hidden_size, source.max_context, source.is_synthetic) == (32, ROW_LENGTH, True)
    both = load_language_model(source, ["blocks.0.hook_resid_pre", HOOK], "cpu", torch.float32)
    pre, post = both.activations(torch.tensor([[1] * 8])).chunk(2, dim=-1)
    assert torch.equal(pre, post)


def test_the_text_is_rows_of_token_ids(name, rows_BT):
    text = open_text(name, flag="--dataset_path")
    assert (text.tokenized, text.row_length, text.split) == (True, ROW_LENGTH, "train")
    assert np.array_equal(next(iter(text.documents())), rows_BT[0])


def test_the_benchmark_is_made_by_the_published_configuration():
    """The table in SAELens's documentation of SynthSAEBench-16k."""
    cfg = MADE_HERE["synth-sae-bench-16k"]
    assert (cfg.num_features, cfg.hidden_dim) == (16_384, 768)
    assert cfg.firing_probability.to_dict().items() >= {"exponent": 0.5, "max_prob": 0.4, "min_prob": 5e-4}.items()
    assert (cfg.hierarchy.total_root_nodes, cfg.hierarchy.branching_factor, cfg.hierarchy.max_depth) == (128, 4, 3)
    assert cfg.hierarchy.mutually_exclusive_portion == 1
    assert cfg.hierarchy.scale_children_by_parent
    assert (cfg.correlation.rank, cfg.correlation.correlation_scale) == (25, 0.1)
    assert (cfg.orthogonalization.num_steps, cfg.orthogonalization.lr) == (100, 3e-4)


def test_a_model_is_made_as_by_saelens():
    """Its features are SAELens's but for rounding, and closer to orthogonal than they began; its bias is the same."""
    cfg = replace(MADE_HERE["small"], num_features=1024, hidden_dim=64)
    made, expected = make_model(cfg).feature_dict, SyntheticModel(cfg).feature_dict
    assert torch.allclose(made.feature_vectors, expected.feature_vectors, rtol=0, atol=1e-5)
    assert torch.equal(made.bias, expected.bias)
    drawn = FeatureDictionary(1024, 64, initializer=None, seed=cfg.seed).feature_vectors
    assert mean_cosine(made.feature_vectors) < 0.97 * mean_cosine(drawn)


def mean_cosine(features_FD: torch.Tensor) -> float:
    return (features_FD @ features_FD.T).fill_diagonal_(0).abs().mean().item()


def test_a_model_on_the_hub_is_downloaded(tiny_synthetic, tmp_path):
    shutil.copytree(tiny_synthetic, tmp_path / "models/owner/synthetic")
    hub = LoopbackHub(tmp_path)
    find = "from sae_toolkit.synthetic.directory import *; print(synthetic_directory('synthetic:owner/synthetic', ''))"
    done = run_process(sys.executable, "-c", find, **hub.environment(tmp_path / "home"))
    hub.close()
    assert done.status == 0, done.stderr
    downloaded = SyntheticModel.load_from_disk(done.stdout.strip())
    expected = SyntheticModel.load_from_disk(tiny_synthetic)
    assert torch.equal(downloaded.feature_dict.feature_vectors, expected.feature_dict.feature_vectors)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("synthetic:large", "made here are synth-sae-bench-16k, small"),
        ("synthetic:docs", "the directory has no synthetic_model_config.json"),
    ],
)
def test_an_unknown_model_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        synthetic_directory(given, "--model_name")


def test_a_damaged_model_is_refused(tiny_synthetic, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_synthetic, damaged)
    (damaged / "synthetic_model.safetensors").write_bytes(b"0" * 64)
    with pytest.raises(UserError, match=r"--model_name .*: its weights cannot be read: "):
        load_language_model(find_model(f"synthetic:{damaged}"), HOOK, "cpu", torch.float32)
    (damaged / "synthetic_model_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"synthetic_model_config\.json cannot be read"):
        find_model(f"synthetic:{damaged}")


def test_a_model_that_is_another_at_each_load_is_refused(tiny_synthetic, tmp_path):
    unseeded = tmp_path / "unseeded"
    shutil.copytree(tiny_synthetic, unseeded)
    path = unseeded / "synthetic_model_config.json"
    config = json.loads(path.read_text()) | {"seed": None}
    path.write_text(json.dumps(config))
    one, other = (
        load_language_model(find_model(f"synthetic:{unseeded}"), HOOK, "cpu", torch.float32) for _ in range(2)
    )
    assert torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    path.write_text(json.dumps(config | {"mean_firing_magnitudes": FoldedNormalMagnitudeConfig(1.0, 0.5).to_dict()}))
    with pytest.raises(UserError, match="has no seed in .*, and its magnitudes are drawn: .*; make one with a seed"):
        find_model(f"synthetic:{unseeded}")


def train(script, name, directory, *more):
    return script(
        *("sae_lens_train.py", "@presets/synthetic.args", "--model_name", name, "--dataset_path", name, "--k", "4"),
        *("--training_tokens", 20_000, "--held_out_fraction", 0.6, "--checkpoint_path", directory, "--eval_every", 0),
        *("--expansion_factor", 2, "--wandb_mode", "disabled", *more),
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--dataset_path", "embedded:wikipedia"), "not the text of synthetic:.*so give --dataset_path synthetic:"),
        (("--context_size", "512"), "are of 1024 tokens and cannot be cut; give --context_size 1024"),
        (("--context_size", "2048"), "made for at most 1024"),
        (("--layer", "1"), "the model has 1 layers"),
        (("--dataset_config", "en"), "--dataset_config en: synthetic:.* has no such choice"),
        (("--set", 'model_from_pretrained_kwargs={"revision": "x"}'), "not for a synthetic model"),
    ],
)
def test_what_does_not_fit_a_synthetic_model_is_refused(flags, says, script, name, tmp_path):
    done = train(script, name, tmp_path, *flags)
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert re.search(says, done.error_lines[0]), done.stderr
    assert not list(tmp_path.iterdir())


def test_another_model_does_not_get_synthetic_text(script, name, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, "--dataset_path", name)
    assert done.status == 2
    assert f"--dataset_path {name}: not the text of" in done.error_lines[0]


def test_a_cache_that_cannot_be_written_is_named_in_one_line(script, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", "/proc/cache")
    name = "synthetic:small"
    done = script("sae_lens_train.py", "--model_name", name, "--dataset_path", name, "--dry_run")
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "synthetic:small: cannot be kept in /proc/cache/sae_toolkit/synthetic/models" in done.error_lines[0]
    assert done.error_lines[0].endswith("set HF_HOME")


def test_text_that_cannot_be_kept_is_drawn_again(tiny_synthetic, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", "/proc/cache")
    once, again = (next(iter(rows_of_text(tiny_synthetic))) for _ in range(2))
    assert np.array_equal(once, again)
