"""The hooked model computes what transformer-lens computes, and nothing that is thrown away."""

import copy
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from sae_toolkit.errors import UserError
from sae_toolkit.language_model import LanguageModel, hook_width
from sae_toolkit.models import choose_lm_dtype, find_model, load_language_model

HOOKS = [
    "blocks.12.hook_resid_pre",
    "blocks.12.hook_resid_mid",
    "blocks.12.hook_resid_post",
    "blocks.12.hook_attn_out",
    "blocks.12.hook_mlp_out",
    "blocks.12.attn.hook_z",
    "blocks.29.hook_resid_post",
]
TOKENS = torch.tensor([[1, 504, 3575, 282, 4649, 314, 7042, 30], [1, 28120, 905, 28, 253, 905, 282, 2]])


@pytest.fixture(scope="module")
def transformer_lens_cache(language_model, tokenizer):
    bridge = TransformerBridge.boot_transformers(
        "embedded", hf_model=copy.deepcopy(language_model.model), tokenizer=tokenizer, dtype=torch.float32
    )
    return bridge.run_with_cache(TOKENS, names_filter=HOOKS, prepend_bos=False)[1]


@pytest.mark.parametrize("hook_name", HOOKS)
def test_activations_equal_those_of_transformer_lens(language_model, transformer_lens_cache, hook_name):
    ours = LanguageModel(language_model.model, hook_name).activations(TOKENS)
    theirs = transformer_lens_cache[hook_name].flatten(2)
    assert ours.shape[-1] == hook_width(language_model.config, hook_name)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().median().item())


@pytest.mark.parametrize("hook_name", [*HOOKS, "blocks.0.hook_resid_pre", "model.layers.12.mlp", "model.norm"])
def test_a_pass_that_starts_at_the_hook_ends_where_the_whole_pass_does(language_model, hook_name):
    hooked = LanguageModel(language_model.model, hook_name)
    logits, state = hooked.logits(TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)
    zeroed = hooked.logits_from_hook(TOKENS, state, torch.zeros_like(state.acts_BTD))
    assert not torch.allclose(zeroed, logits, atol=1.0)
    torch.testing.assert_close(hooked.logits(TOKENS)[0], logits)  # no hook is left behind


def test_activations_run_the_layers_up_to_the_hook_and_no_more(language_model):
    calls = []
    modules = [*language_model.layers, language_model.model.lm_head]
    handles = [m.register_forward_pre_hook(lambda m, _: calls.append(modules.index(m))) for m in modules]
    with torch.profiler.profile() as profile:
        language_model.activations(TOKENS)
    for handle in handles:
        handle.remove()
    assert calls == list(range(13))
    operations = {event.key: event.count for event in profile.key_averages()}
    assert operations["aten::scaled_dot_product_attention"] == 13


def test_a_pass_from_the_hook_runs_only_the_layers_after_it(language_model):
    _, state = language_model.logits(TOKENS)
    computed = []
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: computed.append(1)) for layer in language_model.layers]
    language_model.logits_from_hook(TOKENS, state, state.acts_BTD)
    for handle in handles:
        handle.remove()
    assert len(computed) == 17


def test_a_model_cut_after_its_hook_gives_the_same_activations(tiny_model):
    source = find_model(str(tiny_model))
    model = load_language_model(source, "blocks.1.hook_resid_post", "cpu", torch.float32)
    whole = model.activations(TOKENS)
    model.keep_only_up_to_hook()
    assert len(model.layers) == 2
    torch.testing.assert_close(model.activations(TOKENS), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("hook_name", "says"),
    [
        ("blocks.30.hook_resid_post", "--layer 30: the model has 30 layers, 0 to 29"),
        ("blocks.3.hook_nonsense", "--hook_name blocks.3.hook_nonsense: known within a block"),
        ("model.layers.3.nonsense", "--hook_name model.layers.3.nonsense: not of the form"),
    ],
)
def test_an_unknown_hook_is_said_before_any_weights_are_loaded(embedded_source, hook_name, says):
    with pytest.raises(UserError, match=says):
        hook_width(embedded_source.config, hook_name)


def test_the_language_model_is_bfloat16_only_where_the_hardware_computes_in_it():
    cpu_flags = Path("/proc/cpuinfo").read_text().split()
    has_bfloat16 = "avx512_bf16" in cpu_flags or "amx_bf16" in cpu_flags
    assert choose_lm_dtype("auto", "cpu") == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert choose_lm_dtype("bfloat16", "cpu") == torch.bfloat16
