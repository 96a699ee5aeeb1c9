"""Builds language models from their configuration: without weights, or tiny with random weights."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.devices import random_states_restored

# The sizes of a tiny model, under all names that configurations give them. A configuration has only some of them.
_TINY_SIZES = {
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "embedding_dim", "lru_width", "moe_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 96),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("d_ff", "dff", "dim_ff", "d_inner", "share_expert_dim", "feed_forward_size"), 96),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "num_kv_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim", "dim_head", "swa_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "decoder_vocab_size"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}

# Multi-head latent attention: its heads have two parts, and pass through narrow layers.
_LATENT_SIZES = {
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(
        ("qk_head_dim", "swa_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"), 32
    ),
}

# State space models: heads of 16 that together are twice as wide as the hidden states.
_STATE_SPACE_SIZES = {
    **dict.fromkeys(("num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state"), 16),
    **dict.fromkeys(("state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "adapter_rank"), 8),
    **dict.fromkeys(("mamba_d_ssm", "attention_hidden_size"), 128),
    "attention_head_dim": 32,
}

# Parts beside the text decoder, as those for images.
_OTHER_PARTS_LAYERS = dict.fromkeys(
    ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers", "vision_layers"), 2
)
_OTHER_PARTS_SIZES = {
    **_OTHER_PARTS_LAYERS,
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "d_model", "projection_dim", "output_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "mlp_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
}


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns Transformers' class that builds and loads a model: of language, or of images and language.

    Raises:
        UserError: Transformers has neither for this configuration.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"--model_name: Transformers has no causal language model for {type(config).__name__}; if there is one inside"
        " it, save that one in a directory of its own and name the directory"
    )


def model_without_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a causal language model on the `meta` device, where it takes no memory.

    Raises:
        UserError: Transformers cannot build it from its configuration.
    """
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--model_name: Transformers cannot build a model of type {config.model_type} ({one_line(error)});"
            " use another model"
        ) from error


def tiny_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model of the same class and with the same layers, but of width 64, with random weights in float32.

    The vocabulary has 64 tokens. Raises what Transformers raises if the class cannot be that small.
    """
    return with_random_weights(tiny_config(config, trust_remote_code), trust_remote_code)


def tiny_config(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns a configuration of the same class and with the same layers in its text decoder, but of width 64.

    Other parts, as for images, have two layers. Transformers may not be able to build the class that small.
    """
    text, sizes = config.get_text_config(decoder=True), [_TINY_SIZES]
    if any(hasattr(text, name) for name in ("state_size", "ssm_state_size", "mamba_d_state")):
        sizes = [_TINY_SIZES | _STATE_SPACE_SIZES, _TINY_SIZES]
    if hasattr(text, "qk_rope_head_dim"):
        sizes = [_TINY_SIZES | _LATENT_SIZES, {k: v for k, v in _TINY_SIZES.items() if k != "head_dim"}]
    tiny = config
    for text_sizes, other_sizes in product(sizes, (_OTHER_PARTS_SIZES, _OTHER_PARTS_LAYERS)):
        try:
            tiny = _with_sizes(config, text_sizes, other_sizes)
            model_without_weights(tiny, trust_remote_code)
        except Exception:  # the sizes do not fit together in this class
            continue
        return tiny
    return tiny


def _with_sizes(config: PreTrainedConfig, sizes: dict[str, int], other_sizes: dict[str, int]) -> PreTrainedConfig:
    tiny = copy.deepcopy(config)
    text = {id(part): part for part in (tiny, tiny.get_text_config(decoder=True))}
    for part in text.values():
        _make_tiny(part, sizes)
    for part in _parts(tiny):
        if id(part) not in text:
            for name, size in other_sizes.items():
                _make_smaller(part, name, size)
    return tiny


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns a configuration and all configurations inside it."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for child in inside for part in _parts(child))]


def with_random_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model in float32 whose weights are all random, those of norms too, so that each shows in activations.

    Two calls give the same weights.
    """
    with random_states_restored():
        torch.default_generator.manual_seed(0)  # not those of CUDA devices, which are not restored
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    return model


def _make_tiny(config: PreTrainedConfig, sizes: dict[str, int]) -> None:
    n_heads, n_key_value = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    for name, size in sizes.items():
        _make_smaller(config, name, size)
    if n_key_value is not None:
        config.num_key_value_heads = 4 if n_key_value == n_heads else min(n_key_value, 2)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        # The factors of scaled rotary embeddings have the length of a head, and are of no matter here.
        parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
        for part in parts:
            for name in [name for name in part if name.endswith("_factor") and name != "partial_rotary_factor"]:
                del part[name]
            part["rope_type"] = "default"
            if isinstance(sections := part.get("mrope_section"), list):  # together half a head
                part["mrope_section"] = [8 - 2 * (len(sections) - 1), *[2] * (len(sections) - 1)]


def _make_smaller(config: PreTrainedConfig, name: str, size: int) -> None:
    if _size(config, name) is not None and not isinstance(getattr(type(config), name, None), property):
        setattr(config, name, size)


def _size(config: PreTrainedConfig, name: str) -> int | None:
    try:
        size = getattr(config, name, None)
    except Exception:  # a configuration whose layers differ has it per layer
        return None
    return size if isinstance(size, int) else None
