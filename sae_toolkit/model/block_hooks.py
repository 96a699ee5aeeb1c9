"""Where TransformerLens's hooks lie in a Transformers model: those within a block, and that of the embedding.

TransformerLens has an adapter for each family that it knows, which says what module each of its hooks belongs to.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
from transformers import PreTrainedConfig, PreTrainedModel

# The hooks that are modules of a block, or within one.
INNER_HOOKS = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")

# The places in a layer built as Llama's is, for families without an adapter.
_LLAMA_PLACES = {
    "hook_resid_mid": ("post_attention_layernorm", "input"),
    "hook_attn_out": ("self_attn", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
}
_LLAMA_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True)
class BlockHooks:
    """The hooks within the decoder layers of one model.

    `places` gives for each hook the module's name within a layer, and whether the hook is its input or its output. A
    hook is absent where no module has that tensor. `modules` are the attention and the MLP of a layer, by the names
    `attn` and `mlp`.
    """

    places: dict[str, tuple[str, str]]
    modules: dict[str, str]


def block_hooks(model: PreTrainedModel, config: PreTrainedConfig, layer: torch.nn.Module) -> BlockHooks:
    """Returns where the hooks within a block lie; no places if neither TransformerLens nor this project knows."""
    # An adapter may fail in any way on a configuration that it was not written for.
    with suppress(Exception):
        block = _components(model, config)["blocks"]
        places = {name: place for name in INNER_HOOKS if (place := _place(block, name)) is not None}
        modules: dict[str, str] = {
            name: str(block.submodules[name].name) for name in ("attn", "mlp") if name in block.submodules
        }
        return BlockHooks(places, modules)
    if {child for child, _ in layer.named_children()} == _LLAMA_LAYER:
        return BlockHooks(_LLAMA_PLACES, {"attn": "self_attn", "mlp": "mlp"})
    return BlockHooks({}, {})


def embedding_module(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """Returns the name of the module whose output is hook_embed; None if TransformerLens does not know the family.

    It is the norm of the embedding, where there is one (TransformerBridge.hook_aliases). Where the embedding's module
    multiplies by a factor, as in Gemma, the factor is in the activations.
    """
    with suppress(Exception):
        components = _components(model, config)
        name: str | None = (components.get("embed_ln") or components["embed"]).name
        return name
    return None


def _components(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the components that TransformerLens's adapter names. Raises any error if there is no adapter."""
    bridge_config = build_bridge_config_from_hf(config, type(model).__name__, "", torch.float32)
    return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config).components


def _place(block: Any, name: str) -> tuple[str, str] | None:
    """Follows TransformerLens's alias of a hook to the module that it is the input or output of."""
    *parts, hook = name.split(".")
    component, modules = block, []
    for part in parts:
        component = component.submodules.get(part)
        if component is None:
            return None
        modules.append(component.name)
    alias = component.hook_aliases.get(hook)
    if not isinstance(alias, str):
        return None
    *inner, side = alias.split(".")
    if parts and not inner:
        # In a mixture of experts mlp.hook_post would be the MLP's output. Some of its layers may have a plain MLP.
        if "dense_out" not in component.submodules:
            return None
        inner, side = ["dense_out"], "hook_in"
    for part in inner:
        component = component.submodules[part]
        modules.append(component.name)
    return ".".join(module for module in modules if module), {"hook_in": "input", "hook_out": "output"}[side]
