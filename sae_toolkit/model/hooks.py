"""Hooks: the places in a Transformers model where activations are read or replaced.

They have TransformerLens's names, because other SAE tools look for these names in a saved SAE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from sae_toolkit.errors import UserError

# TransformerLens's name within a block -> (submodule of the layer, whether the hook is its input or its output).
# The names with a submodule are used only for layers built as Llama's are: in other layers they mean other tensors.
_BLOCK_HOOKS = {
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "hook_resid_mid": ("post_attention_layernorm", "input"),
    "hook_attn_out": ("self_attn", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
}
_LLAMA_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True)
class Hook:
    """A place in a model: the input or the output of one module."""

    name: str
    module: nn.Module
    side: str  # "input" or "output"
    layer: int | None  # index of the decoder layer that is or holds the module; None for a module outside the layers


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Returns the part of a causal language model that runs its decoder layers on text, without the vision tower."""
    decoder = model.get_decoder()
    has_layers = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    return decoder if has_layers else cast(nn.Module, model.base_model)  # in ModernBERT `decoder` is the output head


def decoder_layers(model: PreTrainedModel, config: PreTrainedConfig) -> nn.ModuleList:
    """Returns the list of a causal language model's decoder layers, wherever its architecture keeps it.

    Raises:
        UserError: the model has no such list.
    """
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    for module in text_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(
        f"--model_name: {type(model).__name__} has no list of {n_layers} decoder layers to hook; use another model"
    )


def find_hook(model: PreTrainedModel, config: PreTrainedConfig, hook_name: str, flag: str | None = None) -> Hook:
    """Finds a hook by its TransformerLens name, or by the name of a Transformers module (the module's output).

    Args:
        model: the causal language model, on any device (`meta` will do).
        config: the model's configuration.
        hook_name: `blocks.{layer}.` and one of `hook_resid_pre`, `hook_resid_post`, `hook_resid_mid`,
            `hook_attn_out`, `hook_mlp_out`, `attn.hook_z`, `mlp.hook_post`; or a module of the
            Transformers model, such as `model.layers.12`, also as sparsify names it, from the base model: `layers.12`.
        flag: the flag that named the hook, for messages; None if it was --layer or --hook_name.

    Raises:
        UserError: the model has no such hook.
    """
    where = f"{flag or '--hook_name'} {hook_name}"
    layers = decoder_layers(model, config)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if block is None:
        modules = dict(cast(nn.Module, model.base_model).named_modules()) | dict(model.named_modules())
        if hook_name not in modules:
            raise UserError(
                f"{where}: not of the form blocks.LAYER.hook_resid_post, and not a module of {type(model).__name__};"
                " give one of the two"
            )
        module = modules[hook_name]
        if any(child is layers for child in module.modules()):
            raise UserError(f"{where}: holds all layers; name one layer, or a module within a layer")
        inside = (i for i, layer in enumerate(layers) if any(module is child for child in layer.modules()))
        return Hook(hook_name, module, "output", next(inside, None))

    layer, name = int(block[1]), block[2]
    if layer >= len(layers):
        where = where if flag in ("--hook_name", "--hook_names") else f"{flag or '--layer'} {layer}"
        raise UserError(f"{where}: the model has {len(layers)} layers, 0 to {len(layers) - 1}")
    if name not in _BLOCK_HOOKS:
        known = ", ".join(_BLOCK_HOOKS)
        raise UserError(f"{where}: known within a block are {known}; use one of them")
    submodule, side = _BLOCK_HOOKS[name]
    if submodule and {child for child, _ in layers[layer].named_children()} != _LLAMA_LAYER:
        raise UserError(
            f"{where}: only resid_pre and resid_post are known for {type(layers[layer]).__name__};"
            " name the Transformers module instead"
        )
    return Hook(hook_name, layers[layer].get_submodule(submodule), side, layer)


def hooked(module: nn.Module, side: str, function: Callable[[torch.Tensor], Any]) -> RemovableHandle:
    """Registers a PyTorch hook on a module, and returns its handle, which is a context manager.

    Args:
        side: `input` or `output`.
        function: called with the module's first input or output. Its result replaces that tensor, unless it is None.
    """

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = function(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = function(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextmanager
def forward_replaced(
    layer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], extras: int | None
) -> Iterator[None]:
    """Context manager inside which a decoder layer computes nothing and returns `function` of its hidden states.

    Args:
        extras: how many more values the layer's caller expects in a tuple with the hidden states; they will be None.
            If `extras` is None, the caller expects no tuple.
    """

    def forward(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        hidden = function(hidden_states)
        return hidden if extras is None else (hidden, *[None] * extras)

    # Where accelerate spreads a model over devices, its own `forward` moves the inputs and outputs of the layer and
    # calls `_old_forward` in between. So that is what is replaced there.
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    before = vars(layer).get(name)
    setattr(layer, name, forward)
    try:
        yield
    finally:
        delattr(layer, name)
        if before is not None:
            setattr(layer, name, before)
