"""The width of the activations at a hook, found and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.building import model_without_weights, tiny_model
from sae_toolkit.model.hooks import find_hook, forward_replaced, is_residual_stream
from sae_toolkit.model.language_model import HookState, LanguageModel


@dataclass(frozen=True)
class _ModelClass:
    """A model's class and sizes, which may be a key of a cache."""

    description: str
    trust_remote_code: bool
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=1)
def _trial_models(of: _ModelClass) -> tuple[PreTrainedModel, PreTrainedModel | Exception]:
    """Returns a model without weights, and a tiny one of the same class, or why there is none."""
    # In bfloat16, as torch knows the shapes of a mixture of experts on `meta` only there.
    empty = cast(Any, model_without_weights(of.config, of.trust_remote_code)).to(torch.bfloat16)
    try:
        return empty, tiny_model(of.config, of.trust_remote_code)
    except Exception as error:  # Transformers cannot make the class that small
        return empty, error


def hook_width(
    config: PreTrainedConfig, hook_name: str, trust_remote_code: bool = False, flag: str | None = None
) -> int:
    """Returns d_in, the width of the activations that come by at a hook. No weights are loaded.

    A tiny model of the same class first shows that the hook is what its name says. Then the model runs on two short
    texts with fake tensors, which have shapes only.

    Raises:
        UserError: the model has no such hook, or no activations of shape [B, T, ...] come by there, or others than
            those that the name stands for.
    """
    return _hook_width(_ModelClass(repr(config.to_dict()), trust_remote_code, config), hook_name, flag)


def full_hook_name(config: PreTrainedConfig, hook_name: str, trust_remote_code: bool = False) -> str:
    """Returns TransformerLens's name of a hook, or the full name of a Transformers module. No weights are loaded.

    SAELens, SAEDashboard and Neuronpedia look for modules by their full names (`model.layers.1.mlp`), and hooks may
    have been named from the base model (`layers.1.mlp`).

    Raises:
        UserError: the model has no such hook.
    """
    empty, _ = _trial_models(_ModelClass(repr(config.to_dict()), trust_remote_code, config))
    return find_hook(empty, config, hook_name).name


@lru_cache(maxsize=256)
def _hook_width(of: _ModelClass, hook_name: str, flag: str | None) -> int:
    empty, tiny = _trial_models(of)
    where = f"{flag or '--hook_name'} {hook_name}"
    find_hook(empty, of.config, hook_name, flag)
    state, unchecked = _check_on_tiny_model(tiny, hook_name, where)
    within_block = hook_name.startswith("blocks.") and not is_residual_stream(hook_name)
    if unchecked is not None and within_block:
        raise UserError(
            f"{where}: not known to be what its name says, as {of.config.model_type} does not run at a tiny size"
            f" ({one_line(unchecked)}); name the Transformers module instead"
        ) from unchecked
    try:
        return _width_on_fake_tensors(LanguageModel(empty, hook_name), state)
    except UserError:
        raise
    except Exception as error:  # the class reads values of tensors
        if state is not None and is_residual_stream(hook_name):
            return of.config.get_text_config(decoder=True).hidden_size
        raise UserError(
            f"{where}: the width there is not known, as {type(empty).__name__} does not run without its weights"
            f" ({one_line(error)}); use {'another model' if is_residual_stream(hook_name) else 'hook_resid_post'}"
        ) from error


def _width_on_fake_tensors(model: LanguageModel, state: HookState | None) -> int:
    """Returns the width at a model's hook. With a state of a tiny model of its class, the layers below do not run."""
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        if state is not None and model.hook.layer is not None:
            for lower in model.layers[: model.hook.layer]:
                stack.enter_context(forward_replaced(lower, lambda hidden: hidden, state.layer_extras))
        return model.activations(torch.ones(2, 3, dtype=torch.long, device="meta")).shape[-1]


def _check_on_tiny_model(
    tiny: PreTrainedModel | Exception, hook_name: str, where: str
) -> tuple[HookState | None, Exception | None]:
    """Checks that a hook is what its name says, on a tiny model with random weights.

    The parts of a block add up as they do in TransformerLens, and the exact activations in place of themselves change
    no logit.

    Returns:
        the state at the hook; or None and the error that kept the check from running.

    Raises:
        UserError: the hook is not what its name says.
    """
    if isinstance(tiny, Exception):
        return None, tiny
    tokens_BT = torch.arange(1, 13).reshape(2, 6)
    name = type(tiny).__name__
    try:
        hooked = LanguageModel(tiny, hook_name)
        logits, state = hooked.logits(tokens_BT)
        if not logits.isfinite().all():
            return None, ValueError("its logits are not finite")
        earlier_change = _earlier_change(hooked, tokens_BT, logits)
    except UserError:
        raise
    except Exception as error:
        return None, error
    try:
        again = hooked.logits_from_hook(tokens_BT, state, state.acts_BTD)
        without = hooked.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD))
        failed_sum = _failed_sum(hooked, tokens_BT)
        zeros_are_shared = hooked.hook.attention is None or hooked.ablation_is_shared
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: {name} does not run with other activations there ({one_line(error)}); use another hook"
        ) from error
    if failed_sum is not None:
        raise UserError(
            f"{where}: in {name} {failed_sum} is not true; name the Transformers module that you mean instead"
        )
    limit = 1e-3 * logits.std()
    if earlier_change > limit:
        is_switched_off = getattr(tiny.config, "is_decoder", None) is False
        raise UserError(
            f"--model_name: in {name} each position sees the tokens after it too, so that it does not predict the next"
            f" token; {'set is_decoder to true in its config.json' if is_switched_off else 'use another model'}"
        )
    if (again - logits).abs().max() > limit or not zeros_are_shared:
        raise UserError(
            f"{where}: in {name} its own activations put there again give other logits, as the module runs more than"
            " once or is not all that the later layers read; use another hook"
        )
    if torch.equal(without, again):
        raise UserError(f"{where}: no logit of {name} depends on it; use another hook")
    return state, None


def _earlier_change(hooked: LanguageModel, tokens_BT: torch.Tensor, logits_BTV: torch.Tensor) -> torch.Tensor:
    """Returns how much the logits before the last token change, at most, if the last token is another one."""
    changed_BT = tokens_BT.clone()
    changed_BT[:, -1] += 1
    return (hooked.logits(changed_BT)[0] - logits_BTV)[:, :-1].abs().max()


def _failed_sum(hooked: LanguageModel, tokens_BT: torch.Tensor) -> str | None:
    """Returns the first sum of a block's parts that a hook belongs to and that does not hold, or None."""
    block, _, name = hooked.hook.name.partition(".hook_")
    if name not in ("attn_out", "resid_mid", "mlp_out"):
        return None
    parts = {}
    for part in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
        with suppress(UserError):
            parts[part] = LanguageModel(hooked.model, f"{block}.hook_{part}").activations(tokens_BT)
    sums = [["resid_pre", "attn_out", "resid_mid"], ["resid_mid", "mlp_out", "resid_post"]]
    if "resid_mid" not in parts:
        sums = [["resid_pre", "attn_out", "mlp_out", "resid_post"]]
    for *terms, total in sums:
        if name in (*terms, total) and parts.keys() >= {*terms, total}:
            difference = parts[total] - sum(parts[term] for term in terms)
            if difference.abs().max() > 1e-3 * min(parts[term].abs().max() for term in terms[1:]):
                return f"{' + '.join(terms)} = {total}"
    return None


def parameters_up_to_hook(config: PreTrainedConfig, hook_names: Sequence[str], trust_remote_code: bool = False) -> int:
    """Returns how many parameters `LanguageModel.keep_only_up_to_hook` leaves. No weights are loaded."""
    model = LanguageModel(model_without_weights(config, trust_remote_code), *hook_names)
    model.keep_only_up_to_hook()
    return sum(parameter.numel() for parameter in model.model.parameters())
