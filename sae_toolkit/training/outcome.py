"""What a run says at its end: what it left out, whether it reached its L0, and whether the SAE has learnt anything."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from sae_toolkit.activations.cache import CachedActivations
from sae_toolkit.steps.calibration import FURTHEST
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.training.recipe_warnings import too_high_learning_rate
from sae_toolkit.training.run import Training

log = logging.getLogger(__name__)

_LEAST_OF_K = 0.97  # an L0 below this share of k is not k


def log_outcome(training: Training, readings: Mapping[str, Mapping[str, Any]]) -> None:
    """Logs the outcome of a run before its SAEs are saved. A problem is a warning.

    Args:
        training: the run.
        readings: the readings of the last step, by the SAE's name.
    """
    _log_what_was_left_out(training)
    _log_l0(training.trainer, readings)
    for name, cfg in zip(training.run.sae_names, training.run.cfgs, strict=True):
        if reading := readings.get(name):
            where = "" if training.trainer.is_single else f"{name}: "
            if said := unhealthy_end(cfg, reading["metrics/explained_variance"], reading["losses/overall_loss"]):
                log.warning("warning %s%s", where, said)


def unhealthy_end(cfg: LanguageModelSAERunnerConfig[Any], explained_variance: float, loss: float) -> str | None:
    """Returns a line about an SAE that explains nothing at the end of its training; None if it explains something.

    Args:
        cfg: configuration of the run.
        explained_variance: on the last batch, at most 1. Below 0 the SAE is worse than the mean of the activations.
        loss: the loss of the last batch.
    """
    # Of whitened activations it can be somewhat below 0 where it is above 0 for those of the model.
    if explained_variance >= (-1 if cfg.sae.normalize_activations == "covariance_whitening" else 0):
        return None
    because = too_high_learning_rate(cfg) or (
        f"train longer than --training_tokens {cfg.training_tokens}, or change what the warnings before the first step"
        " name"
    )
    return (
        f"the SAE ended unhealthy: its explained variance is {explained_variance:.3g} on the last batch (loss"
        f" {loss:.3g}), worse than that of the mean activation; {because}"
    )


def _log_what_was_left_out(training: Training) -> None:
    stream = training.stream
    if stream.max_activation_norms is not None:
        at_some = f"; replaced {stream.n_replaced:,} that are massive at some of the hooks only"
        log.info(
            "left out %s of %s activations as massive (norm above %s)%s",
            f"{stream.n_massive:,}",
            f"{stream.n_massive + stream.n_kept:,}",
            " or ".join(dict.fromkeys(f"{norm:.4g}" for norm in stream.max_activation_norms)),
            at_some if stream.n_replaced else "",
        )
    if n := training.trainer.n_not_finite:
        log.warning("%d steps had a loss or gradient that was not finite and were not applied", n)
    if isinstance(stream.source, CachedActivations):
        log.info(stream.source.describe())


def _log_l0(trainers: MultiTrainer, readings: Mapping[str, Mapping[str, Any]]) -> None:
    """Logs the L0 that the finished SAEs have, and warns if it is far from --target_l0 or below --k."""
    calibrations = trainers.calibrate()
    for name, trainer in trainers.trainers.items():
        where = "" if trainers.is_single else f"{name}: "
        calibration, control = calibrations[name], trainer.l0_control
        if control is not None:
            ((weight, value),) = trainer.found_weight.items()
            missed = calibration is None and not control.is_near
            log.log(
                logging.WARNING if missed else logging.INFO,
                "%s--target_l0 %g: the running L0 ended at %.1f, and --%s at %.3g%s",
                where,
                control.target,
                control.l0,
                weight,
                value,
                f"; not within {FURTHEST:.0%}, so the SAE is left as it is: train longer, raise --lr, or ask for"
                " another L0"
                if missed
                else "",
            )
        if calibration is not None:
            log.info(
                "%sL0 of the finished SAE on %s tokens of the %s text: %.1f; before its %s: %.1f",
                where,
                f"{calibration.n_tokens:,}",
                calibration.text,
                calibration.l0,
                f"{next(iter(calibration.tensors))} was calibrated",
                calibration.l0_before,
            )
        k, reading = getattr(trainer.sae.cfg, "k", None), readings.get(name)
        l0 = calibration.l0 if calibration else reading["metrics/l0"] if reading else None
        if k is not None and l0 is not None and l0 < _LEAST_OF_K * k:
            log.warning(
                "warning %s--k %g: the SAE ended with an L0 of %.1f, as no more features are positive on a token;"
                " lower --k, or train a wider SAE",
                where,
                k,
                l0,
            )
