"""Flags to SAELens's own configuration of a run, so that nothing SAELens can do is out of reach."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.optim import get_lr_scheduler

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.settings.training import LATER_FLAGS
from sae_toolkit.steps.target_l0 import JUMPRELU

log = logging.getLogger(__name__)

# Fields of SAELens's configuration that a flag owns; `--set` refuses them and names the flag.
_OWNED = {
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
    "output_path": "--checkpoint_path and --output_name",
    "autocast_lm": "--lm_dtype",
    "logger.log_to_wandb": "--wandb_mode",
    "logger.wandb_project": "--wandb_project",
    "logger.wandb_entity": "--wandb_entity",
    "logger.run_name": "--run_name",
    "sae.architecture": "--architecture",
    "sae.d_in": "--model_name and --hook_name",
    "sae.d_sae": "--expansion_factor",
    "sae.k": "--k",
    "sae.l1_coefficient": "--l1_coefficient",
    "sae.l0_coefficient": "--l0_coefficient",
    "sae.matryoshka_widths": "--matryoshka_widths",
    "sae.normalize_activations": "--normalize_activations",
    "sae.dtype": "--dtype",
    "sae.device": "--device",
}
# Fields that `--set` passes on; with all of `sae.` that is not owned. The others are SAELens's own ways of
# doing what this project does differently (its activation store, its model loader, its evaluator).
_HONOURED = set(
    "adam_beta1 adam_beta2 lr_scheduler_name lr_end n_restart_cycles feature_sampling_window"
    " n_batches_for_norm_estimate autocast compile_sae sae_compilation_mode activations_mixing_fraction prepend_bos"
    " sequence_separator_token disable_concat_sequences from_pretrained_path model_from_pretrained_kwargs"
    " logger.wandb_log_frequency logger.log_weights_to_wandb".split()
)
_NOT_HONOURED_IN_SAE = {"metadata", "reshape_activations"}
_LARGEST = 1e15  # far above any sensible value, far below what overflows in float32

# What SAELens takes without a word, to fail or to write NaN weights once the run is under way.
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
    "sae_compilation_mode": (
        "default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
        lambda v: v in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    ),
}

_READINGS = 10  # at least, of a short run
_TOPK_FAMILY = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk"}

# Flags that do not change what is trained: two runs that differ in these alone share a directory.
_NOT_IN_HASH = set(
    "device llm_device n_devices shard_features n_checkpoints checkpoint_path output_name resume dry_run strict"
    " wandb_mode wandb_project wandb_entity run_name cache_activations checkpoint_every keep trust_remote_code"
    " eval_every logger verbose quiet preset like".split()
)


def configuration_hash(flags: argparse.Namespace) -> str:
    """Eight hex digits that are the same for runs of the same model, data, SAE and settings."""
    relevant = {name: value for name, value in vars(flags).items() if name not in _NOT_IN_HASH}
    for name in LATER_FLAGS:
        if relevant[name] is None:
            del relevant[name]
    if flags.cache_activations is not None:  # wherever it lies, it rounds to bfloat16
        relevant["cache_activations"] = True
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]


def output_directory(flags: argparse.Namespace) -> Path:
    """Where the runs with these flags are kept: checkpoints/{output_name}_{8 hex}."""
    return Path(flags.checkpoint_path) / f"{flags.output_name}_{configuration_hash(flags)}"


def hook_names(flags: argparse.Namespace) -> list[str]:
    """The hooks that an SAE each is trained at."""
    if flags.hook_names or flags.hook_name:
        return flags.hook_names or [flags.hook_name]
    return [f"blocks.{layer}.hook_resid_post" for layer in flags.layers or [flags.layer]]


def hook_flag(flags: argparse.Namespace) -> str:
    """The flag that says where SAEs are trained."""
    return next((f"--{name}" for name in ("hook_names", "hook_name", "layers") if getattr(flags, name)), "--layer")


def build_runner_config(
    flags: argparse.Namespace, hook_name: str, *, d_in: int, device: str, run_id: str
) -> LanguageModelSAERunnerConfig[TrainingSAEConfig]:
    """Builds SAELens's configuration from the flags.

    Args:
        flags: from `parse_training_flags`.
        hook_name: of the SAE.
        d_in: width of the activations at the hook.
        device: the device of the SAE, resolved.
        run_id: name of the run's own directory.

    Raises:
        UserError: a value cannot be right beside the others, or `--set` names a field that is not settable.
    """
    sae_class, sae_config_class = get_sae_training_class(flags.architecture)
    fields: dict[str, Any] = {
        "model_name": flags.model_name,
        "hook_name": hook_name,
        "dataset_path": flags.dataset_path,
        "streaming": flags.streaming,
        "is_dataset_tokenized": False,
        "context_size": flags.context_size,
        "n_batches_in_buffer": flags.n_batches_in_buffer,
        "training_tokens": flags.training_tokens,
        "store_batch_size_prompts": flags.store_batch_size_prompts,
        "seqpos_slice": (flags.skip_positions or None, None),
        "device": device,
        "seed": flags.seed,
        "dtype": flags.dtype,
        "train_batch_size_tokens": flags.train_batch_size_tokens,
        "lr": flags.lr,
        "lr_warm_up_steps": flags.lr_warm_up_steps,
        "lr_decay_steps": flags.lr_decay_steps,
        "dead_feature_window": flags.dead_feature_window,
        "n_checkpoints": flags.n_checkpoints,
        "checkpoint_path": str(output_directory(flags)),
        "save_final_checkpoint": True,
        "output_path": None,
        "verbose": False,
        "exclude_special_tokens": flags.exclude_special_tokens,
        "n_batches_for_norm_estimate": min(20, flags.training_tokens // flags.train_batch_size_tokens),
        "model_from_pretrained_kwargs": {},
    }
    logger: dict[str, Any] = {
        "log_to_wandb": flags.wandb_mode != "disabled",
        "log_weights_to_wandb": False,
        "wandb_project": flags.wandb_project,
        "wandb_entity": flags.wandb_entity,
        "run_name": flags.run_name or f"{flags.output_name}-{run_id}",
        "wandb_id": run_id,
        "wandb_log_frequency": max(1, min(10, flags.training_tokens // flags.train_batch_size_tokens // _READINGS)),
    }
    sae = _sae_fields(flags, hook_name, d_in, device)
    owners = {
        "": (fields, LanguageModelSAERunnerConfig),
        "logger": (logger, LoggingConfig),
        "sae": (sae, sae_config_class),
    }
    for assignment in flags.set:
        _assign(assignment, owners)
    try:
        cfg = LanguageModelSAERunnerConfig(sae=sae_config_class(**sae), logger=LoggingConfig(**logger), **fields)
        _check(cfg)
        if flags.target_l0 is not None and getattr(cfg.sae, "jumprelu_sparsity_loss_mode", None) == "quadratic":
            raise UserError(
                f"--target_l0 {flags.target_l0:g}: the quadratic loss has a target of its own, --set sae.target_l0"
            )
        with torch.device("meta"):  # the SAE checks its own settings; on meta it costs no memory
            sae_class(dataclasses.replace(cfg.sae, device="meta"))
    except ValueError as error:
        given = " ".join((f"--architecture {flags.architecture}", *(f"--set {assignment}" for assignment in flags.set)))
        raise UserError(f"{given}: SAELens refuses this configuration: {one_line(error)}") from None
    return cfg


def _sae_fields(flags: argparse.Namespace, hook_name: str, d_in: int, device: str) -> dict[str, Any]:
    d_sae = flags.expansion_factor * d_in
    if d_sae * d_in > _LARGEST:
        raise UserError(f"--expansion_factor {flags.expansion_factor}: {d_sae:,} features fit in no memory; lower it")
    if flags.target_l0 is not None and flags.target_l0 > d_sae:
        raise UserError(f"--target_l0 {flags.target_l0:g}: more than the {d_sae:,} features")
    fields: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "dtype": flags.dtype, "device": device}

    fields["normalize_activations"] = flags.normalize_activations
    if flags.normalize_activations == "expected_average_in_and_out":
        log.info(
            "--normalize_activations expected_average_in_and_out is expected_average_only_in in SAELens: the scale is"
            " folded into the saved weights, so that the saved SAE takes raw activations in and gives raw ones out"
        )
        fields["normalize_activations"] = "expected_average_only_in"

    if flags.architecture in ("standard", "gated"):
        fields["l1_coefficient"] = flags.l1_coefficient
    elif flags.architecture == "jumprelu":
        fields["l0_coefficient"] = flags.l0_coefficient
        if flags.target_l0 is not None:
            fields |= JUMPRELU
    elif flags.architecture in _TOPK_FAMILY:
        if flags.k > d_sae:
            raise UserError(
                f"--k {flags.k}: more than the {d_sae} features (--expansion_factor {flags.expansion_factor} x {d_in})"
            )
        if fields["normalize_activations"] in ("layer_norm", "constant_norm_rescale"):
            raise UserError(
                f"--normalize_activations {flags.normalize_activations}: SAELens's auxiliary loss of"
                f" {flags.architecture} does not support it; use expected_average_only_in"
            )
        fields["k"] = flags.k
    if flags.architecture == "matryoshka_batchtopk":
        widths = flags.matryoshka_widths or [d_sae // 16, d_sae // 4, d_sae]
        if sorted(set(widths)) != widths or widths[-1] > d_sae:
            raise UserError(f"--matryoshka_widths {widths}: must ascend, to at most the {d_sae} features")
        fields["matryoshka_widths"] = widths
    elif flags.matryoshka_widths:
        raise UserError(f"--matryoshka_widths: only for --architecture matryoshka_batchtopk, not {flags.architecture}")
    if hook_name.endswith("hook_z"):
        fields["reshape_activations"] = "hook_z"
    return fields


def _assign(assignment: str, owners: dict[str, tuple[dict[str, Any], type]]) -> None:
    """Carries out one `--set KEY=VALUE`."""
    key, equals, text = assignment.partition("=")
    prefix, _, name = key.rpartition(".")
    if not equals or prefix not in owners:
        raise UserError(f"--set {assignment}: must be KEY=VALUE, such as sae.aux_loss_coefficient=0.5")
    values, config_class = owners[prefix]
    known = {field.name for field in dataclasses.fields(config_class)}
    if key in _OWNED:
        raise UserError(f"--set {key}: use {_OWNED[key]}")
    if name not in known:
        raise UserError(f"--set {key}: {config_class.__name__} has no such field")
    settable = name not in _NOT_HONOURED_IN_SAE if prefix == "sae" else key in _HONOURED
    if not settable:
        raise UserError(f"--set {key}: a field of SAELens that this project does not honour")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    hint = typing.get_type_hints(config_class)[name]
    try:
        value = pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"--set {assignment}: {error.errors()[0]['msg']}") from None
    if isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise UserError(f"--set {assignment}: must be a number of at most {_LARGEST:g}")
    wanted, holds = _MUST_BE.get(name, ("", lambda _: True))
    if value is not None and not holds(value):
        raise UserError(f"--set {assignment}: must be {wanted}")
    values[name] = value


def _check(cfg: LanguageModelSAERunnerConfig[TrainingSAEConfig]) -> None:
    """Raises what SAELens would raise only once the model is loaded and the run has begun."""
    if getattr(cfg.sae, "use_sparse_activations", False) and cfg.device == "cpu":
        raise UserError(
            "--set sae.use_sparse_activations=true: its backward pass does not exist on a CPU; leave it out"
        )
    if cfg.n_batches_for_norm_estimate > cfg.total_training_steps:
        raise UserError(
            f"--set n_batches_for_norm_estimate={cfg.n_batches_for_norm_estimate}: more than the run's"
            f" {cfg.total_training_steps} steps"
        )
    if cfg.from_pretrained_path is not None and not Path(cfg.from_pretrained_path, "cfg.json").is_file():
        raise UserError(f"--set from_pretrained_path={cfg.from_pretrained_path}: holds no SAE (no cfg.json)")
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=cfg.lr, betas=betas)
    assert cfg.lr_end is not None  # SAELens sets it
    try:
        get_lr_scheduler(
            cfg.lr_scheduler_name,
            optimizer,
            training_steps=cfg.total_training_steps,
            lr=cfg.lr,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )
    except ZeroDivisionError:
        raise UserError(f"--set lr_scheduler_name={cfg.lr_scheduler_name}: too few steps for it") from None
