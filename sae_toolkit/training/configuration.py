"""Builds SAELens's configuration of a run from the settings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.optim import get_lr_scheduler

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.hooks import is_transformer_lens_name
from sae_toolkit.settings.checks import OF_RANDOM_WEIGHTS
from sae_toolkit.settings.training import OptimizationSettings, SAESettings, TrainingSettings
from sae_toolkit.steps.target_l0 import JUMPRELU
from sae_toolkit.training.phases import number_of_steps
from sae_toolkit.training.set_flag import LARGEST, assign

log = logging.getLogger(__name__)

_LEAST_READINGS = 10  # how often metrics are recorded in a short run
_TOPK_FAMILY = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk"}


def build_runner_configs(
    settings: TrainingSettings, widths: Mapping[str, int], *, device: str, run_id: str
) -> list[LanguageModelSAERunnerConfig[TrainingSAEConfig]]:
    """Builds SAELens's configuration of each SAE of a run: one at each hook, or several seeds at one hook.

    Args:
        settings: settings of the run.
        widths: the width of the activations at each hook, by its name.
        device, run_id: as for `build_runner_config`.

    Raises:
        UserError: as `build_runner_config`.
    """
    first = settings.optimization.seed
    of_seeds = [
        replace(settings, optimization=replace(settings.optimization, seed=seed))
        for seed in range(first, first + settings.optimization.seeds)
    ]
    return [
        build_runner_config(each, name, d_in=d_in, device=device, run_id=run_id)
        for name, d_in in widths.items()
        for each in of_seeds
    ]


def build_runner_config(
    settings: TrainingSettings, hook_name: str, *, d_in: int, device: str, run_id: str
) -> LanguageModelSAERunnerConfig[TrainingSAEConfig]:
    """Builds SAELens's configuration from the settings.

    Args:
        settings: settings of the run.
        hook_name: hook that the SAE is trained at.
        d_in: width of the activations at the hook.
        device: device of the SAE; not `auto`.
        run_id: name of the run's own directory.

    Raises:
        UserError: the settings do not fit together, or `--set` names a field that cannot be set.
    """
    sae_settings, optimization = settings.sae, settings.optimization
    assignments = optimization.set
    sae_class, sae_config_class = get_sae_training_class(sae_settings.architecture)
    fields, logger = _runner_fields(settings, hook_name, device), _logger_fields(settings, run_id)
    sae = _sae_fields(sae_settings, hook_name, d_in, device)
    owners = {
        "": (fields, LanguageModelSAERunnerConfig),
        "logger": (logger, LoggingConfig),
        "sae": (sae, sae_config_class),
    }
    for assignment in assignments:
        assign(assignment, owners)
        if sae_settings.init_from is not None and (key := assignment.partition("=")[0]) in OF_RANDOM_WEIGHTS:
            raise UserError(f"--set {key}: for random weights, and --init_from gives others; leave one of them out")
    try:
        cfg = LanguageModelSAERunnerConfig(sae=sae_config_class(**sae), logger=LoggingConfig(**logger), **fields)
        _check(cfg)
        if optimization.finetune_loss != "none":
            _check_finetuning(cfg, optimization)
        if (target := sae_settings.target_l0) is not None and (
            getattr(cfg.sae, "jumprelu_sparsity_loss_mode", None) == "quadratic"
        ):
            raise UserError(
                f"--target_l0 {target:g}: the quadratic loss has its own target; use --set sae.target_l0=..."
            )
        with torch.device("meta"):  # SAELens checks the SAE's settings when it is made; on meta that takes no memory
            sae_class(dataclasses.replace(cfg.sae, device="meta"))
    except ValueError as error:
        given = " ".join(
            (f"--architecture {sae_settings.architecture}", *(f"--set {assignment}" for assignment in assignments))
        )
        raise UserError(f"{given}: SAELens refuses this configuration: {one_line(error)}") from None
    return cfg


def _runner_fields(settings: TrainingSettings, hook_name: str, device: str) -> dict[str, Any]:
    model, text, optimization = settings.model, settings.text, settings.optimization
    return {
        "model_name": model.model_name,
        "model_class_name": _model_class_name(hook_name),
        "hook_name": hook_name,
        "dataset_path": text.dataset_path,
        "streaming": text.streaming,
        "is_dataset_tokenized": False,
        "context_size": text.context_size,
        "n_batches_in_buffer": optimization.n_batches_in_buffer,
        "training_tokens": optimization.training_tokens,
        "store_batch_size_prompts": model.store_batch_size_prompts,
        "seqpos_slice": (text.skip_positions or None, None),
        "device": device,
        "seed": optimization.seed,
        "dtype": settings.sae.dtype,
        "train_batch_size_tokens": optimization.train_batch_size_tokens,
        "lr": optimization.lr,
        "lr_warm_up_steps": optimization.lr_warm_up_steps,
        "lr_decay_steps": optimization.lr_decay_steps,
        "dead_feature_window": optimization.dead_feature_window,
        "n_checkpoints": settings.run.n_checkpoints,
        "checkpoint_path": str(settings.output_directory),
        "save_final_checkpoint": True,
        "output_path": None,
        "verbose": False,
        "exclude_special_tokens": text.exclude_special_tokens,
        "n_batches_for_norm_estimate": min(20, _n_measurable_batches(optimization)),
        "model_from_pretrained_kwargs": {},
        "from_pretrained_path": settings.sae.init_from,
    }


def _model_class_name(hook_name: str) -> str:
    """Returns the class by which SAELens, SAEDashboard and Neuronpedia load a model that has this hook.

    Modules of Transformers are hooked by SAELens's `HookedProxyLM`.
    """
    return "HookedTransformer" if is_transformer_lens_name(hook_name) else "AutoModelForCausalLM"


def _logger_fields(settings: TrainingSettings, run_id: str) -> dict[str, Any]:
    recording = settings.recording
    return {
        "log_to_wandb": recording.wandb_mode != "disabled",
        "log_weights_to_wandb": False,
        "wandb_project": recording.wandb_project,
        "wandb_entity": recording.wandb_entity,
        "run_name": recording.run_name or f"{settings.run.output_name}-{run_id}",
        "wandb_id": run_id,
        "wandb_log_frequency": max(1, min(10, _n_whole_batches(settings.optimization) // _LEAST_READINGS)),
    }


def _n_measurable_batches(optimization: OptimizationSettings) -> int:
    """Returns how many batches the norms can be measured on: those before the fine-tuning, if there are any."""
    n_steps, n_before = number_of_steps(optimization)
    return _n_whole_batches(optimization) if n_before in (0, n_steps) else n_before


def _n_whole_batches(optimization: OptimizationSettings) -> int:
    return optimization.training_tokens // optimization.train_batch_size_tokens


def _sae_fields(settings: SAESettings, hook_name: str, d_in: int, device: str) -> dict[str, Any]:
    d_sae = settings.n_features(d_in)
    if d_sae * d_in > LARGEST:
        raise UserError(f"{' '.join(settings.width_words)}: {d_sae:,} features do not fit into memory; lower it")
    if settings.target_l0 is not None and settings.target_l0 > d_sae:
        raise UserError(f"--target_l0 {settings.target_l0:g}: more than the {d_sae:,} features; lower it")
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": settings.dtype,
        "device": device,
        "normalize_activations": _normalization(settings.normalize_activations),
        **_sparsity_fields(settings, d_in, d_sae),
        **({"reshape_activations": "hook_z"} if hook_name.endswith("hook_z") else {}),
    }


def _normalization(mode: str) -> str:
    """Returns SAELens's name of a mode of --normalize_activations."""
    if mode != "expected_average_in_and_out":
        return mode
    log.info(
        "--normalize_activations expected_average_in_and_out is called expected_average_only_in in SAELens: the scale"
        " is folded into the saved weights, so that the saved SAE takes and returns activations that are not scaled"
    )
    return "expected_average_only_in"


def _sparsity_fields(settings: SAESettings, d_in: int, d_sae: int) -> dict[str, Any]:
    """Returns the fields that make the SAE sparse. Raises a UserError for flags of other architectures."""
    architecture, fields = settings.architecture, dict[str, Any]()
    if architecture in ("standard", "gated"):
        fields["l1_coefficient"] = settings.l1_coefficient
    elif architecture == "jumprelu":
        fields["l0_coefficient"] = settings.l0_coefficient
        if settings.target_l0 is not None:
            fields |= JUMPRELU
    elif architecture in _TOPK_FAMILY:
        if settings.k > d_sae:
            raise UserError(
                f"--k {settings.k}: more than the {d_sae} features ({' '.join(settings.width_words)}, for activations"
                f" of width {d_in}); lower it"
            )
        if settings.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            raise UserError(
                f"--normalize_activations {settings.normalize_activations}: SAELens's auxiliary loss of"
                f" {architecture} does not support it; use expected_average_only_in"
            )
        fields["k"] = settings.k
    if architecture == "matryoshka_batchtopk":
        widths = list(settings.matryoshka_widths or (d_sae // 16, d_sae // 4, d_sae))
        if sorted(set(widths)) != widths or widths[-1] > d_sae:
            raise UserError(f"--matryoshka_widths {widths}: must ascend, to at most the {d_sae} features")
        fields["matryoshka_widths"] = widths
    elif settings.matryoshka_widths:
        raise UserError(
            f"--matryoshka_widths: only for --architecture matryoshka_batchtopk, not {architecture}; leave it out"
        )
    return fields


def _check(cfg: LanguageModelSAERunnerConfig[TrainingSAEConfig]) -> None:
    """Raises a UserError for mistakes that SAELens would find only after it has loaded the model."""
    if getattr(cfg.sae, "use_sparse_activations", False) and cfg.device == "cpu":
        raise UserError("--set sae.use_sparse_activations=true: it has no backward pass on a CPU; leave it out")
    if cfg.n_batches_for_norm_estimate > cfg.total_training_steps:
        raise UserError(
            f"--set n_batches_for_norm_estimate={cfg.n_batches_for_norm_estimate}: more than the run's"
            f" {cfg.total_training_steps} steps; lower it"
        )
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
        raise UserError(
            f"--set lr_scheduler_name={cfg.lr_scheduler_name}: too few steps for it; train longer"
        ) from None


def _check_finetuning(cfg: LanguageModelSAERunnerConfig[TrainingSAEConfig], optimization: OptimizationSettings) -> None:
    """Raises a UserError if the run cannot fine-tune with --finetune_loss."""
    flag = f"--finetune_loss {optimization.finetune_loss}"
    for name in ("compile_sae", "compile_llm"):
        if getattr(cfg, name):
            raise UserError(f"{flag}, --set {name}=true: fine-tuning is not compiled; leave one of them out")
    if cfg.n_batches_for_norm_estimate > (n := _n_measurable_batches(optimization)):
        raise UserError(
            f"--set n_batches_for_norm_estimate={cfg.n_batches_for_norm_estimate}: more than the {n} steps before the"
            " fine-tuning; lower it or --finetune_fraction"
        )
