"""A model that accelerate spreads over devices computes what it computes on one, also where its layers are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoModelForCausalLM

from sae_toolkit.model.devices import random_states_restored
from sae_toolkit.model.language_model import LanguageModel

HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
TOKENS = torch.tensor([[1, 504, 3575, 282, 4649, 314, 7042, 30], [1, 28120, 905, 28, 253, 905, 282, 2]])


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def spread_model(model, tmp_path):
    """The model with its layers on the disk: only accelerate's hooks of the layers bring their weights to the CPU."""
    on_disk = {f"model.layers.{i}": "disk" for i in range(4)}
    on_cpu = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    whole_layers = {"preload_module_classes": ["LlamaDecoderLayer"]}
    spread = dispatch_model(copy.deepcopy(model), on_cpu | on_disk, "cpu", offload_dir=tmp_path, **whole_layers)
    assert next(spread.model.layers[0].parameters()).is_meta
    return spread


@pytest.mark.parametrize("hook_name", HOOKS)
def test_a_spread_model_gives_the_logits_of_a_whole_one_again_and_again(model, spread_model, hook_name):
    whole, spread = LanguageModel(model, hook_name), LanguageModel(spread_model, hook_name)
    expected, state = whole.logits(TOKENS)
    new_BTD = state.acts_BTD.roll(1, dims=1)
    expected_from_hook = whole.logits_from_hook(TOKENS, state, new_BTD)
    assert not torch.allclose(expected, expected_from_hook)
    for _ in range(2):
        logits, state = spread.logits(TOKENS)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(spread.logits_from_hook(TOKENS, state, new_BTD), expected_from_hook)


class Recorder(ModelHook):
    """Notes its calls before and after a layer."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module, hidden, *args, **kwargs):
        self.calls.append("before")
        return (hidden, *args), kwargs

    def post_forward(self, module, output):
        self.calls.append("after")
        return output


@pytest.mark.parametrize("hook_name", HOOKS)
def test_accelerates_hooks_run_around_layers_that_are_replaced(model, hook_name):
    hooked = LanguageModel(copy.deepcopy(model), hook_name)
    recorders = [Recorder() for _ in hooked.layers]
    for layer, recorder in zip(hooked.layers, recorders, strict=True):
        add_hook_to_module(layer, recorder)
    _, state = hooked.logits(TOKENS)
    hooked.logits_from_hook(TOKENS, state, state.acts_BTD)
    assert [recorder.calls for recorder in recorders] == [["before", "after"] * 2] * 4


def test_only_the_random_states_of_the_devices_in_use_are_restored(monkeypatch):
    states = {"cuda:0": 0, "cuda:1": 10}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with random_states_restored("cuda:1", "cpu"):
        torch.rand(5)
        states |= {"cuda:0": 1, "cuda:1": 11}
    assert states == {"cuda:0": 1, "cuda:1": 10}
    assert torch.equal(torch.rand(3), expected)
