"""The flag `--set`: which fields of SAELens's configuration it can set, and to what."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from typing import Any

import pydantic

from sae_toolkit.errors import UserError

# Fields of SAELens's configuration that a flag sets. `--set` refuses them and names the flag.
OWNED = {
    **{
        field: f"--{field}"
        for field in (
            "model_name hook_name dataset_path streaming context_size n_batches_in_buffer training_tokens"
            " store_batch_size_prompts device seed dtype train_batch_size_tokens lr lr_warm_up_steps lr_decay_steps"
            " dead_feature_window n_checkpoints checkpoint_path exclude_special_tokens"
        ).split()
    },
    "seqpos_slice": "--skip_positions",
    "resume_from_checkpoint": "--resume",
    "from_pretrained_path": "--init_from",
    "use_chat_formatting": "--text_column with a column of conversations",
    "output_path": "--checkpoint_path and --output_name",
    "autocast_lm": "--lm_dtype",
    "logger.log_to_wandb": "--wandb_mode",
    "logger.wandb_project": "--wandb_project",
    "logger.wandb_entity": "--wandb_entity",
    "logger.run_name": "--run_name",
    "sae.architecture": "--architecture",
    "sae.d_in": "--model_name and --hook_name",
    "sae.d_sae": "--d_sae",
    "sae.k": "--k",
    "sae.l1_coefficient": "--l1_coefficient",
    "sae.l0_coefficient": "--l0_coefficient",
    "sae.matryoshka_widths": "--matryoshka_widths",
    "sae.normalize_activations": "--normalize_activations",
    "sae.dtype": "--dtype",
    "sae.device": "--device",
}
# Fields that `--set` can set. It can also set the fields of `sae.` that have no flag. The remaining fields belong to
# parts of SAELens that this project replaces: the activation store, the model loader, the evaluator.
HONOURED = set(
    "adam_beta1 adam_beta2 lr_scheduler_name lr_end n_restart_cycles feature_sampling_window"
    " n_batches_for_norm_estimate autocast compile_sae sae_compilation_mode compile_llm llm_compilation_mode"
    " activations_mixing_fraction prepend_bos"
    " sequence_separator_token disable_concat_sequences model_from_pretrained_kwargs"
    " logger.wandb_log_frequency logger.log_weights_to_wandb".split()
)
NOT_HONOURED_IN_SAE = {"metadata", "reshape_activations"}
LARGEST = 1e15  # far above any sensible value, far below what overflows in float32

# Bounds of values that SAELens does not check: outside of them the run would fail later, or write NaN weights.
_MUST_BE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("0 or more and below 1", lambda v: 0 <= v < 1)),
    **dict.fromkeys(
        "feature_sampling_window n_batches_for_norm_estimate n_restart_cycles max_iterations"
        " wandb_log_frequency".split(),
        ("1 or more", lambda v: v >= 1),
    ),
    **dict.fromkeys(
        "lp_norm decoder_init_norm jumprelu_bandwidth jumprelu_init_threshold jumprelu_tanh_scale".split(),
        ("above 0", lambda v: v > 0),
    ),
    **dict.fromkeys(
        "l1_warm_up_steps l0_warm_up_steps aux_loss_coefficient pre_act_loss_coefficient lr_end"
        " residual_threshold".split(),
        ("0 or more", lambda v: v >= 0),
    ),
    "topk_threshold_lr": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "activations_mixing_fraction": ("in [0, 1]", lambda v: 0 <= v <= 1),
    **dict.fromkeys(
        ("sae_compilation_mode", "llm_compilation_mode"),
        (
            "default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
            lambda v: v in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        ),
    ),
}


def assign(assignment: str, owners: dict[str, tuple[dict[str, Any], type]]) -> None:
    """Applies one `--set KEY=VALUE`.

    Args:
        assignment: KEY=VALUE.
        owners: maps the part of KEY before the dot to the values that are set so far, and to the class of which they
            are fields.

    Raises:
        UserError: the field does not exist or is not for `--set`, or the value does not fit it.
    """
    key, equals, text = assignment.partition("=")
    prefix, _, name = key.rpartition(".")
    if not equals or prefix not in owners:
        raise UserError(f"--set {assignment}: must be KEY=VALUE, such as sae.aux_loss_coefficient=0.5")
    values, config_class = owners[prefix]
    known = {field.name for field in dataclasses.fields(config_class)}
    if key in OWNED:
        raise UserError(f"--set {key}: use {OWNED[key]}")
    if name not in known:
        raise UserError(f"--set {key}: {config_class.__name__} has no such field; leave it out")
    settable = name not in NOT_HONOURED_IN_SAE if prefix == "sae" else key in HONOURED
    if not settable:
        raise UserError(f"--set {key}: a field of SAELens that this project does not use; leave it out")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    hint = typing.get_type_hints(config_class)[name]
    try:
        value = pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"--set {assignment}: {error.errors()[0]['msg']}") from None
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise UserError(f"--set {assignment}: must be a number of at most {LARGEST:g}")
    wanted, holds = _MUST_BE.get(name, ("", lambda _: True))
    if value is not None and not holds(value):
        raise UserError(f"--set {assignment}: must be {wanted}")
    values[name] = value
