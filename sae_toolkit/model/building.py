"""Builds language models from their configuration: without weights, or tiny with random weights."""

from __future__ import annotations

import copy
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
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
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

    All weights are random, those of norms too, so that every one of them shows in the activations. The vocabulary has
    64 tokens. Raises what Transformers raises if the class cannot be that small.
    """
    tiny = copy.deepcopy(config)
    for part in {id(c): c for c in (tiny, tiny.get_text_config(decoder=True))}.values():
        _make_tiny(part)
    with random_states_restored():
        torch.default_generator.manual_seed(0)  # not those of CUDA devices, which are not restored
        model: PreTrainedModel = auto_class(tiny).from_config(
            tiny, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    return model


def _make_tiny(config: PreTrainedConfig) -> None:
    n_heads, n_key_value = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    sizes = dict(_TINY_SIZES)
    if hasattr(config, "qk_rope_head_dim"):  # multi-head latent attention: its heads have sizes of their own
        del sizes["head_dim"]
    for name, size in sizes.items():
        if _size(config, name) is not None and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, size)
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


def _size(config: PreTrainedConfig, name: str) -> int | None:
    try:
        size = getattr(config, name, None)
    except Exception:  # a configuration whose layers differ has it per layer
        return None
    return size if isinstance(size, int) else None
