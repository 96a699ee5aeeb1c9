"""A Transformers causal language model whose activations are read or replaced at a hook.

The layers are Transformers' own: SDPA attention, no key-value cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Lock
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from sae_toolkit.errors import UserError
from sae_toolkit.model.hooks import (
    EMBEDDING_HOOK,
    decoder_layers,
    find_hook,
    forward_replaced,
    hooked,
    text_decoder,
)

_FINAL_NORMS = {"norm", "ln_f", "norm_f", "final_norm", "final_layer_norm", "final_layernorm", "layer_norm"} | {
    "embedding_norm"  # of LFM2
}
# Hooks at the residual stream, or at outputs that are added to it. The output head reads that stream.
_WRITES_TO_RESIDUAL = re.compile(r"blocks\.\d+\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)")


class _HookReached(Exception):
    """Ends a forward pass at the last hook."""


@dataclass
class HookState:
    """What `LanguageModel.logits_from_hook` needs from a forward pass through all layers."""

    acts_BTD: torch.Tensor
    layer_input_BTD: torch.Tensor | None
    layer_extras: int | None  # number of values after the hidden states in a layer's output; None if that is no tuple


@dataclass(frozen=True)
class Unembedding:
    """What makes logits of the residual stream: the last norm, and the output head.

    Args:
        weight_VD: weight of the output head.
        norm_factors_D: what the norm multiplies each dimension by; None if there is no norm.
        is_centered: whether the norm subtracts the mean over the dimensions, as a LayerNorm does.
    """

    weight_VD: torch.Tensor
    norm_factors_D: torch.Tensor | None = None
    is_centered: bool = False


class LanguageModel:
    """A causal language model with one hook, or with several to read at once.

    Shapes: B sequences, T tokens each, D the width at the hook, V the vocabulary. Activations have the
    model's dtype. `sequences_run` counts the sequences that went through all layers (`whole`), through the
    layers up to the hook (`up_to_hook`), and through the layers after it (`after_hook`).

    Args:
        model: the causal language model.
        hook_names: one name or more. `activations` reads all of these hooks; every other method uses the first only.
    """

    def __init__(self, model: PreTrainedModel, *hook_names: str) -> None:
        self.sequences_run: Counter[str] = Counter()
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.config: PreTrainedConfig = model.config
        self.layers = decoder_layers(model, self.config)
        self.hooks = [find_hook(model, self.config, name) for name in hook_names]
        self.hook = self.hooks[0]
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._embeddings = model.get_input_embeddings()  # some base models do not say which these are
        self._one_pass = Lock()  # PyTorch's hooks would also be called in another thread's pass
        self._is_resid_mid = self.hook.name.endswith(".hook_resid_mid")

    @property
    def device(self) -> torch.device:
        """The device that token ids are moved to."""
        return next(self._embeddings.parameters()).device

    def compile_layers(self, mode: str | None = None) -> None:
        """Has torch.compile compile each layer, except for layers with a hook inside them. The first pass is slow.

        Args:
            mode: mode of torch.compile; None for its default.
        """
        with_hook_inside = {
            hook.layer for hook in self.hooks if hook.layer is not None and hook.module is not self.layers[hook.layer]
        }
        for index, layer in enumerate(self.layers):
            if index not in with_hook_inside:
                # Not layer.compile(), which would compile the hooks of the layer too.
                layer.forward = torch.compile(layer.forward, mode=mode)

    def keep_only_up_to_hook(self) -> None:
        """Frees the layers after the last hook, and the output head. Only `activations` works after that."""
        layers = [hook.layer for hook in self.hooks if hook.layer is not None]
        if len(layers) == len(self.hooks):
            del self.layers[max(layers) + 1 :]
        self.model = cast(PreTrainedModel, self.model.base_model)

    @torch.no_grad()
    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Returns the activations at the hook, [B, T, D]; those of several hooks are concatenated along D.

        The forward pass ends at the last hook.

        Raises:
            UserError: the module at a hook has no input or output of shape [B, T, ...].
        """
        reached: dict[str, torch.Tensor] = {}

        def read(name: str, acts: torch.Tensor) -> None:
            reached[name] = acts if len(self.hooks) == 1 else _copied(acts)
            if len(reached) == len(self.hooks):
                raise _HookReached

        self.sequences_run["up_to_hook"] += len(tokens_BT)
        with self._one_pass, ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hooked(hook.module, hook.side, partial(read, hook.name)))
            with suppress(_HookReached):
                self.model(tokens_BT.to(self.device), use_cache=False)
        return _side_by_side([_checked(reached.get(hook.name), hook.name, tokens_BT) for hook in self.hooks])

    @torch.no_grad()
    def logits(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, HookState]:
        """Returns the logits [B, T, V] of the unchanged model, and the state that `logits_from_hook` starts from.

        Raises:
            UserError: the model has no logits for each token, or the hook no activations of shape [B, T, ...].
        """
        seen: dict[str, Any] = {}

        def on_layer_output(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["layer_extras"] = len(output) - 1 if isinstance(output, tuple) else None

        self.sequences_run["whole"] += len(tokens_BT)
        with ExitStack() as stack:
            stack.enter_context(self._at_hook(lambda acts: seen.update(acts=_copied(acts))))
            if self.hook.layer is not None:
                layer = self.layers[self.hook.layer]
                stack.enter_context(hooked(layer, "input", lambda hidden: seen.update(layer_input=hidden)))
                stack.enter_context(layer.register_forward_hook(on_layer_output))
            logits = self.model(tokens_BT.to(self.device), use_cache=False).logits
        if logits.shape[:2] != tokens_BT.shape:  # as of an encoder, whose decoder gets other tokens
            raise UserError(
                f"--model_name: {type(self.model).__name__} gives logits of {list(logits.shape)} for tokens of"
                f" {list(tokens_BT.shape)}, and not some for each token; use a causal language model"
            )
        acts_BTD = _checked(seen.get("acts"), self.hook.name, tokens_BT)
        return logits, HookState(acts_BTD, seen.get("layer_input"), seen.get("layer_extras"))

    def logits_from_hook(self, tokens_BT: torch.Tensor, state: HookState, acts_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, T, V] with `acts_BTD` in place of the model's own activations at the hook.

        The layers before the hook are not run again. At hook_resid_mid the residual stream itself is replaced,
        as in TransformerLens: the layer's skip connection carries `acts_BTD` too.

        Args:
            tokens_BT: the tokens that `state` belongs to.
            state: returned by `logits`.
            acts_BTD: the activations to put at the hook, in any floating dtype and on any device. If they require
                gradients, the logits can be differentiated with respect to them.
        """
        with torch.set_grad_enabled(acts_BTD.requires_grad), ExitStack() as stack:
            acts = acts_BTD.to(state.acts_BTD.device, self.dtype, copy=True)  # layers may write into their inputs
            self.sequences_run["after_hook"] += len(tokens_BT)
            if self.hook.layer is None:
                stack.enter_context(self._at_hook(acts.reshape_as))
            else:
                layer, extras = self.layers[self.hook.layer], state.layer_extras
                for lower in self.layers[: self.hook.layer]:
                    stack.enter_context(forward_replaced(lower, lambda hidden: hidden, extras))
                if self.hook.module is layer and self.hook.side == "output":
                    if state.layer_input_BTD is not None:  # in some models it has an axis more
                        acts = acts.reshape(state.layer_input_BTD.shape)
                    stack.enter_context(forward_replaced(layer, lambda _: acts, extras))
                else:
                    # At resid_mid the new activations enter as the layer's input and attention adds zeros. That is
                    # exact; adding (new - old) to the layer's output would keep the rounding of the old activations.
                    layer_input = acts if self._is_resid_mid else state.layer_input_BTD
                    stack.enter_context(hooked(layer, "input", lambda _: layer_input))
                    if self._is_resid_mid:
                        assert self.hook.attention is not None
                        stack.enter_context(hooked(self.hook.attention, "output", torch.zeros_like))
                    stack.enter_context(self._at_hook(acts.reshape_as))
            return self.model(tokens_BT.to(self.device), use_cache=False).logits

    @cached_property
    def ablation_is_shared(self) -> bool:
        """Whether zeros at the hook, at every position, remove all information about the text. The model's predictions
        are then the same for every sequence of the same length.

        This holds only if the hook is the residual stream and no later layer reads the tokens again. In some models
        later layers do, so it is tested once, on two short texts.
        """
        if not self._is_resid_mid and all(self.hook.module is not layer for layer in self.layers):
            return False
        counted = self.sequences_run.copy()
        ablated = []
        for first in (1, 5):  # separately, so that both run the same kernels and equal results are equal bit for bit
            tokens_BT = torch.arange(first, first + 4)[None]
            _, state = self.logits(tokens_BT)
            ablated.append(self.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD)))
        self.sequences_run = counted
        return torch.equal(ablated[0], ablated[1])

    def _at_hook(self, function: Callable[[torch.Tensor], torch.Tensor | None]) -> RemovableHandle:
        return hooked(self.hook.module, self.hook.side, function)

    def unembedding(self, width: int) -> Unembedding | None:
        """Returns the last norm and the output head; None if they do not read what is at the hook.

        They read the residual stream, and what is added to it. They are not found where the model has no output head,
        or one of another width, as with several residual streams.

        Args:
            width: width at the hook.
        """
        hook = self.hook
        is_residual = hook.name == EMBEDDING_HOOK or any(hook.module is layer for layer in self.layers)
        weight_VD = getattr(self.model.get_output_embeddings(), "weight", None)
        if weight_VD is None or not (is_residual or _WRITES_TO_RESIDUAL.fullmatch(hook.name)):
            return None
        if weight_VD.shape[1] != width:
            return None
        norm = next((m for name, m in text_decoder(self.model).named_children() if name in _FINAL_NORMS), None)
        return Unembedding(weight_VD) if norm is None else Unembedding(weight_VD, *_norm_of(norm, weight_VD))


@torch.no_grad()
def _norm_of(norm: nn.Module, weight_VD: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Returns what a norm multiplies each dimension by [D], and whether it subtracts the mean over the dimensions.

    Some families multiply by the weight, some by 1 + weight, and some have none. So the norm is applied to x and -x,
    where x is 1 and -1 by turns: its mean is 0 and its mean square 1. Half the difference of the two leaves no bias.
    Adding 1 to x changes nothing if the mean is subtracted.
    """
    like = next(norm.parameters(), weight_VD)
    signs_D = 1 - 2 * (torch.arange(weight_VD.shape[1], device=like.device) % 2).to(like.dtype)
    plus_D, minus_D, moved_D = (norm(x_D[None, None])[0, 0].float() for x_D in (signs_D, -signs_D, signs_D + 1))
    moved_by = (moved_D - plus_D).abs().mean() / (plus_D - minus_D).abs().mean().clamp(min=1e-30)
    return (plus_D - minus_D) / 2 * signs_D, bool(moved_by < 0.02)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


def _copied(acts: Any) -> Any:
    """Returns a copy of a tensor that the model may write into later, as Falcon does into the output of its MLP."""
    return acts.clone() if isinstance(acts, torch.Tensor) else acts


def _checked(acts: Any, hook_name: str, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Returns the activations at a hook as [B, T, D]; those of several heads are concatenated along D."""
    if not isinstance(acts, torch.Tensor) or acts.ndim < 3 or acts.shape[:2] != tokens_BT.shape:
        found = "none come by" if acts is None else f"{list(getattr(acts, 'shape', []))} comes by"
        raise UserError(
            f"--hook_name {hook_name}: has no activations of shape [batch, position, width] ({found} for tokens of"
            f" {list(tokens_BT.shape)}); use another hook"
        )
    return acts.flatten(2)
