"""Runs the trials of a sweep on Ray Tune, on this machine or a cluster."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError, one_line
from sae_toolkit.many_runs.sweep.trials import Trial
from sae_toolkit.many_runs.sweep.worker import SweepTrial
from sae_toolkit.settings.command_line import parse_training_flags

log = logging.getLogger(__name__)

_MOST_FAILURES = 3  # of a trial, each gone on from its checkpoint
_SECONDS_BETWEEN_LINES = 20.0
_OF_EVALUATED = ("sae", "metrics", "health", "n_healthy")


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Ray on this machine alone, or a cluster that is there.

    Args:
        address: of the cluster: `auto`, or host:port; None for a Ray of our own, which ends with us.

    Raises:
        UserError: it cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's run has its own log
    if address is not None:
        _check_address(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
    except ray.exceptions.AuthenticationError:
        raise UserError(
            f"--address {address}: the cluster wants the token of its head (~/.ray/auth_token): set RAY_AUTH_MODE=token"
        ) from None
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"--address {address}: no Ray cluster can be reached there: {one_line(error)}") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # `_Narrator` says it
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself tries for minutes."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"--address {address}: must be auto, or host:port of the cluster's head, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster can be reached there: {one_line(error)}; `ray start --head` on one"
            " machine says the address"
        ) from None


def run_trials(
    trials: Sequence[Trial],
    directory: Path,
    *,
    name: str,
    cpus_per_trial: int,
    gpus_per_trial: float,
    early_stop: bool,
    evaluation_flags: Sequence[str],
) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Trains and evaluates all trials; those that came to their end before are not run again.

    Args:
        trials: from `make_trials`.
        directory: of the sweep.
        name: of the group of wandb runs.
        cpus_per_trial: cores of each.
        gpus_per_trial: GPUs of each; a fraction lets several share one.
        early_stop: whether trials that promise less than half of those before them at the same point are stopped.
        evaluation_flags: more flags of evaluate_sae_real_activations.py.

    Returns:
        Each trial with what it came to: `metrics` and `health` where it was evaluated, `refused` or `failed` with
        the reason where it was not, `stopped` where it promised too little.

    Raises:
        UserError: no machine of the cluster has what a trial takes.
        KeyboardInterrupt: it was stopped; the same call goes on.
    """
    _check_resources(cpus_per_trial, gpus_per_trial)
    settings = {
        "name": name,
        "cwd": str(Path.cwd()),
        "cpus_per_trial": cpus_per_trial,
        "evaluation_flags": list(evaluation_flags),
    }
    scheduler = None
    if early_stop:
        tokens = max(parse_training_flags(trial.flags).optimization.training_tokens for trial in trials)
        scheduler = ASHAScheduler(  # at a quarter and at a half of the tokens; never while it is evaluated
            time_attr="tokens",
            grace_period=max(1, tokens // 4),
            max_t=max(2, tokens * 9 // 10),
            reduction_factor=2,
            stop_last_trials=False,
        )
    # Trials that were evaluated before would count as rivals of those that run.
    outcomes: dict[int, Mapping[str, Any]] = {
        trial.number: {name: result[name] for name in _OF_EVALUATED} for trial in trials if (result := trial.result())
    }
    unfinished = [trial for trial in trials if trial.number not in outcomes]
    if not unfinished:
        return [(trial, outcomes[trial.number]) for trial in trials]
    started, narrator = time.monotonic(), _Narrator(trials)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(SweepTrial, trials=list(trials), settings=settings),
            {"cpu": cpus_per_trial, "gpu": gpus_per_trial},
        ),
        param_space={"number": tune.grid_search([trial.number for trial in unfinished])},
        tune_config=tune.TuneConfig(
            metric="promise", mode="max", scheduler=scheduler, trial_dirname_creator=lambda trial: trial.trial_id
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str((directory / "ray").absolute()),
            failure_config=tune.FailureConfig(max_failures=_MOST_FAILURES),
            callbacks=[narrator],
            verbose=0,
        ),
    )
    found = tuner.fit()
    if len(narrator.ended) < len(unfinished):
        log.warning("stopped; the same command goes on")
        raise KeyboardInterrupt
    log.info("the trials took %s", f"{time.monotonic() - started:,.0f} s")
    for each in (found[i] for i in range(len(found))):
        if each.error:
            outcome: Mapping[str, Any] = {"failed": _reason(each.error)}
        else:
            metrics = each.metrics or {}
            kept = ("refused",) if "refused" in metrics else _OF_EVALUATED if "metrics" in metrics else ()
            outcome = {name: metrics[name] for name in kept} or {"stopped": metrics.get("tokens", 0)}
        outcomes[(each.config or {})["number"]] = outcome
    return [(trial, outcomes[trial.number]) for trial in trials]


def _check_resources(cpus: int, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"--cpus_per_trial {cpus} --gpus_per_trial {gpus:g}: no machine has as many; there are {there}")


def default_gpus() -> float:
    """One for each trial where there are any here."""
    return 1.0 if torch.cuda.is_available() else 0.0


def _reason(error: BaseException | None) -> str:
    return str(error).strip().rpartition("\n")[2][:300]


class _Narrator(tune.Callback):
    """Says how trials go, in a line each."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self._last: dict[str, float] = {}
        self.ended: set[int] = set()

    def _name(self, trial: Any) -> str:
        number = trial.config["number"]
        return f"trial {number} of {len(self.trials)} ({self.trials[number - 1].name})"

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        now = time.monotonic()
        if "explained_variance" in result and now - self._last.get(trial.trial_id, 0) >= _SECONDS_BETWEEN_LINES:
            self._last[trial.trial_id] = now
            log.info(
                "%s: %s tokens, L0 %.1f, explained variance %.3f, dead %.1f%%",
                self._name(trial),
                f"{result['tokens']:,}",
                result["l0"],
                result["explained_variance"],
                100 * result["dead_features"],
            )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        result = trial.last_result or {}
        if "refused" in result:
            log.warning("%s: refused: %s", self._name(trial), result["refused"].removeprefix("error: "))
        elif "metrics" in result:
            health = result["health"]
            log.info("%s: %s of %s metrics healthy", self._name(trial), health["healthy"], health["of"])
        else:
            log.info(
                "%s: stopped at %s tokens, it promises too little", self._name(trial), f"{result.get('tokens', 0):,}"
            )

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        log.warning("%s: failed for good: %s", self._name(trial), _last_line_of(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        log.warning("%s: failed (%s); going on from its last checkpoint", self._name(trial), _last_line_of(trial))


def _last_line_of(trial: Any) -> str:
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError, AttributeError):
        return "its machine is gone, or Ray is"
    return lines[-1][:300] if lines else "no reason given"
