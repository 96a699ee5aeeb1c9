"""What the device measures of a language model and of an SAE is what the CPU measures."""

import json
import shutil

import numpy as np
import pytest
import torch

from sae_toolkit.evaluation import decoder_cosines
from sae_toolkit.evaluation.decoder_cosines import largest_cosines, measure_cosines
from sae_toolkit.model.loading import find_model, load_language_model

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_mid", "blocks.1.hook_mlp_out")


@pytest.mark.parametrize("hook_name", HOOKS)
def test_the_language_model_is_the_cpus(device, small_model, hook_name):
    """The activations at a hook, and the logits with others in their place."""
    source = find_model(str(small_model))
    tokens_BT = torch.randint(3, 4000, (4, 48), generator=torch.Generator().manual_seed(0))
    found = []
    for place in ("cpu", device):
        model = load_language_model(source, hook_name, place, torch.float32)
        logits_BTV, state = model.logits(tokens_BT)
        replaced_BTV = model.logits_from_hook(tokens_BT, state, 0.5 * state.acts_BTD)
        assert logits_BTV.device.type == replaced_BTV.device.type == torch.device(place).type
        found.append([part.cpu() for part in (model.activations(tokens_BT), logits_BTV, replaced_BTV)])
    assert (found[0][1] - found[0][2]).abs().max() > 0.01  # the replacement changes the logits
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_cosines_of_the_decoder_are_the_cpus(device, monkeypatch, sampled):
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.randn(3000, 24, generator=generator)
    W_FD[7], W_FD[8] = W_FD[1000], 2 * W_FD[2000]  # near duplicates
    alive_F = torch.rand(3000, generator=generator) > 0.2
    if sampled:
        monkeypatch.setattr(decoder_cosines, "_AFFORDABLE", dict.fromkeys(("cpu", "cuda"), 2 * 3000 * 24 * 1500))
    theirs = measure_cosines(W_FD, alive_F, seed=0)
    ours = measure_cosines(W_FD.to(device), alive_F.to(device), seed=0)
    assert theirs.exact == ours.exact == (not sampled)
    assert theirs.near_duplicate_pairs == ours.near_duplicate_pairs > 0
    for name in ("mean", "p95", "alive_mean"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name
    rows_R = torch.arange(0, 3000, 7)
    largest, nearest, _ = largest_cosines(W_FD.to(device), rows_R.to(device))
    cosines_RF = torch.nn.functional.cosine_similarity(W_FD[rows_R, None], W_FD[None], dim=-1)
    cosines_RF[torch.arange(len(rows_R)), rows_R] = -torch.inf
    torch.testing.assert_close(largest.cpu(), cosines_RF.max(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(nearest.cpu(), cosines_RF.max(1).indices)


@pytest.mark.parametrize("architecture", ["batchtopk", "standard"])
def test_an_evaluation_is_the_cpus(device, script, small_model, run_flags, architecture, tmp_path):
    """An SAE that was trained on the device, measured there and on the CPU.

    At a low learning rate: 20 steps learn their text by heart, and an SAE that did fires on little other text.
    """
    trained = script("sae_lens_train.py", *run_flags(small_model, architecture=architecture, lr=1e-4))
    assert trained.status == 0, trained.stderr
    found = []
    for place in ("cpu", device):
        copied = shutil.copytree(trained.stdout.strip(), tmp_path / f"copy {len(found)}")
        flags = ("--sae_path", copied, "--device", place, "--lm_dtype", "float32", "--num_samples", 24)
        done = script("evaluate_sae_real_activations.py", *flags, "--n_features", 3, "--no_diagnosis")
        assert done.status == 0, done.stderr
        found.append(json.loads((copied / "evaluation.json").read_text())["metrics"])
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    assert theirs["l0"] > 1 and abs(theirs["ce_zero"] - theirs["ce_clean"]) > 0.01
    for name in theirs.keys() - {"loss_recovered"}:  # of losses that nearly cancel in a model of random weights
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-4, err_msg=name)
