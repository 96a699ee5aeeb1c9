"""The training loop: steps, progress, checkpoints, signals, and the record of the run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput

from sae_toolkit.errors import RunFailed, UserError, is_out_of_memory, one_line
from sae_toolkit.evaluation.measurement import Evaluation
from sae_toolkit.files.names import HELD_OUT_METRICS_FILENAME
from sae_toolkit.model.devices import freed_memory, release_memory
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.terminal.stop_signals import Stopped, StopSignals
from sae_toolkit.training.held_out import HeldOutText
from sae_toolkit.training.outcome import log_outcome
from sae_toolkit.training.record.panels import of_held_out, panels
from sae_toolkit.training.record.run_record import RunRecord
from sae_toolkit.training.run import Training
from sae_toolkit.training.text import rows_of_reading

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_READINGS = 1.0
_MOST_STEPS_NOT_FINITE = 10  # in a row, before the run stops
_N_HISTOGRAMS = 20  # of firing rates, in one run


def fit(training: Training, record: RunRecord, signals: StopSignals) -> Path:
    """Trains the SAEs of a run to the end and saves them.

    Args:
        training: the run.
        record: the record that metrics are written into.
        signals: signals that stop the run.

    Returns:
        Directory of the finished SAE; if there are several SAEs, the directory that holds one for each hook.

    Raises:
        Stopped: a signal came. A checkpoint is saved, if there was room for it.
        RunFailed: losses are not finite any more, memory ran out, or the finished SAE cannot be written.
    """
    run = training.run
    with signals.deferred(), _out_of_memory_answered(training):
        last_readings = TrainingLoop(training, record, signals).to_the_end()
        log_outcome(training, last_readings)
        final = training.checkpoints.save_final()
    metadata = {"training": run.metadata(), "resumed_from": run.resume_from and run.resume_from.name}
    metadata |= run.lineage()
    record.save_sae(final, metadata, with_weights=training.cfg.logger.log_weights_to_wandb)
    return final


@contextmanager
def _out_of_memory_answered(training: Training) -> Iterator[None]:
    """Context manager that turns an error about memory that has run out into a `RunFailed` of one line."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            f"out of memory on {training.cfg.device} after {training.trainer.n_training_samples:,} tokens"
            f" ({one_line(error)}); free memory there, or train anew with a smaller --expansion_factor or"
            f" --train_batch_size_tokens; {training.checkpoints.how_to_go_on()}"
        ) from None


class TrainingLoop:
    """Trains a run from its current step to its last step.

    Args:
        training: the run.
        record: the record that metrics are written into.
        signals: signals that stop the run.
    """

    def __init__(self, training: Training, record: RunRecord, signals: StopSignals) -> None:
        self.run, self.cfg, self.ranks = training.run, training.cfg, training.ranks
        self.trainer, self.stream, self.checkpoints = training.trainer, training.stream, training.checkpoints
        self.finetuning, self.total = training.finetuning, training.total
        self.max_norms = training.max_norms
        self.record = record
        self.signals = signals
        self._is_on_cpu = torch.device(self.cfg.device).type == "cpu"
        self._histogram_every = math.ceil(self.cfg.total_training_steps / _N_HISTOGRAMS)
        self._firing_rates = {name: _FiringRates(each) for name, each in self.trainer.trainers.items()}
        self._n_features = {name: cfg.sae.d_sae for name, cfg in zip(self.run.sae_names, self.run.cfgs, strict=True)}
        self._read_at = 0.0
        self._readings: Mapping[str, Mapping[str, Any]] = {}
        self._shown: Mapping[str, str] | None = None
        self._held_out = None
        if self.run.recording.eval_every and self.ranks.is_main:
            self._held_out = HeldOutText(self.run, training.activations)

    def to_the_end(self) -> Mapping[str, Mapping[str, Any]]:
        """Trains until all tokens are used.

        Returns:
            The readings of the last step, by the SAE's name; empty if no step was left.

        Raises:
            Stopped: a signal came. A checkpoint is saved, if there was room for it.
            RunFailed: losses are not finite any more.
        """
        trainer = self.trainer
        progress = Progress(
            "training",
            self.total,
            done=trainer.n_training_samples,
            device=self.cfg.device,
            speaks=self.ranks.is_main,
        )
        self.ranks.wait()  # some may still read a checkpoint or start wandb, longer than the timeout within a step
        if self.ranks.is_main:
            self.run.run_directory.keep_metrics_up_to(trainer.n_training_steps)
        with progress:
            while trainer.n_training_samples < self.total:
                self._step(progress)
            if sparsity := trainer.read_sparsity(final=True):
                self.record.log(panels(sparsity), step=trainer.n_training_steps)
        return self._readings

    def _step(self, progress: Progress) -> None:
        trainer, checkpoints = self.trainer, self.checkpoints
        if sparsity := trainer.read_sparsity():
            self.record.log(panels(sparsity), step=trainer.n_training_steps)
        before = trainer.n_training_samples
        if self.finetuning.is_due:
            progress.doing = "fine-tuning"
            outputs = self.finetuning.step()
        else:
            outputs = trainer.step(self.stream.at_each_hook(next(self.stream)))
        to_record = (trainer.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0
        show, save, signal_number = self.ranks.largest(  # each rank has its own clock and gets its own signals
            time.monotonic() - self._read_at >= _SECONDS_BETWEEN_READINGS, checkpoints.is_due, self.signals.received
        )
        is_last = before + self.cfg.train_batch_size_tokens >= self.total
        to_read = to_record or show or is_last
        if to_read:
            self._readings = self._read(outputs)
            self._read_at = time.monotonic()
            self._shown = _shown(self._readings)
            if to_record:
                self._record(self._readings, progress)
        if to_read or self._is_on_cpu:  # on a GPU a check waits for the device
            self._check_losses(outputs)
        if (trainer.n_training_steps + 1) % self._histogram_every == 0:
            self._record_firing_rates()
        trainer.advance()
        progress.advance(self.cfg.train_batch_size_tokens, self._shown)
        every = self.run.recording.eval_every
        if every and trainer.n_training_samples // every > before // every:
            with progress.paused(), freed_memory(self.cfg.device, is_kept=False):
                self._measure_held_out()

        if trainer.checkpoint_thresholds and trainer.n_training_samples > trainer.checkpoint_thresholds[0]:
            trainer.checkpoint_thresholds.pop(0)
            checkpoints.save(milestone=True)
        elif (save or signal_number) and not trainer.n_not_finite_in_a_row:  # otherwise keep the last good one
            checkpoints.save()
        if signal_number:
            raise Stopped(signal_number)

    def _read(self, outputs: Mapping[str, TrainStepOutput]) -> dict[str, dict[str, Any]]:
        """Returns the readings of a step for each SAE, with the share of its features that is dead."""
        readings, d_sae = self.trainer.read(outputs), self._n_features
        return {
            name: {**reading, "sparsity/dead_share": reading["sparsity/dead_features"] / d_sae[name]}
            for name, reading in readings.items()
        }

    def _record(self, readings: Mapping[str, Mapping[str, Any]], progress: Progress) -> None:
        step = self.trainer.n_training_steps
        speed = {"details/tokens_per_second": progress.per_second, "details/memory_gib": progress.memory_gib}
        values = panels(readings) | panels({"": speed})
        self.record.log(values, step)
        if self.ranks.is_main:
            d_sae = self.trainer.flat({name: {"d_sae": n} for name, n in self._n_features.items()})
            metrics = self.trainer.flat(readings) | speed | d_sae
            self.run.run_directory.record_metrics(step, metrics)

    def _record_firing_rates(self) -> None:
        rates = {name: {"sparsity/log10_firing_rate": rates.log10()} for name, rates in self._firing_rates.items()}
        for name, values_F in panels(rates).items():
            self.record.log_histogram(name, values_F.numpy(), self.trainer.n_training_steps)

    def _measure_held_out(self) -> None:
        """Measures on rank 0, while the other ranks wait."""
        n_tokens = self.cfg.context_size * rows_of_reading(self.cfg.context_size)
        calibrations = self.trainer.calibrate(n_tokens)  # on the text of the reading, so that its L0 is what is asked
        if self._held_out is not None:
            self.stream.wait()
            measured = None
            try:
                measured = self._held_out.measure(self.trainer, calibrations, self.max_norms)
            except UserError as error:  # it would end an evaluation, but must not end a training
                log.warning("not measured on held-out text: %s", error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.warning(
                    "not measured on held-out text: out of memory on %s (%s); --eval_every 0 measures nothing, and a"
                    " smaller --expansion_factor needs less memory",
                    self.cfg.device,
                    one_line(error),  # the error itself would keep the tensors of the measurement alive
                )
            else:
                self._record_held_out(measured)
            if measured is None:
                release_memory()
        self.ranks.wait()

    def _record_held_out(self, measured: Mapping[str, Evaluation]) -> None:
        step, n_tokens = self.trainer.n_training_steps - 1, self.trainer.n_training_samples
        found = {name: of_held_out(evaluation.metrics) for name, evaluation in measured.items()}
        self.record.log(panels(found), step)
        cfgs = dict(zip(self.run.sae_names, self.run.cfgs, strict=True))
        for name, evaluation in measured.items():
            metrics, cfg = evaluation.metrics, cfgs[name]
            seed = {"seed": cfg.seed} if name != cfg.hook_name else {}
            line = {"n_training_samples": n_tokens, "hook_name": cfg.hook_name} | seed | found[name]
            self.run.run_directory.record_metrics(step, line, HELD_OUT_METRICS_FILENAME)
            log.info(
                "held out%s after %s tokens: loss recovered %.2f%%, L0 %.1f, explained variance %.3f, dead %.1f%% (over"
                " %s tokens)",
                "" if self.trainer.is_single else f", {name},",
                f"{n_tokens:,}",
                100 * metrics["loss_recovered"],
                metrics["l0"],
                metrics["explained_variance"],
                100 * metrics["dead_features"],
                f"{evaluation.dead.tokens:,}",
            )

    def _check_losses(self, outputs: Mapping[str, TrainStepOutput]) -> None:
        """Raises RunFailed if losses have not been finite for several steps."""
        trainer, checkpoints = self.trainer, self.checkpoints
        if (n := trainer.n_not_finite_in_a_row) < _MOST_STEPS_NOT_FINITE:
            return
        if checkpoints.newest is None:
            checkpoints.save()  # the weights are still good, because none of these steps was applied
        name = next(name for name, each in trainer.trainers.items() if int(each.n_not_finite_in_a_row) == n)
        raise RunFailed(
            f"{n} steps in a row had a loss or gradient that is not finite"
            f" ({'' if trainer.is_single else name + ', '}loss {outputs[name].loss.item():g}, learning rate"
            f" {trainer.first.optimizer.param_groups[0]['lr']:g}, after {trainer.n_training_samples:,} tokens) and were"
            " not applied; lower --lr, or look at the activations (--lm_dtype, --max_activation_norm_multiple)"
            f"{', or give --dtype float32' if trainer.first.sae.dtype == torch.float16 else ''}; the"
            f" last good checkpoint is {checkpoints.newest}"
        )


class _FiringRates:
    """Computes the firing rate of each feature since the last call."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._n_tokens = 0
        self._counts_F: torch.Tensor | None = None

    def log10(self) -> torch.Tensor:
        """Returns log10 of the firings per token of each feature, [F], on the CPU. No firing counts as 1/2 firing."""
        counts_F, n_tokens = self.trainer.firing_counts().cpu().double(), int(self.trainer.n_frac_active_samples)
        new_F, n_new = counts_F, n_tokens
        if self._counts_F is not None and n_tokens > self._n_tokens:  # otherwise SAELens has reset its counts
            new_F, n_new = counts_F - self._counts_F, n_tokens - self._n_tokens
        self._counts_F, self._n_tokens = counts_F, n_tokens
        return (new_F.clamp(min=0.5) / n_new).log10()


def _shown(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the readings that the progress view shows; for several SAEs, the range of each reading."""

    def spread(form: str, values: list[float]) -> str:
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    each = readings.values()
    return {
        "loss": spread(".4g", [reading["losses/overall_loss"] for reading in each]),
        "L0": spread(".1f", [reading["metrics/l0"] for reading in each]),
        "explained variance": spread(".3f", [reading["metrics/explained_variance"] for reading in each]),
        "dead": spread(".1%", [reading["sparsity/dead_share"] for reading in each]),
        **{
            label: spread(".4f", [reading[name] for reading in each])
            for name, label in (("losses/kl_loss", "KL"), ("losses/ce_loss", "CE"))
            if all(name in reading for reading in each)
        },
    }
