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
from sae_toolkit.model.block_hooks import INNER_HOOKS, BlockHooks, block_hooks, embedding_module

EMBEDDING_HOOK = "hook_embed"
_RESIDUAL_HOOKS = {"hook_resid_pre": "input", "hook_resid_post": "output"}


@dataclass(frozen=True)
class Hook:
    """A place in a model: the input or the output of one module."""

    name: str  # TransformerLens's, or the module's full name in the causal language model
    module: nn.Module
    side: str  # "input" or "output"
    layer: int | None  # index of the decoder layer that is or holds the module; None for a module outside the layers
    attention: nn.Module | None = None  # at hook_resid_mid: the module whose output was added to the layer's input last


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
    text_config = config.get_text_config(decoder=True)
    n_layers = getattr(text_config, "decoder_layers", None) or getattr(text_config, "num_hidden_layers", None)
    for module in text_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(
        f"--model_name: {type(model).__name__} has no list of {n_layers or 'its'} decoder layers to hook; use another"
        " model"
    )


def find_hook(model: PreTrainedModel, config: PreTrainedConfig, hook_name: str, flag: str | None = None) -> Hook:
    """Finds a hook by its TransformerLens name, or by the name of a Transformers module (the module's output).

    Args:
        model: the causal language model, on any device (`meta` will do).
        config: the model's configuration.
        hook_name: `hook_embed`; or `blocks.{layer}.` and one of `hook_resid_pre`, `hook_resid_post`, `hook_resid_mid`,
            `hook_attn_out`, `hook_mlp_out`, `attn.hook_z`, `mlp.hook_post`; or a module of the
            Transformers model, such as `model.layers.12`, also as sparsify names it, from the base model: `layers.12`.
        flag: the flag that named the hook, for messages; None if it was --layer or --hook_name.

    Raises:
        UserError: the model has no such hook.
    """
    where = f"{flag or '--hook_name'} {hook_name}"
    layers = decoder_layers(model, config)
    if hook_name == EMBEDDING_HOOK:
        return Hook(hook_name, _embedding(model, config, where), "output", None)
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
        full_name = next(name for name, each in model.named_modules() if each is module)
        return Hook(full_name, module, "output", next(inside, None))

    layer, name = int(block[1]), block[2]
    if layer >= len(layers):
        where = where if flag in ("--hook_name", "--hook_names") else f"{flag or '--layer'} {layer}"
        raise UserError(f"{where}: the model has {len(layers)} layers, 0 to {len(layers) - 1}")
    if name in _RESIDUAL_HOOKS:
        return Hook(hook_name, layers[layer], _RESIDUAL_HOOKS[name], layer)
    if name not in INNER_HOOKS:
        known = ", ".join((*_RESIDUAL_HOOKS, *INNER_HOOKS))
        raise UserError(f"{where}: known within a block are {known}; use one of them")
    known_hooks = block_hooks(model, config, layers[layer])
    modules = dict(layers[layer].named_modules())
    submodule, side = known_hooks.places.get(name, ("", ""))
    attention = known_hooks.places.get("hook_attn_out", (known_hooks.modules.get("attn", ""), ""))[0]
    if not submodule or submodule not in modules or (name == "hook_resid_mid" and attention not in modules):
        raise UserError(f"{where}: {_why_unknown(model, layers[layer], name, known_hooks)}")
    return Hook(hook_name, modules[submodule], side, layer, modules[attention] if name == "hook_resid_mid" else None)


def _embedding(model: PreTrainedModel, config: PreTrainedConfig, where: str) -> nn.Module:
    name = embedding_module(model, config)
    found = dict(model.named_modules()).get(name) if name else None
    if found is None:
        raise UserError(
            f"{where}: TransformerLens does not say where it is in {type(model).__name__}; name the Transformers module"
            " instead"
        )
    return found


def _why_unknown(model: PreTrainedModel, layer: nn.Module, name: str, known_hooks: BlockHooks) -> str:
    """Returns a phrase that says why a layer has no such hook, and what to name instead."""
    kind, path = type(layer).__name__, next(path for path, module in model.named_modules() if module is layer)
    component = {"hook_attn_out": "attn", "attn.hook_z": "attn", "hook_mlp_out": "mlp", "mlp.hook_post": "mlp"}.get(
        name
    )
    module = known_hooks.modules.get(component or "")
    if not known_hooks.places:
        return f"only hook_resid_pre and hook_resid_post are known for {kind}; name the Transformers module instead"
    if name == "hook_resid_mid":
        return f"{kind} has no sum between its attention and its MLP; use hook_resid_pre or hook_resid_post"
    if name == "mlp.hook_post":
        return (
            f"no module of {kind} has these activations alone, as in a mixture of experts each expert has its own; name"
            f" a Transformers module of {path} instead"
        )
    if name not in ("hook_attn_out", "hook_mlp_out") or module not in dict(layer.named_modules()):
        return f"no module of {kind} has these activations; name a Transformers module of {path} instead"
    sums = "resid_pre + attn_out = resid_mid" if component == "attn" else "resid_mid + mlp_out = resid_post"
    return (
        f"{kind} scales what it adds, so that {sums} is true of no module's output;"
        f" name {path}.{module} for the output before it is scaled"
    )


def is_transformer_lens_name(hook_name: str) -> bool:
    """Returns whether a hook has a name of TransformerLens, and not that of a Transformers module."""
    return hook_name == EMBEDDING_HOOK or re.fullmatch(r"blocks\.\d+\..+", hook_name) is not None


def is_residual_stream(hook_name: str) -> bool:
    """Returns whether a hook is the input or the output of a whole decoder layer, by TransformerLens's name for it."""
    return hook_name.startswith("blocks.") and hook_name.rpartition(".")[2] in _RESIDUAL_HOOKS


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
