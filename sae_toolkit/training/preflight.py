"""Checks before a run starts: whether it fits, how long it takes, and whether the SAE is likely to become unhealthy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.util import str_to_dtype

from sae_toolkit.activations.cache import CachedActivations
from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.massive_activations import MASSIVE
from sae_toolkit.model.devices import out_of_memory_answered, random_states_restored, release_memory, with_float64
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.training import RunSettings
from sae_toolkit.steps.finetune_loss import PredictionLoss
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.training.description import describe
from sae_toolkit.training.finetuning import prediction_loss
from sae_toolkit.training.initial_sae import lineage_warnings
from sae_toolkit.training.needs import check_disk, check_memory
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.recipe_warnings import MeasuredActivations, activation_warnings, recipe_warnings
from sae_toolkit.training.run import create_sae, load_model
from sae_toolkit.training.without_effect import without_effect

log = logging.getLogger(__name__)

_MOST_STEPS, _MOST_SECONDS_OF_STEPS = 5, 2.0  # timed
_FINETUNING_STEPS = 2  # of which the last is timed, as the first is slower


def check_before_loading(run: PreparedRun, settings: RunSettings) -> None:
    """Logs what will run, what it needs, and why the SAE may become unhealthy, before anything large is loaded.

    Args:
        run: the run.
        settings: whether this is a dry run, and whether a warning ends the run.

    Raises:
        UserError: the run does not fit on the disk or into memory, or there is a warning and --strict is given.
    """
    if not run.ranks.is_main:
        return
    log.info(describe(run, details=settings.dry_run or run.recording.verbose))
    for line in without_effect(run):
        log.warning("warning %s", line)
    check_memory(run)
    check_disk(run)
    if run.resume_from is None:
        begins_trained = bool(run.initialized_from)
        warnings = []
        for cfg in {cfg.sae.d_sae: cfg for cfg in reversed(run.cfgs)}.values():
            warnings += recipe_warnings(
                cfg,
                run.held_out.fraction,
                run.passes,
                begins_trained=begins_trained,
                target_l0=run.sae.target_l0,
            )
        warnings = list(dict.fromkeys(warnings))
        for hook_name, lineage in run.initialized_from.items():
            warnings += lineage_warnings(lineage, run.model.name, hook_name, run.text, run.held_out)
        _warn(warnings, settings.strict)
        if warnings and run.optimization.recipe == "seed" and not begins_trained:
            log.warning("--recipe auto chooses what no flag gives, by the tokens, the width and k (docs/recipes.md)")


def check_activations(run: PreparedRun, source: LanguageModel | CachedActivations, settings: RunSettings) -> None:
    """Logs how long the run will take, and which settings do not fit the activations.

    For this it measures one batch of activations and a few training steps. The run trains on the same activations and
    draws the same random numbers as without this check. If there are several ranks, rank 0 measures its share.

    Args:
        run: the run.
        source: source of its activations.
        settings: whether a warning ends the run.

    Raises:
        UserError: a step does not fit into memory, or there is a warning and --strict is given.
    """
    if run.resume_from is None and run.ranks.is_main:
        measured, speed = measure(run, source)
        log.info(speed.describe(run))
        _warn_of_activations(run, measured, settings.strict)
    run.ranks.wait()


def _warn_of_activations(run: PreparedRun, measured: Sequence[MeasuredActivations | None], strict: bool) -> None:
    warnings = []
    for cfg, found in zip(run.cfgs, measured, strict=True):
        where = "" if len(run.cfgs) == 1 else f"at {cfg.hook_name}: "
        found_warnings = activation_warnings(
            cfg,
            found,
            finds_weight=run.sae.target_l0 is not None,
            max_norm_multiple=run.max_norm_multiple,
            skip_positions=run.positions.skip_positions,
        )
        warnings += [where + warning for warning in found_warnings]
    _warn(list(dict.fromkeys(warnings)), strict)


def dry_run(run: PreparedRun, settings: RunSettings) -> None:
    """Makes the checks that a run makes before its first step, without writing files or downloading the model.

    Args:
        run: the run.
        settings: whether a warning ends the run.

    Raises:
        UserError: as `check_activations`.
    """
    if not run.ranks.is_main or run.resume_from is not None:
        return
    measured: Sequence[MeasuredActivations | None] = [None] * len(run.cfgs)
    if run.model.is_here():
        source = load_model(run)
        if not run.finetunes:
            source.keep_only_up_to_hook()
        measured, speed = measure(run, source)
        log.info(speed.describe(run, reads_cache=run.is_cached))
    else:
        log.info("time    not measured, the model is not downloaded yet")
    _warn_of_activations(run, measured, settings.strict)


def _warn(warnings: list[str], strict: bool) -> None:
    if strict and warnings:
        others = f"; and {n} more" if (n := len(warnings) - 1) else ""
        raise UserError(f"{warnings[0]} (--strict{others})")
    for warning in warnings:
        log.warning("warning %s", warning)


@dataclass(frozen=True)
class Speed:
    """The measured speed of a rank on its share of a batch.

    Args:
        tokens_a_second: tokens per second of the language model or the cache.
        seconds_a_step: seconds per training step, all SAEs together.
        seconds_a_finetuning_step: seconds per step of --finetune_loss, with the passes of the language model; 0 if
            there are none.
    """

    tokens_a_second: float
    seconds_a_step: float
    seconds_a_finetuning_step: float = 0.0

    def describe(self, run: PreparedRun, *, reads_cache: bool = False) -> str:
        """Returns a line that says how long a run takes.

        Args:
            run: the run.
            reads_cache: whether the run will read all activations from the cache, although the check computed them.
        """
        phases, training_tokens = run.phases, run.cfg.training_tokens
        rate = math.inf if reads_cache else self.tokens_a_second * run.ranks.size
        n_tokens = training_tokens * phases.n_before / phases.n_steps
        n_tokens += 0 if run.held_out_NT is None else run.held_out_NT.size  # for the calibration of L0
        seconds = n_tokens / rate + phases.n_before * self.seconds_a_step
        source = "activations read from the cache" if reads_cache else f"activations {rate:,.0f} tokens/s"
        finetuning = ""
        if n := phases.n_finetuning:
            seconds += n * self.seconds_a_finetuning_step
            finetuning = f", then {n:,} fine-tuning steps of {self.seconds_a_finetuning_step:,.2f} s"
        return f"time    about {_duration(seconds)}: {source}, {1000 * self.seconds_a_step:,.1f} ms a step{finetuning}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{max(seconds, 1):.0f} seconds"


def measure(run: PreparedRun, source: LanguageModel | CachedActivations) -> tuple[list[MeasuredActivations], Speed]:
    """Measures the first batch of activations at each hook, and training steps on it with SAEs that are then deleted.

    Raises:
        UserError: the activations are not finite, or a step does not fit into memory.
    """
    cfg = run.cfg
    found, seconds_a_step = [], 0.0
    what = f"--train_batch_size_tokens {cfg.train_batch_size_tokens}: a training step on {cfg.device}"
    answered = out_of_memory_answered(what, "lower it, --expansion_factor or --n_batches_in_buffer")
    with _without_trace(run, source), answered:
        first = _stream(run, source, batch_size=1, rows_per_forward=1)
        first_ND = first.calibrate(1, None)  # the first pass of the model is slower, so it is not timed
        first.close()
        if first_ND.shape[1] != sum(run.widths):
            raise UserError(
                f"{run.hook_flag}: the activations at {' '.join(run.hook_names)} have a width of"
                f" {first_ND.shape[1]}, and the modules there have a width of {sum(run.widths)}; name another hook"
            )
        stream = _stream(run, source, cfg.train_batch_size_tokens, cfg.store_batch_size_prompts // run.ranks.size)
        started = _now(cfg.device)
        acts_ND = stream.calibrate(1, run.max_norm_multiple)
        n_run = stream.n_kept + stream.n_massive
        rate = n_run / (_now(cfg.device) - started)
        stream.close()
        kept_share = _share_of_positions(run) * stream.n_kept / n_run
        for each, acts in zip(run.cfgs, stream.at_each_hook(acts_ND), strict=True):
            measured, scale = _measure_norms(each, acts, source.dtype, kept_share)
            found.append(measured)
            seconds_a_step += _time_steps(_new_trainer(run, each, scale), acts)
        seconds_a_finetuning_step = 0.0
        if run.finetunes:  # at a single hook
            max_norms = stream.max_activation_norms
            loss = prediction_loss(run, source, max_norms[0] if max_norms else None)
            seconds_a_finetuning_step = _time_finetuning(run, _new_trainer(run, cfg, scale), loss)
    return found, Speed(rate, seconds_a_step, seconds_a_finetuning_step)


def _measure_norms(
    cfg: LanguageModelSAERunnerConfig[Any], acts_ND: torch.Tensor, dtype: torch.dtype, kept_share: float
) -> tuple[MeasuredActivations, float]:
    """Returns what the activations at a hook are like, and the factor that makes their mean norm sqrt(d_in).

    Args:
        dtype: dtype of the language model, for an error message.
        kept_share: `MeasuredActivations.kept_share`.
    """
    acts_ND = with_float64(acts_ND)
    norms_N = acts_ND.double().norm(dim=-1)
    if not norms_N.isfinite().all():
        raise UserError(f"--lm_dtype {dtype}: some activations are not finite; use another dtype")
    scale = math.sqrt(cfg.sae.d_in) / norms_N.mean().item()
    median_norm = norms_N.median().item()
    massive_N = norms_N > MASSIVE * median_norm
    variance_N = (acts_ND.double() - acts_ND.double().mean(0)).square().sum(-1)
    median_as_scaled = {"none": median_norm, "expected_average_only_in": scale * median_norm}
    measured = MeasuredActivations(
        median_norm=median_as_scaled.get(cfg.sae.normalize_activations, math.sqrt(cfg.sae.d_in)),
        massive_share=(variance_N[massive_N].sum() / variance_N.sum()).nan_to_num().item(),
        kept_share=kept_share,
    )
    return measured, scale


def _stream(
    run: PreparedRun, source: LanguageModel | CachedActivations, batch_size: int, rows_per_forward: int
) -> ActivationStream:
    """Returns a stream of the first activations of the run."""
    return ActivationStream(
        source,
        run.rows_NT,
        run.positions,
        run.assistant_NT,
        batch_size=batch_size,
        buffer_size=batch_size,
        mix_fraction=run.cfg.activations_mixing_fraction,
        rows_per_forward=rows_per_forward,
        total=batch_size,
        seed=run.cfg.seed,
        dtype=str_to_dtype(run.cfg.dtype),
        widths=run.widths,
        saes_per_hook=run.optimization.seeds,
        device=run.cfg.device,
        epochs=run.epochs,
        row_ids=run.phases.stream_rows,
    )


def _share_of_positions(run: PreparedRun) -> float:
    """Returns the share of positions that are kept, among those that no --skip_positions would keep."""
    first = run.rows_NT[:1000], None if run.assistant_NT is None else run.assistant_NT[:1000]
    kept_without = replace(run.positions, skip_positions=0).keeps_tokens(*first).sum()
    return float(run.positions.keeps_tokens(*first).sum() / max(kept_without, 1))


def _new_trainer(run: PreparedRun, cfg: LanguageModelSAERunnerConfig[Any], scale: float) -> Trainer:
    """Returns a trainer of a rank's share of one SAE, to be thrown away.

    Args:
        cfg: configuration of the SAE.
        scale: factor that the run's normalization multiplies the activations by.
    """
    share = run.share_of_rank(cfg)
    trainer_cfg = share.to_sae_trainer_config()
    trainer_cfg.logger = LoggingConfig(log_to_wandb=False)
    trainer = Trainer(trainer_cfg, create_sae(share), iter(()))
    trainer.products_in_bfloat16 = run.products_in_bfloat16
    if cfg.sae.normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.scaling_factor = scale
    return trainer


def _time_steps(trainer: Trainer, acts_ND: torch.Tensor) -> float:
    """Returns the seconds that a training step of one SAE takes on a rank, without communication.

    Args:
        trainer: a trainer of the rank's share of a batch.
        acts_ND: activations to train on; repeated if they are fewer than a batch.
    """
    batch_BD = acts_ND[torch.arange(trainer.cfg.train_batch_size_samples) % len(acts_ND)]
    seconds: list[float] = []
    if torch.device(trainer.cfg.device).type == "cuda":  # the first step compiles kernels, which can take seconds
        trainer.step(batch_BD)
    while len(seconds) < _MOST_STEPS and sum(seconds) < _MOST_SECONDS_OF_STEPS:
        started = _now(trainer.cfg.device)
        trainer.step(batch_BD)
        trainer.n_training_steps += 1
        seconds.append(_now(trainer.cfg.device) - started)
    return median(seconds[1:] or seconds)  # the first step is slower


def _time_finetuning(run: PreparedRun, trainer: Trainer, loss: PredictionLoss) -> float:
    """Returns the seconds that a step of --finetune_loss takes, with the passes of the language model."""
    assert run.phases.batches is not None
    (rows_RT, keeps_RT), seconds = run.phases.batches.batch(0), 0.0
    for _ in range(_FINETUNING_STEPS):
        started = _now(trainer.cfg.device)
        acts_ND = loss.read(rows_RT, keeps_RT)
        trainer.step(acts_ND.to(trainer.cfg.device, str_to_dtype(run.cfg.dtype)), loss)
        trainer.n_training_steps += 1
        seconds = _now(trainer.cfg.device) - started
    return seconds


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _without_trace(run: PreparedRun, source: LanguageModel | CachedActivations) -> Iterator[None]:
    """Restores the random states and the counts of a cache at the end of the context, and frees the memory."""
    cache = source.cache if isinstance(source, CachedActivations) else None
    before = cache.n_read + cache.n_computed if cache else 0
    with random_states_restored(str(run.cfg.device), run.llm_device):
        yield
    if cache:
        cache.n_read -= cache.n_read + cache.n_computed - before  # the run itself reads these again
    release_memory()
