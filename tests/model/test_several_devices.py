"""A model that accelerate spreads over devices computes what it computes on one, also where its layers are replaced."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import AutoModelForCausalLM

from sae_toolkit.evaluation.run import measure_saes
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.model.devices import random_states_restored
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.evaluation import parse_evaluation_flags
from support.pretended_gpus import PretendedGPUs

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


@pytest.fixture
def gpus():
    with PretendedGPUs() as gpus:
        yield gpus


@pytest.fixture
def on_two_gpus(model, gpus):
    """The model with the embedding, the output head and two layers on cuda:0, and the other two layers on cuda:1."""
    first = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cuda:0")
    layers = {f"model.layers.{i}": f"cuda:{i // 2}" for i in range(4)}
    spread = dispatch_model(copy.deepcopy(model), first | layers, main_device="cuda:0", force_hooks=True)
    found = [str(layer.mlp.up_proj.weight.device) for layer in spread.model.layers]
    assert found == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    return spread


@pytest.mark.parametrize("hook_name", [HOOKS[1], *(hook.replace("1", "2") for hook in HOOKS)])
def test_no_tensors_of_two_gpus_meet_in_a_model_that_is_spread_over_them(model, on_two_gpus, hook_name):
    whole, spread = LanguageModel(model, hook_name), LanguageModel(on_two_gpus, hook_name)
    for _ in range(2):
        expected, state = whole.logits(TOKENS)
        new_BTD = state.acts_BTD.roll(1, dims=1)
        logits, spread_state = spread.logits(TOKENS)
        from_hook = spread.logits_from_hook(TOKENS, spread_state, new_BTD.to("cuda:0"))
        is_on_second = ".2." in hook_name and not hook_name.endswith("resid_pre")  # read before accelerate moves it
        assert str(spread_state.acts_BTD.device) == f"cuda:{int(is_on_second)}"
        assert str(logits.device) == str(from_hook.device) == "cuda:0"
        torch.testing.assert_close(logits.cpu(), expected)
        torch.testing.assert_close(from_hook.cpu(), whole.logits_from_hook(TOKENS, state, new_BTD))
    assert spread.ablation_is_shared == whole.ablation_is_shared


@pytest.fixture(scope="module")
def prepared(tiny_model, text_file, tmp_path_factory):
    """Evaluations by protocol, of a random SAE at layer 2."""
    directory = tmp_path_factory.mktemp("sae")
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    torch.nn.init.normal_(sae.W_dec)
    torch.nn.init.normal_(sae.W_enc)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.save_model(directory)
    flags = f"--sae_path {directory} --model_name {tiny_model} --dataset {text_file} --context_length 32 --device cpu"
    parsed = parse_evaluation_flags("", [*flags.split(), "--num_samples", "6", "--features", "3"])

    def of(protocol):
        measurements = replace(parsed.measurements, protocol=protocol)
        (found,) = prepare_evaluations(parsed.saes, parsed.text, measurements)
        return found

    return {protocol: of(protocol) for protocol in ("health", "saebench")}


@pytest.mark.parametrize("protocol", ["health", "saebench"])
@pytest.mark.parametrize("sae_device", ["cuda:0", "cuda:1"])
def test_nor_in_an_evaluation_of_it(model, on_two_gpus, prepared, protocol, sae_device):
    hook_name = prepared[protocol].hook_name
    expected, found = (
        measure_saes(replace(prepared[protocol], device=device), LanguageModel(each, hook_name), batch_size=2)[0]
        for each, device in ((model, "cpu"), (on_two_gpus, sae_device))
    )
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.features[0].raised and found.features[0].raised[0][0] == expected.features[0].raised[0][0]


def test_the_pretended_gpus_notice_tensors_that_meet(gpus):
    here, there = torch.ones(3).to("cuda:0"), torch.ones(3, device="cuda:1")
    assert str((here[:2] * 2).device) == "cuda:0"
    for meet in (
        lambda: here + there,
        lambda: torch.stack([here, there]),
        lambda: here.where(there > 0, 0),
        lambda: here + torch.ones(3),
        lambda: torch.nn.functional.linear(here, there[None]),
    ):
        with pytest.raises(AssertionError, match="of tensors on"):
            meet()
    assert torch.equal((here + there.to(here)).cpu(), torch.full((3,), 2.0))
