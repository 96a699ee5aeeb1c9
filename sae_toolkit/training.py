"""Drives SAELens's trainer over a stream of activations, to a finished checkpoint."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype
from tqdm.auto import tqdm

from sae_toolkit.activation_cache import ActivationCache, CachedActivations
from sae_toolkit.activations import ActivationStream
from sae_toolkit.checkpoints import (
    load_training_checkpoint,
    save_final_checkpoint,
    save_training_checkpoint,
)
from sae_toolkit.errors import UserError
from sae_toolkit.language_model import LanguageModel
from sae_toolkit.models import load_language_model
from sae_toolkit.sparse_topk import sparse_class
from sae_toolkit.trainer import Trainer
from sae_toolkit.training_setup import PreparedRun
from sae_toolkit.wandb_run import WandbRun

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_READINGS = 1.0


class Interrupted(Exception):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}; progress is saved in {checkpoint}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


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
        self.sae = _create_sae(cfg)
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

    def fit(self, wandb_run: WandbRun) -> Path:
        """Trains the SAE to the end and saves it.

        Returns:
            Directory of the finished SAE.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
        """
        with _signals() as received:
            _fit(self.cfg, self.trainer, self.stream, wandb_run, received)
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
        final = save_final_checkpoint(self.trainer, self.cfg)
        if self.cfg.logger.log_weights_to_wandb:
            wandb_run.save_sae(final)
        return final


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


def _create_sae(cfg: LanguageModelSAERunnerConfig[Any]) -> TrainingSAE[Any]:
    torch.manual_seed(cfg.seed)
    if cfg.from_pretrained_path is None:
        sae_class, _ = get_sae_training_class(cfg.sae.architecture())
        sae_cfg = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
        return sparse_class(sae_class, sae_cfg, compiled=cfg.compile_sae)(sae_cfg)
    found = TrainingSAE.load_from_disk(cfg.from_pretrained_path, device=cfg.device)
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


def _fit(
    cfg: LanguageModelSAERunnerConfig[Any],
    trainer: Trainer,
    stream: ActivationStream,
    wandb_run: WandbRun,
    received: list[int],
) -> None:
    """SAELens's `fit`, with a progress bar that moves, checkpoints that resume, and signals that are heard."""
    total = stream.total
    progress = tqdm(
        total=total,
        initial=trainer.n_training_samples,
        desc="Training SAE",
        unit="tok",
        unit_scale=True,
        smoothing=0.05,
    )
    last_reading = 0.0
    with progress:
        while trainer.n_training_samples < total:
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
            trainer.n_training_steps += 1
            progress.update(cfg.train_batch_size_tokens)

            if received:
                raise Interrupted(received[0], save_training_checkpoint(trainer, stream, cfg))
            if trainer.checkpoint_thresholds and trainer.n_training_samples > trainer.checkpoint_thresholds[0]:
                trainer.checkpoint_thresholds.pop(0)
                save_training_checkpoint(trainer, stream, cfg)
        if sparsity_log := trainer.full_sparsity_window_log():
            wandb_run.log(sparsity_log, step=trainer.n_training_steps)


def _postfix(reading: dict[str, Any], trainer: Trainer) -> str:
    l0, variance = reading["metrics/l0"], reading["metrics/explained_variance"]
    dead = reading["sparsity/dead_features"] / trainer.sae.cfg.d_sae
    return f"L0 {l0:.1f}, explained variance {variance:.3f}, dead {dead:.1%}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that collects SIGINT and SIGTERM while it is open; a second signal ends the process at once."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        log.warning("%s: saving a checkpoint after this step", signal.Signals(number).name)
        received.append(number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
