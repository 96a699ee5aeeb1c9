"""Drives SAELens's trainer over a stream of activations, to a finished checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig, TrainStepOutput
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError
from tqdm.auto import tqdm

from sae_toolkit.activation_cache import ActivationCache, CachedActivations
from sae_toolkit.activations import ActivationStream
from sae_toolkit.checkpoints import load_training_checkpoint
from sae_toolkit.errors import RunFailed, UserError, one_line
from sae_toolkit.language_model import LanguageModel
from sae_toolkit.models import load_language_model
from sae_toolkit.multi_trainer import MultiTrainer
from sae_toolkit.prepared_run import PreparedRun
from sae_toolkit.run_checkpoints import RunCheckpoints
from sae_toolkit.sharded_sae import shard_sae
from sae_toolkit.sparse_topk import sparse_class
from sae_toolkit.stop_signals import Stopped, StopSignals
from sae_toolkit.target_l0 import FASTER_THRESHOLDS, NEAR_TARGET
from sae_toolkit.trust import tensors_only
from sae_toolkit.wandb_run import WandbRun

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_READINGS = 1.0
_SECONDS_BETWEEN_LOG_LINES = 30.0  # in run.log, where there is no progress bar
_NOT_FINITE_AT_MOST = 10  # steps in a row


def open_activations(run: PreparedRun) -> LanguageModel | CachedActivations:
    """Where activations come from: the language model up to its hook, or the cache before it.

    Raises:
        UserError: the model cannot be loaded, or the cache is not for this run.
    """

    def load() -> LanguageModel:
        model = load_language_model(run.model, run.hook_names, run.llm_device, run.lm_dtype, run.flags.n_devices)
        model.keep_only_up_to_hook()
        return model

    if run.flags.cache_activations is None:
        with run.ranks.one_first():
            return load()
    directory = Path(run.flags.cache_activations)
    cache = ActivationCache(directory, run.cache_parameters(), run.rows_NT, sum(run.widths))
    return CachedActivations(cache, load, run.cfg.device)


class Training:
    """A run at its first step: SAEs, trainer and activation stream are made, norms measured, or a checkpoint loaded.

    Args:
        run: what to train on what.
        activations: from `open_activations`.

    Raises:
        UserError: the activations leave nothing to train on, or a checkpoint does not fit.
    """

    def __init__(self, run: PreparedRun, activations: LanguageModel | CachedActivations) -> None:
        self.run = run
        self.cfg = cfg = run.cfg
        self.ranks = run.ranks
        self.saes = {each.hook_name: self._create_sae(each) for each in run.cfgs}
        n_steps = -(-cfg.training_tokens // cfg.train_batch_size_tokens)
        self.stream = ActivationStream(
            activations,
            run.rows_NT,
            run.positions,
            batch_size=cfg.train_batch_size_tokens,
            buffer_size=cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)]),
            mix_fraction=cfg.activations_mixing_fraction,
            rows_per_forward=cfg.store_batch_size_prompts,
            total=n_steps * cfg.train_batch_size_tokens,
            seed=cfg.seed,
            dtype=str_to_dtype(cfg.dtype),
            ranks=run.ranks,
            widths=run.widths,
            device=cfg.device,
        )
        trainer_cfg = cfg.to_sae_trainer_config()
        trainer_cfg.logger = LoggingConfig(log_to_wandb=False)  # `fit` below records; SAELens's own is not used
        self.trainer = MultiTrainer(trainer_cfg, self.saes, run.ranks, run.flags.target_l0)
        self.checkpoints = RunCheckpoints(run, self.trainer, self.stream)
        if run.resume_from is not None:
            with tensors_only(f"--resume {run.resume_from}"):
                load_training_checkpoint(run.resume_from, self.trainer, self.stream)
            log.info("resuming after %s tokens", f"{self.trainer.n_training_samples:,}")
        else:
            _calibrate(cfg, self.trainer, self.stream, run.flags.max_activation_norm_multiple or None)
        max_norms: Sequence[float | None] = self.stream.max_activation_norms or [None] * len(run.cfgs)
        for each, max_norm in zip(run.cfgs, max_norms, strict=True):
            _record_training(self.saes[each.hook_name], each, run.metadata() | {"max_activation_norm": max_norm})
        if cfg.compile_sae:
            for sae in self.saes.values():
                sae.training_forward_pass = torch.compile(sae.training_forward_pass, mode=cfg.sae_compilation_mode)

    def _create_sae(self, cfg: LanguageModelSAERunnerConfig[Any]) -> TrainingSAE[Any]:
        """The SAE that this rank trains: all of it, or its shard of one that rank 0 makes in its host's memory."""
        if not self.run.is_sharded:
            return create_sae(cfg)
        on_cpu = copy(cfg)
        on_cpu.device, on_cpu.sae = "cpu", replace(cfg.sae, device="cpu")
        return shard_sae(create_sae(on_cpu) if self.ranks.is_main else None, cfg.device, self.ranks)

    def fit(self, wandb_run: WandbRun, signals: StopSignals) -> Path:
        """Trains the SAE to the end and saves it.

        Returns:
            Directory of the finished SAE; of several, the directory that holds one for each hook.

        Raises:
            Stopped: a signal came; a checkpoint is saved, if there was room for it.
            RunFailed: the losses are not finite any more, or the finished SAE cannot be written.
        """
        with signals.deferred():
            _fit(self, wandb_run, signals)
            self._describe_what_was_left_out()
            self._describe_l0()
            final = self.checkpoints.save_final()
        if self.cfg.logger.log_weights_to_wandb:
            wandb_run.save_sae(final)
        return final

    def _describe_what_was_left_out(self) -> None:
        stream = self.stream
        if stream.max_activation_norms is not None:
            log.info(
                "left out %s of %s activations as massive (norm above %s)",
                f"{stream.n_massive:,}",
                f"{stream.n_massive + stream.n_kept:,}",
                " or ".join(f"{norm:.4g}" for norm in stream.max_activation_norms),
            )
        if n := self.trainer.n_not_finite:
            log.warning("%d steps had a loss or gradient that was not finite and were not applied", n)
        if isinstance(stream.source, CachedActivations):
            log.info(stream.source.describe())

    def _describe_l0(self) -> None:
        for name, trainer in self.trainer.trainers.items():
            if (control := trainer.l0_control) is None:
                continue
            ((weight, value),) = trainer.found_weight.items()
            log.log(
                logging.INFO if control.is_near else logging.WARNING,
                "--target_l0 %g: %sthe running L0 ended at %.1f, and --%s at %.3g%s",
                control.target,
                "" if self.trainer.is_single else f"{name}: ",
                control.l0,
                weight,
                value,
                ""
                if control.is_near
                else f"; not within {NEAR_TARGET:.0%}: train longer"
                + (FASTER_THRESHOLDS if weight == "l0_coefficient" else ""),
            )


def _record_training(sae: TrainingSAE[Any], cfg: LanguageModelSAERunnerConfig[Any], more: dict[str, Any]) -> None:
    """Fills the metadata that goes into cfg.json: what SAELens's own runner records, and more."""
    for name in (
        "dataset_path hook_name model_name model_class_name hook_head_index context_size seqpos_slice"
        " model_from_pretrained_kwargs prepend_bos exclude_special_tokens sequence_separator_token"
        " disable_concat_sequences"
    ).split():
        sae.cfg.metadata[name] = getattr(cfg, name)
    for name, value in more.items():
        sae.cfg.metadata[name] = value


def create_sae(cfg: LanguageModelSAERunnerConfig[Any]) -> TrainingSAE[Any]:
    """The SAE as a run starts with it: of weights that the seed fixes, or those of `from_pretrained_path`.

    Raises:
        UserError: the pretrained SAE is of another architecture, shape or normalization.
    """
    torch.manual_seed(cfg.seed)
    if cfg.from_pretrained_path is None:
        sae_class, _ = get_sae_training_class(cfg.sae.architecture())
        sae_cfg = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
        return sparse_class(sae_class, sae_cfg, compiled=cfg.compile_sae)(sae_cfg)
    try:
        found = TrainingSAE.load_from_disk(cfg.from_pretrained_path, device=cfg.device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--set from_pretrained_path={cfg.from_pretrained_path}: no SAE can be read there: {one_line(error)}"
        ) from None
    architecture = found.cfg.architecture()
    if architecture != cfg.sae.architecture():
        raise UserError(
            f"--set from_pretrained_path={cfg.from_pretrained_path}: its architecture is {architecture}; use it with"
            f" --architecture {architecture}"
        )
    for field in ("d_in", "d_sae", "normalize_activations"):
        if getattr(found.cfg, field) != getattr(cfg.sae, field):
            raise UserError(
                f"--set from_pretrained_path={cfg.from_pretrained_path}: its {field} is {getattr(found.cfg, field)},"
                f" the run's {getattr(cfg.sae, field)}"
            )
    sae = sparse_class(type(found), found.cfg, compiled=cfg.compile_sae)(found.cfg)
    sae.load_state_dict(found.state_dict())
    return sae


def _calibrate(
    cfg: LanguageModelSAERunnerConfig[Any],
    trainer: MultiTrainer,
    stream: ActivationStream,
    max_norm_multiple: float | None,
) -> None:
    """Freezes the norm limits and the normalization on the first batches of the stream, which are trained on too."""
    mode = cfg.sae.normalize_activations
    estimated = mode in ("expected_average_only_in", "covariance_whitening")
    if max_norm_multiple is None and not estimated:
        return
    log.info("measuring activation norms on %d batches", cfg.n_batches_for_norm_estimate)
    acts_ND = stream.calibrate(cfg.n_batches_for_norm_estimate, max_norm_multiple)
    for each, acts in zip(trainer.trainers.values(), stream.at_each_hook(acts_ND), strict=True):
        if mode == "expected_average_only_in":  # of which SAELens takes the norms alone
            batches = stream.ranks.gather(acts.norm(dim=-1, keepdim=True))
            each.activation_scaler.estimate_scaling_factor(each.sae.cfg.d_in, iter(batches), len(batches))
        elif mode == "covariance_whitening":
            gathered = stream.ranks.gather(acts.contiguous())
            batches = [piece for part in gathered for piece in part.split(cfg.train_batch_size_tokens)]
            each.activation_scaler.estimate_whitening(each.sae.cfg.d_in, iter(batches), len(batches))


def _fit(training: Training, wandb_run: WandbRun, signals: StopSignals) -> None:
    """SAELens's `fit`, with a progress bar that moves, checkpoints that resume, and signals that are heard."""
    cfg, trainer, stream, checkpoints = training.cfg, training.trainer, training.stream, training.checkpoints
    waits_for_no_device = torch.device(cfg.device).type == "cpu"
    progress = tqdm(
        total=stream.total,
        initial=trainer.n_training_samples,
        desc="Training SAE",
        unit="tok",
        unit_scale=True,
        smoothing=0.05,
        disable=not training.ranks.is_main,
    )
    last_reading = last_line = 0.0
    training.ranks.wait()  # for one that reads a checkpoint, or starts wandb; within a step there is less patience
    if training.ranks.is_main:
        training.run.run_directory.keep_metrics_up_to(trainer.n_training_steps)
    with progress:
        while trainer.n_training_samples < stream.total:
            if sparsity_log := trainer.read_sparsity():
                wandb_run.log(sparsity_log, step=trainer.n_training_steps)
            outputs = trainer.step(stream.at_each_hook(next(stream)))
            record = (trainer.n_training_steps + 1) % cfg.logger.wandb_log_frequency == 0
            show, save, signal_number = training.ranks.largest(  # each rank has its own clock and hears its own signals
                time.monotonic() - last_reading >= _SECONDS_BETWEEN_READINGS, checkpoints.is_due, signals.received
            )
            if record or show:
                readings = trainer.read(outputs)
                if record:
                    metrics = trainer.flat(readings) | {"details/tokens_per_second": progress.format_dict["rate"] or 0}
                    wandb_run.log(metrics, step=trainer.n_training_steps)
                    if training.ranks.is_main:
                        training.run.run_directory.record_metrics(
                            trainer.n_training_steps, metrics | {"d_sae": cfg.sae.d_sae}
                        )
                progress.set_postfix_str(_postfix(readings, cfg.sae.d_sae))
                last_reading = time.monotonic()
            if record or show or waits_for_no_device:
                _check_losses(training, outputs)
            trainer.advance()
            progress.update(cfg.train_batch_size_tokens)
            if show and time.monotonic() - last_line >= _SECONDS_BETWEEN_LOG_LINES:
                log.debug("%s", progress)  # for run.log alone
                last_line = time.monotonic()

            if trainer.checkpoint_thresholds and trainer.n_training_samples > trainer.checkpoint_thresholds[0]:
                trainer.checkpoint_thresholds.pop(0)
                checkpoints.save(milestone=True)
            elif (save or signal_number) and not trainer.n_not_finite_in_a_row:  # else the last stays
                checkpoints.save()
            if signal_number:
                raise Stopped(signal_number)
        log.debug("%s", progress)
        if sparsity_log := trainer.read_sparsity(final=True):
            wandb_run.log(sparsity_log, step=trainer.n_training_steps)


def _check_losses(training: Training, outputs: Mapping[str, TrainStepOutput]) -> None:
    """Stops a run whose losses are not finite any more."""
    trainer, checkpoints = training.trainer, training.checkpoints
    if (n := trainer.n_not_finite_in_a_row) < _NOT_FINITE_AT_MOST:
        return
    if checkpoints.newest is None:
        checkpoints.save()  # none of those steps was applied
    name = next(name for name, each in trainer.trainers.items() if int(each.n_not_finite_in_a_row) == n)
    raise RunFailed(
        f"{n} steps in a row had a loss or gradient that is not finite ({'' if trainer.is_single else name + ', '}loss"
        f" {outputs[name].loss.item():g}, learning rate {trainer.first.optimizer.param_groups[0]['lr']:g}, after"
        f" {trainer.n_training_samples:,} tokens) and were not applied; lower --lr, or look at the activations"
        f" (--lm_dtype, --max_activation_norm_multiple); the last good checkpoint is {checkpoints.newest}"
    )


def _postfix(readings: Mapping[str, Mapping[str, Any]], d_sae: int) -> str:
    """L0, explained variance and dead features, from the lowest to the highest of the SAEs."""

    def spread(form: str, values: list[float]) -> str:
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    each = readings.values()
    return (
        f"L0 {spread('.1f', [reading['metrics/l0'] for reading in each])},"
        f" explained variance {spread('.3f', [reading['metrics/explained_variance'] for reading in each])},"
        f" dead {spread('.1%', [reading['sparsity/dead_features'] / d_sae for reading in each])}"
    )
