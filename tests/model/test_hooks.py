"""Hooks are found where the activations really come by, and nothing is trained on another tensor than the one named."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.feature_browser import logit_changes
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.hooks import decoder_layers
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import find_model, load_language_model

TOKENS = torch.tensor([[11, 50, 35, 28, 46, 31], [11, 28, 90, 28, 25, 95]])
_SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {"intermediate_size": 128, "num_key_value_heads": 2}
_VISION = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(family: str, **more: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**_SIZES, **more})


def vision_config(family: str) -> PreTrainedConfig:
    if family == "gemma3":
        text = {"model_type": "gemma3_text", "head_dim": 16, **_SIZES, **_GATED}
        vision = {"model_type": "siglip_vision_model", **_VISION}
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    text, vision = {"model_type": "llama", **_SIZES, **_GATED}, {"model_type": "clip_vision_model", **_VISION}
    return AutoConfig.for_model("llava", text_config=text, vision_config={**vision, "projection_dim": 16})


@pytest.mark.parametrize(
    ("family", "more", "hook_name", "width"),
    [
        ("gpt2", {}, "transformer.h.2.mlp.act", 256),
        ("gpt2", {}, "transformer.h.2.attn.c_attn", 192),
        ("gpt2", {}, "blocks.2.hook_resid_post", 64),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32}, "model.decoder.embed_tokens", 32),
        ("qwen3", {**_GATED, "head_dim": 32}, "model.layers.2.self_attn.q_norm", 128),
        ("mixtral", {**_GATED, "num_local_experts": 4}, "model.layers.2.mlp", 64),
        ("qwen3_moe", {**_GATED, "num_experts": 8, "mlp_only_layers": [2]}, "blocks.2.mlp.hook_post", 128),
        # sparsify's names, from the base model
        ("gpt2", {}, "h.1.mlp.act", 256),
        ("gpt2", {}, "wte", 64),
        ("gpt_neox", {"intermediate_size": 128}, "layers.1.mlp", 64),
        ("gemma2", {**_GATED, "head_dim": 16}, "layers.1.mlp", 64),
        ("llama", _GATED, "embed_tokens", 64),
    ],
)
def test_the_width_is_that_of_the_activations_that_come_by(family, more, hook_name, width):
    config = tiny_config(family, **more)
    assert hook_width(config, hook_name) == width
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hooked = LanguageModel(model, hook_name)
    assert hooked.activations(TOKENS).shape == (2, 6, width)
    logits, state = hooked.logits(TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)


@pytest.mark.parametrize(
    ("family", "more", "hook_name", "says"),
    [
        (
            "mixtral",
            {**_GATED, "num_local_experts": 4},
            "model.layers.2.mlp.experts",
            r"\[12, 64\] comes by for tokens of \[2, 6\]",
        ),
        ("mixtral", {**_GATED, "num_local_experts": 4}, "model.layers.2.mlp.gate", "has no activations of shape"),
        ("llama", _GATED, "model.rotary_emb", "has no activations of shape"),
        ("jetmoe", {"num_key_value_heads": 2}, "model.layers.1.mlp", "JetMoeForCausalLM does not run without"),
        (
            "granite",
            {**_GATED, "residual_multiplier": 0.22},
            "blocks.2.hook_attn_out",
            "resid_pre .* = resid_mid is true",
        ),
        ("granite", {**_GATED, "residual_multiplier": 0.22}, "blocks.2.hook_mlp_out", "name model.layers.2.mlp for"),
        ("mixtral", {**_GATED, "num_local_experts": 4}, "blocks.2.mlp.hook_post", "each expert has its own"),
        # Its layers have the names of Llama's, and scale the residual stream by weights of their own.
        ("doge", _GATED, "blocks.2.hook_attn_out", "in DogeForCausalLM resid_pre . attn_out = resid_mid is not true"),
        ("doge", _GATED, "blocks.2.hook_mlp_out", "in DogeForCausalLM resid_mid . mlp_out = resid_post is not true"),
        (
            "bamba",
            {**_GATED, "mamba_n_heads": 8},
            "blocks.2.hook_resid_mid",
            "no sum between its attention and its MLP",
        ),
        (
            "bert",
            {},
            "blocks.1.hook_resid_post",
            "each position sees the tokens after it too.*is_decoder",
        ),
        ("longcat_flash", {}, "blocks.1.hook_resid_post", "has no list of 4 decoder layers"),
        ("t5", {}, "blocks.1.hook_resid_post", "--model_name: Transformers has no causal language model for T5Config"),
    ],
)
def test_a_place_without_activations_is_said_in_one_line_before_loading(family, more, hook_name, says):
    with pytest.raises(UserError, match=says) as refused:
        hook_width(tiny_config(family, **more), hook_name)
    assert "\n" not in str(refused.value)


def test_a_configuration_whose_values_do_not_fit_together_is_said_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 64, "expand": 2, "num_heads": 3}')
    with pytest.raises(UserError, match="Inconsistent configuration") as refused:
        find_model(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_module_that_does_not_run_on_text_is_said_in_one_line():
    config = vision_config("gemma3")
    tower = next(name for name, _ in AutoModelForImageTextToText.from_config(config).named_modules() if "tower" in name)
    with pytest.raises(UserError, match="none come by"):
        hook_width(config, tower)


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_the_layers_of_a_model_with_vision_are_those_of_its_text_decoder(family, tmp_path):
    config = vision_config(family)
    assert hook_width(config, "blocks.2.hook_resid_post") == 64
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    assert decoder_layers(model, config) is model.model.language_model.layers
    with torch.no_grad():
        expected = model.model.language_model(TOKENS, output_hidden_states=True).hidden_states[3]
    model.save_pretrained(tmp_path)
    hooked = load_language_model(find_model(str(tmp_path)), "blocks.2.hook_resid_post", "cpu", torch.float32)
    torch.testing.assert_close(hooked.activations(TOKENS), expected)
    logits, state = hooked.logits(TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", _GATED),
        ("gemma2", {**_GATED, "head_dim": 16}),
        ("gemma3n_text", {**_GATED, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 100}),
        ("gpt2", {}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("mpt", {}),
    ],
)
def test_the_factors_of_the_final_norm_are_those_that_it_multiplies_by(family, more):
    config = tiny_config(family, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    norm = next(
        m for n, m in model.named_modules() if n.split(".")[-1] in ("norm", "ln_f", "norm_f", "final_layer_norm")
    )
    nn.init.uniform_(norm.weight, 0.5, 2)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    unembedding = LanguageModel(model, "blocks.2.hook_resid_post").unembedding(64)
    torch.testing.assert_close(unembedding.norm_factors_D, norm.weight + (family == "gemma2"), rtol=1e-4, atol=1e-4)
    assert unembedding.is_centered == (family in ("gpt2", "opt", "olmo", "mpt"))


def test_a_decoder_vector_changes_logits_as_the_model_does_after_a_layer_norm():
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"), dtype=torch.float32)
    nn.init.uniform_(model.transformer.ln_f.weight, 0.5, 2)
    hooked = LanguageModel(model.double(), "blocks.2.hook_resid_post")
    resid_D = hooked.activations(torch.tensor([[1, 2, 3]]))[0, -1]
    centered_D = resid_D - resid_D.mean()
    W_dec_KD = torch.randn(4, len(resid_D), generator=torch.Generator().manual_seed(0)).double() + 0.5
    # Directions that do not change the length of the state, which the norm divides by.
    W_dec_KD -= (W_dec_KD @ centered_D / centered_D.square().sum())[:, None] * centered_D
    step = 1e-5
    plus_KV, minus_KV = (model.lm_head(model.transformer.ln_f(resid_D + step * sign * W_dec_KD)) for sign in (1, -1))
    true_KV = (plus_KV - minus_KV) / (2 * step) * centered_D.square().mean().add(1e-5).sqrt()
    found_KV = logit_changes(W_dec_KD, hooked.unembedding(64))
    torch.testing.assert_close(found_KV.double(), true_KV - true_KV.mean(1, keepdim=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("hook_name", "is_read"),
    [
        ("blocks.1.hook_resid_pre", True),
        ("blocks.1.hook_mlp_out", True),
        ("hook_embed", True),
        ("model.layers.1", True),
        ("blocks.1.attn.hook_z", False),
        ("model.layers.1.self_attn.q_proj", False),
    ],
)
def test_the_output_head_reads_the_residual_stream_and_what_is_added_to_it(hook_name, is_read):
    config = tiny_config("llama", **_GATED)  # its heads together are as wide as the model
    hooked = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), hook_name)
    assert (hooked.unembedding(64) is not None) == is_read


INNER = ["hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"]
_HEADS = {**_GATED, "head_dim": 16}
# The families, and the hooks within a block that they do not have.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (_GATED, []),
    "mistral": (_GATED, []),
    "qwen2": (_GATED, []),
    "qwen3": ({**_GATED, "head_dim": 32}, []),
    "gemma2": (_HEADS, []),
    "gemma3_text": (_HEADS, []),
    "gpt2": ({}, []),
    "gpt_neox": ({"intermediate_size": 128}, ["hook_resid_mid"]),
    "phi3": (_GATED, []),
    "olmo2": (_GATED, []),
    "granite": ({**_GATED, "residual_multiplier": 0.22}, ["hook_attn_out", "hook_mlp_out"]),
    "falcon": ({}, ["hook_resid_mid"]),
    "stablelm": (_GATED, []),
    "mixtral": ({**_GATED, "num_local_experts": 4}, ["mlp.hook_post"]),
    "gptj": ({"rotary_dim": 8}, ["hook_resid_mid"]),
    "qwen3_moe": ({**_HEADS, "num_experts": 8, "moe_intermediate_size": 32}, ["mlp.hook_post"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hooks_of_a_block_are_those_of_transformer_lens(family, tokenizer):
    more, absent = FAMILIES[family]
    config = tiny_config(family, **more)
    names = [f"blocks.2.{name}" for name in ("hook_resid_pre", *INNER, "hook_resid_post") if name not in absent]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name in names:
        hooked = LanguageModel(model, name)
        ours = hooked.activations(TOKENS)
        assert ours.shape[-1] == hook_width(config, name)
        if name == names[0]:
            bridge = TransformerBridge.boot_transformers(
                "tiny", hf_model=copy.deepcopy(model), tokenizer=tokenizer, dtype=torch.float32
            )
            theirs = bridge.run_with_cache(TOKENS, names_filter=names, prepend_bos=False)[1]
        torch.testing.assert_close(ours, theirs[name].flatten(2), rtol=1e-5, atol=1e-5 * ours.abs().max().item())
        logits, state = hooked.logits(TOKENS)
        torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)
    for name in absent:
        with pytest.raises(UserError) as refused:
            hook_width(config, f"blocks.2.{name}")
        assert "\n" not in str(refused.value)
