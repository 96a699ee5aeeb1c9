"""Drives SAELens's trainer over a stream of activations, to a finished checkpoint."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable
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
from sae_toolkit.checkpoints import (
    finish_sae,
    load_training_checkpoint,
    save_final_checkpoint,
    save_training_checkpoint,
)
from sae_toolkit.errors import RunFailed, UserError, one_line
from sae_toolkit.flag_values import Interval
from sae_toolkit.language_model import LanguageModel
from sae_toolkit.models import load_language_model
from sae_toolkit.sparse_topk import sparse_class
from sae_toolkit.stop_signals import StopSignals
from sae_toolkit.trainer import Trainer
from sae_toolkit.training_setup import PreparedRun
from sae_toolkit.trust import tensors_only
from sae_toolkit.wandb_run import WandbRun
from sae_toolkit.whole_directory import NotSaved

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
        model = load_language_model(run.model, run.cfg.hook_name, run.cfg.device, run.lm_dtype)
        model.keep_only_up_to_hook()
        return model

    if run.flags.cache_activations is None:
        return load()
    directory = Path(run.flags.cache_activations)
    cache = ActivationCache(directory, run.cache_parameters(), run.rows_NT, run.cfg.sae.d_in)
    return CachedActivations(cache, load, run.cfg.device)


class Training:
    """A run at its first step: SAE, trainer and activation stream are made, norms measured, or a checkpoint loaded.

    Args:
        run: what to train on what.
        activations: from `open_activations`.

    Raises:
        UserError: the activations leave nothing to train on, or a checkpoint does not fit.
    """

    def __init__(self, run: PreparedRun, activations: LanguageModel | CachedActivations) -> None:
        self.cfg = cfg = run.cfg
        self.checkpoints = _Checkpoints(self, run)
        self.sae = create_sae(cfg)
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
        )
        trainer_cfg = cfg.to_sae_trainer_config()
        trainer_cfg.logger = LoggingConfig(log_to_wandb=False)  # `fit` below records; SAELens's own is not used
        self.trainer = Trainer(trainer_cfg, self.sae, self.stream)
        if run.resume_from is not None:
            with tensors_only(f"--resume {run.resume_from}"):
                load_training_checkpoint(run.resume_from, self.trainer, self.stream)
            log.info("resuming after %s tokens", f"{self.trainer.n_training_samples:,}")
        else:
            _calibrate(cfg, self.trainer, self.stream, run.flags.max_activation_norm_multiple or None)
        max_norm = self.stream.positions.max_activation_norm
        _record_training(self.sae, cfg, run.metadata() | {"max_activation_norm": max_norm})
        if cfg.compile_sae:
            self.sae.training_forward_pass = torch.compile(
                self.sae.training_forward_pass, mode=cfg.sae_compilation_mode
            )

    def fit(self, wandb_run: WandbRun, signals: StopSignals) -> Path:
        """Trains the SAE to the end and saves it.

        Returns:
            Directory of the finished SAE.

        Raises:
            Stopped: a signal came; a checkpoint is saved, if there was room for it.
            RunFailed: the losses are not finite any more, or the finished SAE cannot be written.
        """
        with signals.deferred():
            _fit(self, wandb_run, signals)
            self._describe_what_was_left_out()
            final = self.checkpoints.save_final()
        if self.cfg.logger.log_weights_to_wandb:
            wandb_run.save_sae(final)
        return final

    def _describe_what_was_left_out(self) -> None:
        stream = self.stream
        if stream.positions.max_activation_norm is not None:
            log.info(
                "left out %s of %s activations as massive (norm above %.4g)",
                f"{stream.n_massive:,}",
                f"{stream.n_massive + stream.n_kept:,}",
                stream.positions.max_activation_norm,
            )
        if n := int(self.trainer.n_not_finite):
            log.warning("%d steps had a loss or gradient that was not finite and were not applied", n)
        if isinstance(stream.source, CachedActivations):
            log.info(stream.source.describe())


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
        UserError: the pretrained SAE is of another shape or normalization.
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
    trainer: Trainer,
    stream: ActivationStream,
    max_norm_multiple: float | None,
) -> None:
    """Freezes the norm limit and the normalization on the first batches of the stream, which are trained on too."""
    mode = trainer.sae.cfg.normalize_activations
    estimated = mode in ("expected_average_only_in", "covariance_whitening")
    if max_norm_multiple is None and not estimated:
        return
    log.info("measuring activation norms on %d batches", cfg.n_batches_for_norm_estimate)
    acts_ND = stream.calibrate(cfg.n_batches_for_norm_estimate, max_norm_multiple)
    batches = acts_ND.split(cfg.train_batch_size_tokens)
    if mode == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(trainer.sae.cfg.d_in, iter(batches), len(batches))
    elif mode == "covariance_whitening":
        trainer.activation_scaler.estimate_whitening(trainer.sae.cfg.d_in, iter(batches), len(batches))


class _Checkpoints:
    """When a run is saved, and what is kept."""

    def __init__(self, training: Training, run: PreparedRun) -> None:
        self.training = training
        self.run = run
        self.every = Interval.parse(run.flags.checkpoint_every)
        self.newest = run.resume_from
        self.final: Path | None = None
        self._saved_at = time.monotonic()
        self._saved_tokens = int(run.resume_from.name) if run.resume_from else 0

    @property
    def is_due(self) -> bool:
        n_tokens = self.training.trainer.n_training_samples - self._saved_tokens
        return self.every.is_over(time.monotonic() - self._saved_at, n_tokens)

    def save(self, milestone: bool = False) -> None:
        """Saves a checkpoint, unless there is no room for it; then the last one stays and the run goes on."""
        n_tokens, key = self.training.trainer.n_training_samples, self.run.run_directory.key
        if milestone or self._saved_tokens != n_tokens:
            try:
                self.newest = self._with_room(
                    lambda: save_training_checkpoint(
                        self.training.trainer, self.training.stream, self.run.cfg, run=key, milestone=milestone
                    )
                )
                self.run.run_directory.keep_newest(self.run.flags.keep)
            except NotSaved as error:
                kept = f"the last is {self.newest}" if self.newest else "there is none yet"
                log.warning("the checkpoint at %s tokens is not saved: %s; %s", f"{n_tokens:,}", error, kept)
        self._saved_at, self._saved_tokens = time.monotonic(), n_tokens

    def save_final(self) -> Path:
        """Saves the finished SAE, and deletes the checkpoints that were there to resume from."""
        trainer, cfg, directory = self.training.trainer, self.run.cfg, self.run.run_directory
        finish_sae(trainer, cfg)
        try:
            self.final = self._with_room(lambda: save_final_checkpoint(trainer, cfg, run=directory.key))
        except NotSaved as error:
            raise RunFailed(
                f"{directory.path}: the finished SAE cannot be saved: {error}; make room, and {self.how_to_go_on()}"
            ) from None
        directory.keep_newest(0)
        return self.final

    def _with_room(self, save: Callable[[], Path]) -> Path:
        try:
            return save()
        except NotSaved:
            self.run.run_directory.keep_newest(1)
            return save()

    def how_to_go_on(self) -> str:
        """For somebody whose run was stopped, in a few words."""
        if self.final is not None:
            return f"the SAE is finished: {self.final}"
        if not self.run.directory.exists():
            return "nothing was trained yet; the same command begins again"
        python = Path(sys.executable)
        if python.is_relative_to(Path.cwd()):
            python = python.relative_to(Path.cwd())
        command = [str(python), "sae_lens_train.py", "--resume", str(self.newest or self.run.directory)]
        if self.run.flags.trust_remote_code:
            command.append("--trust_remote_code")
        return f"to go on: {shlex.join(command)}"


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
    )
    last_reading = last_line = 0.0
    with progress:
        while trainer.n_training_samples < stream.total:
            if sparsity_log := trainer.maybe_reset_sparsity():
                wandb_run.log(sparsity_log, step=trainer.n_training_steps)
            output = trainer.step(next(stream))
            record = (trainer.n_training_steps + 1) % cfg.logger.wandb_log_frequency == 0
            show = time.monotonic() - last_reading >= _SECONDS_BETWEEN_READINGS
            if record or show:
                reading = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
                if record:
                    wandb_run.log(
                        reading | {"details/tokens_per_second": progress.format_dict["rate"] or 0},
                        step=trainer.n_training_steps,
                    )
                progress.set_postfix_str(_postfix(reading, trainer))
                last_reading = time.monotonic()
            if record or show or waits_for_no_device:
                _check_losses(training, output)
            trainer.n_training_steps += 1
            progress.update(cfg.train_batch_size_tokens)
            if show and time.monotonic() - last_line >= _SECONDS_BETWEEN_LOG_LINES:
                log.debug("%s", progress)  # for run.log alone
                last_line = time.monotonic()

            if trainer.checkpoint_thresholds and trainer.n_training_samples > trainer.checkpoint_thresholds[0]:
                trainer.checkpoint_thresholds.pop(0)
                checkpoints.save(milestone=True)
            elif (checkpoints.is_due or signals.received) and not trainer.n_not_finite_in_a_row:  # else the last stays
                checkpoints.save()
            signals.check()
        log.debug("%s", progress)
        if sparsity_log := trainer.full_sparsity_window_log():
            wandb_run.log(sparsity_log, step=trainer.n_training_steps)


def _check_losses(training: Training, output: TrainStepOutput) -> None:
    """Stops a run whose losses are not finite any more."""
    trainer, checkpoints = training.trainer, training.checkpoints
    if (n := int(trainer.n_not_finite_in_a_row)) < _NOT_FINITE_AT_MOST:
        return
    if checkpoints.newest is None:
        checkpoints.save()  # none of those steps was applied
    raise RunFailed(
        f"{n} steps in a row had a loss or gradient that is not finite (loss {output.loss.item():g},"
        f" learning rate {trainer.optimizer.param_groups[0]['lr']:g}, after {trainer.n_training_samples:,} tokens) and"
        f" were not applied; lower --lr, or look at the activations (--lm_dtype, --max_activation_norm_multiple);"
        f" the last good checkpoint is {checkpoints.newest}"
    )


def _postfix(reading: dict[str, Any], trainer: Trainer) -> str:
    l0, variance = reading["metrics/l0"], reading["metrics/explained_variance"]
    dead = reading["sparsity/dead_features"] / trainer.sae.cfg.d_sae
    return f"L0 {l0:.1f}, explained variance {variance:.3f}, dead {dead:.1%}"
