"""A Transformers causal language model, read and replaced at one hook.

The layers are Transformers' own (SDPA attention, no key-value cache); hooks go by TransformerLens's names,
which is what other SAE tools look for in a saved SAE.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Lock
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sae_toolkit.errors import UserError

# TransformerLens name within a block -> (submodule of the layer, whether the hook is its input or its output).
# Those with a submodule need a layer laid out as Llama's is: elsewhere the same names mean other tensors.
_BLOCK_HOOKS = {
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "hook_resid_mid": ("post_attention_layernorm", "input"),
    "hook_attn_out": ("self_attn", "output"),
    "hook_mlp_out": ("mlp", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
}
_FINAL_NORMS = {"norm", "ln_f", "final_layer_norm", "final_layernorm"}
_LLAMA_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class _HookReached(Exception):
    """Ends a forward pass at the hook."""


@dataclass(frozen=True)
class Hook:
    """A place in a model: the input or output of one module."""

    name: str
    module: nn.Module
    side: str  # "input" or "output"
    layer: int | None  # the decoder layer that it is in or is; None for a module outside the layers


def decoder_layers(model: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    """The list of a causal language model's decoder layers, wherever its architecture keeps it."""
    n_layers = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(f"--model_name: {type(model).__name__} has no list of {n_layers} decoder layers to hook")


def find_hook(model: nn.Module, config: PreTrainedConfig, hook_name: str, flag: str | None = None) -> Hook:
    """Finds a hook by its TransformerLens name or by a Transformers module name (its output).

    Args:
        model: the causal language model, on any device (`meta` will do).
        config: the model's configuration.
        hook_name: `blocks.{layer}.` and one of `hook_resid_pre`, `hook_resid_post`, `hook_resid_mid`,
            `hook_attn_out`, `hook_mlp_out`, `attn.hook_z`, `mlp.hook_post`; or a module of the
            Transformers model, such as `model.layers.12`.
        flag: what named it, for messages; None for --layer or --hook_name, as it is a matter of one or the other.

    Raises:
        UserError: the model has no such hook.
    """
    where = f"{flag or '--hook_name'} {hook_name}"
    layers = decoder_layers(model, config)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if block is None:
        modules = dict(model.named_modules())
        if hook_name not in modules:
            raise UserError(
                f"{where}: not of the form blocks.LAYER.hook_resid_post, and not a module of {type(model).__name__}"
            )
        module = modules[hook_name]
        if any(child is layers for child in module.modules()):
            raise UserError(f"{where}: holds all layers; name a layer, or a module within one")
        inside = (i for i, layer in enumerate(layers) if any(module is child for child in layer.modules()))
        return Hook(hook_name, module, "output", next(inside, None))

    layer, name = int(block[1]), block[2]
    if layer >= len(layers):
        where = where if flag in ("--hook_name", "--hook_names") else f"{flag or '--layer'} {layer}"
        raise UserError(f"{where}: the model has {len(layers)} layers, 0 to {len(layers) - 1}")
    if name not in _BLOCK_HOOKS:
        known = ", ".join(_BLOCK_HOOKS)
        raise UserError(f"{where}: known within a block are {known}")
    submodule, side = _BLOCK_HOOKS[name]
    if submodule and {child for child, _ in layers[layer].named_children()} != _LLAMA_LAYER:
        raise UserError(
            f"{where}: only resid_pre and resid_post are known for {type(layers[layer]).__name__};"
            " name the Transformers module instead"
        )
    return Hook(hook_name, layers[layer].get_submodule(submodule), side, layer)


def model_without_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model on the `meta` device, where it costs no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def hook_width(
    config: PreTrainedConfig, hook_name: str, trust_remote_code: bool = False, flag: str | None = None
) -> int:
    """Width d_in of the activations at a hook, from the model's shapes alone (no weights).

    Raises:
        UserError: the model has no such hook.
    """
    model = model_without_weights(config, trust_remote_code)
    hook = find_hook(model, config, hook_name, flag)
    if isinstance(hook.module, nn.Linear):
        return hook.module.in_features if hook.side == "input" else hook.module.out_features
    return config.get_text_config().hidden_size


def parameters_up_to_hook(config: PreTrainedConfig, hook_names: Sequence[str], trust_remote_code: bool = False) -> int:
    """Number of parameters that `LanguageModel.keep_only_up_to_hook` leaves, from the model's shapes alone."""
    model = LanguageModel(model_without_weights(config, trust_remote_code), *hook_names)
    model.keep_only_up_to_hook()
    return sum(parameter.numel() for parameter in model.model.parameters())


@dataclass
class HookState:
    """What a full forward pass leaves for the passes that start at the hook."""

    acts_BTD: torch.Tensor
    layer_input_BTD: torch.Tensor | None
    layer_extras: int | None  # what a decoder layer returns after its hidden states; None where it returns no tuple


class LanguageModel:
    """A causal language model with one hook, or with several to read at once.

    Shapes: B sequences, T tokens each, D the width at the hook, V the vocabulary. Activations have the
    model's dtype. `sequences_run` counts the sequences that went through all layers (`whole`), through those
    up to the hook (`up_to_hook`) and through those after it (`after_hook`).

    Args:
        model: the causal language model.
        hook_names: of one hook or more; `logits` and what follows it know the first alone.
    """

    def __init__(self, model: PreTrainedModel, *hook_names: str) -> None:
        self.sequences_run: Counter[str] = Counter()
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.config: PreTrainedConfig = model.config
        self.layers = decoder_layers(model, self.config)
        self.hooks = [find_hook(model, self.config, name) for name in hook_names]
        self.hook = self.hooks[0]
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._one_pass = Lock()  # hooks would take what another thread's pass brings
        self._is_resid_mid = re.fullmatch(r"blocks\.\d+\.hook_resid_mid", hook_names[0]) is not None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.device

    def keep_only_up_to_hook(self) -> None:
        """Frees the layers after the last hook and the output head. `activations` still works, nothing else."""
        layers = [hook.layer for hook in self.hooks if hook.layer is not None]
        if len(layers) == len(self.hooks):
            del self.layers[max(layers) + 1 :]
        self.model = cast(PreTrainedModel, self.model.base_model)

    @torch.no_grad()
    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Activations at the hook, [B, T, D]; those at several hooks side by side. Nothing after them is computed."""
        reached: dict[str, torch.Tensor] = {}

        def read(name: str, acts: torch.Tensor) -> None:
            reached[name] = acts
            if len(reached) == len(self.hooks):
                raise _HookReached

        self.sequences_run["up_to_hook"] += len(tokens_BT)
        with self._one_pass, ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(_hooked(hook.module, hook.side, partial(read, hook.name)))
            with suppress(_HookReached):
                self.model(tokens_BT.to(self.device), use_cache=False)
        for hook in self.hooks:
            acts = reached.get(hook.name)
            if not isinstance(acts, torch.Tensor) or acts.shape[:2] != tokens_BT.shape:
                raise UserError(f"--hook_name {hook.name}: no activations [batch, position, width] come by there")
        return _side_by_side([_flat_heads(reached[hook.name]) for hook in self.hooks])

    @torch.no_grad()
    def logits(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, HookState]:
        """Logits [B, T, V] of the unchanged model, and what `logits_from_hook` needs to start at the hook."""
        seen: dict[str, Any] = {}

        def on_layer_output(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["layer_extras"] = len(output) - 1 if isinstance(output, tuple) else None

        self.sequences_run["whole"] += len(tokens_BT)
        with ExitStack() as stack:
            stack.enter_context(self._at_hook(lambda acts: seen.update(acts=acts)))
            if self.hook.layer is not None:
                layer = self.layers[self.hook.layer]
                stack.enter_context(_hooked(layer, "input", lambda hidden: seen.update(layer_input=hidden)))
                stack.callback(layer.register_forward_hook(on_layer_output).remove)
            logits = self.model(tokens_BT.to(self.device), use_cache=False).logits
        return logits, HookState(_flat_heads(seen["acts"]), seen.get("layer_input"), seen.get("layer_extras"))

    @torch.no_grad()
    def logits_from_hook(self, tokens_BT: torch.Tensor, state: HookState, acts_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] with `acts_BTD` in place of the model's own activations at the hook.

        The layers before the hook are not run again. At hook_resid_mid the residual stream itself is replaced,
        as in TransformerLens: the layer's skip connection carries `acts_BTD` too.

        Args:
            tokens_BT: the tokens that `state` came from.
            state: from `logits`.
            acts_BTD: what stands in at the hook, in any floating dtype.
        """
        acts = acts_BTD.to(self.dtype)
        self.sequences_run["after_hook"] += len(tokens_BT)
        with ExitStack() as stack:
            if self.hook.layer is None:
                stack.enter_context(self._at_hook(lambda _: acts))
            else:
                layer, extras = self.layers[self.hook.layer], state.layer_extras
                for lower in self.layers[: self.hook.layer]:
                    stack.enter_context(_forward_replaced(lower, lambda hidden: hidden, extras))
                if self.hook.module is layer and self.hook.side == "output":
                    stack.enter_context(_forward_replaced(layer, lambda _: acts, extras))
                else:
                    # Entering the layer in place of its input, with no attention added, is exact at resid_mid:
                    # adding (new - old) to the output would leave the rounding of the old activations.
                    layer_input = acts if self._is_resid_mid else state.layer_input_BTD
                    stack.enter_context(_hooked(layer, "input", lambda _: layer_input))
                    if self._is_resid_mid:
                        stack.enter_context(_hooked(layer.get_submodule("self_attn"), "output", torch.zeros_like))
                    stack.enter_context(self._at_hook(lambda _: acts))
            return self.model(tokens_BT.to(self.device), use_cache=False).logits

    @cached_property
    def ablation_is_shared(self) -> bool:
        """Whether zeros at the hook, at every position, leave nothing of the text: the model's predictions are
        then the same for every sequence of a length.

        Only where the hook is the residual stream, and seen in two short texts, which are run once: some models
        give token information to their later layers again.
        """
        if not self._is_resid_mid and all(self.hook.module is not layer for layer in self.layers):
            return False
        counted = self.sequences_run.copy()
        ablated = []
        for first in (1, 5):  # apart, so that both run the same kernels and equal means equal to the bit
            tokens_BT = torch.arange(first, first + 4)[None]
            _, state = self.logits(tokens_BT)
            ablated.append(self.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD)))
        self.sequences_run = counted
        return torch.equal(ablated[0], ablated[1])

    def _at_hook(self, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        return _hooked(self.hook.module, self.hook.side, function)

    def unembedding(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights of the output head [V, D] and what the norm before it multiplies by [D], where there are any."""
        head = self.model.get_output_embeddings()
        norm = next((m for name, m in self.model.base_model.named_children() if name in _FINAL_NORMS), None)
        weight = getattr(norm, "weight", None)
        if weight is not None and type(norm).__name__.startswith("Gemma"):  # multiplies by 1 + weight
            weight = 1 + weight
        return getattr(head, "weight", None), weight


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


def _flat_heads(acts: torch.Tensor) -> torch.Tensor:
    return acts.flatten(2) if acts.ndim > 3 else acts


@contextmanager
def _hooked(module: nn.Module, side: str, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Calls `function` with a module's first input or output; what it returns, if not None, takes its place."""

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = function(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(on_output)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward_replaced(
    layer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], extras: int | None
) -> Iterator[None]:
    """Makes a decoder layer return `function` of the hidden states that it is given, and compute nothing.

    `extras` is how many more things its caller expects in a tuple (they are None), or None for no tuple.
    """

    def forward(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        hidden = function(hidden_states)
        return hidden if extras is None else (hidden, *[None] * extras)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
