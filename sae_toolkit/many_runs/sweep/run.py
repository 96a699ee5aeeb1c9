"""Runs the trials of a sweep on Ray Tune, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import signal
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
from sae_toolkit.many_runs.directories import read_result
from sae_toolkit.many_runs.sweep.trials import Trial
from sae_toolkit.many_runs.sweep.worker import SweepTrial
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.terminal.stop_signals import TERMINATIONS

log = logging.getLogger(__name__)

# The path of a socket has at most 107 bytes, 103 on macOS. This is what Ray adds to the path of its directory.
_LONGEST_SOCKET, _SOCKET_OF_RAY = 103, "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
_SHORT_TEMPORARY_DIRECTORY = "/tmp"

_MAX_FAILURES = 3  # of a trial; after each, another attempt continues from its last checkpoint
_SECONDS_BETWEEN_LINES = 20.0
_EVALUATED_KEYS = ("sae", "metrics", "health", "n_healthy")


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connects to a Ray cluster, or starts Ray on this machine alone and shuts it down at the end.

    Args:
        address: address of the cluster, `auto` or host:port; None for this machine alone.

    Raises:
        UserError: the cluster cannot be reached, or Ray cannot be started on this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a trial where anything else runs
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each training keeps its own log
    if address is not None:
        _check_address(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            _temp_dir=ray_directory(os.environ) if address is None else None,
        )
    except ray.exceptions.AuthenticationError:
        raise UserError(
            f"--address {address}: the cluster needs the token of its head (~/.ray/auth_token): set RAY_AUTH_MODE=token"
        ) from None
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address is None:
            raise UserError(
                f"Ray cannot be started on this machine: {one_line(error)}; its files are in TMPDIR, and RAY_TMPDIR"
                " can name another directory"
            ) from None
        raise UserError(f"--address {address}: no Ray cluster can be reached there: {one_line(error)}") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # `_TrialLog` reports failures
    with _termination_as_interrupt():
        try:
            yield
        finally:
            ray.shutdown()


def ray_directory(environment: Mapping[str, str]) -> str | None:
    """Returns the directory for Ray's own files if its usual one is too long for the sockets in it, and otherwise None.

    Temporary directories of schedulers and of macOS often are too long.

    Args:
        environment: the variables of the environment. RAY_TMPDIR or TMPDIR names the usual directory.

    Raises:
        UserError: no other directory can be written to.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environment.get(name)), None)
    if variable is None or len(os.fsencode(f"{environment[variable]}/ray{_SOCKET_OF_RAY}")) <= _LONGEST_SOCKET:
        return None
    if not os.access(_SHORT_TEMPORARY_DIRECTORY, os.W_OK):
        raise UserError(
            f"{variable} {environment[variable]}: too long for the sockets of Ray, and {_SHORT_TEMPORARY_DIRECTORY}"
            " cannot be written to; set RAY_TMPDIR to a directory with a path of at most 30 characters"
        )
    log.info("%s is too long for the sockets of Ray, which are in %s", variable, f"{_SHORT_TEMPORARY_DIRECTORY}/ray")
    return f"{_SHORT_TEMPORARY_DIRECTORY}/ray"


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM and the like into SIGINT (Ctrl-C), for which Ray Tune stops its trials."""
    previous = {
        number: signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        for number in TERMINATIONS
        if signal.getsignal(number) != signal.SIG_IGN  # `nohup` ignores SIGHUP
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_address(address: str) -> None:
    """Raises a UserError for an address without a cluster. Ray itself would try to connect for minutes."""
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
            " machine prints the address"
        ) from None


def run_trials(
    trials: Sequence[Trial],
    directory: Path,
    *,
    name: str,
    cpus_per_trial: int,
    gpus_per_trial: float | None,
    early_stop: bool,
    evaluation_flags: Sequence[str],
    trust_remote_code: bool,
) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Trains and evaluates all trials, except those that an earlier call has finished.

    Args:
        trials: from `make_trials`.
        directory: the directory of the sweep.
        name: the group of the trials' wandb runs.
        cpus_per_trial: cores for each trial.
        gpus_per_trial: GPUs for each trial. Several trials share a GPU if this is a fraction. None means one GPU if
            this machine has any, and otherwise no GPU.
        early_stop: whether ASHA stops a trial that is less promising than half of the trials that have trained on as
            many tokens.
        evaluation_flags: further flags of evaluate_sae_real_activations.py. A finished trial that was evaluated with
            others is evaluated again.
        trust_remote_code: whether evaluations run the Python code that comes with the model.

    Returns:
        Each trial with its outcome. An evaluated trial has `sae`, `metrics`, `health` and `n_healthy`. Any other trial
        has one of `refused` (the reason), `failed` (the reason) and `stopped` (the number of tokens after which the
        scheduler stopped it).

    Raises:
        UserError: no machine of the cluster has the cores and GPUs that a trial needs.
        KeyboardInterrupt: the sweep was stopped; the same call continues it.
    """
    if gpus_per_trial is None:
        gpus_per_trial = 1.0 if torch.cuda.is_available() else 0.0
    _check_resources(cpus_per_trial, gpus_per_trial)
    # Finished trials are left out, because a scheduler would compare the others with them.
    outcomes = {
        trial.number: {key: result[key] for key in _EVALUATED_KEYS}
        for trial in trials
        if (result := read_result(trial.directory)) and result.get("evaluation_flags") == list(evaluation_flags)
    }
    unfinished = [trial.number for trial in trials if trial.number not in outcomes]
    if unfinished:
        settings = {
            "name": name,
            "cwd": str(Path.cwd()),
            "cpus_per_trial": cpus_per_trial,
            "evaluation_flags": list(evaluation_flags),
            "trust_remote_code": trust_remote_code,
        }
        trainable = tune.with_resources(
            tune.with_parameters(SweepTrial, trials=list(trials), settings=settings),
            {"cpu": cpus_per_trial, "gpu": gpus_per_trial},
        )
        outcomes |= _run(trials, unfinished, trainable, _scheduler(trials) if early_stop else None, directory / "ray")
    return [(trial, outcomes[trial.number]) for trial in trials]


def _run(
    trials: Sequence[Trial], numbers: Sequence[int], trainable: Any, scheduler: ASHAScheduler | None, directory: Path
) -> dict[int, dict[str, Any]]:
    """Runs the trials with these numbers on Ray Tune, and returns the outcome of each."""
    started, trial_log = time.monotonic(), _TrialLog(trials)
    tuner = tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(list(numbers))},
        tune_config=tune.TuneConfig(
            metric="promise", mode="max", scheduler=scheduler, trial_dirname_creator=lambda trial: trial.trial_id
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(directory.absolute()),
            failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            callbacks=[trial_log],
            verbose=0,
        ),
    )
    results = tuner.fit()
    if len(trial_log.ended) < len(numbers):
        log.warning("stopped; the same command continues the sweep")
        raise KeyboardInterrupt
    log.info("the trials took %s", f"{time.monotonic() - started:,.0f} s")
    return {(each.config or {})["number"]: _outcome(each) for each in (results[i] for i in range(len(results)))}


def _scheduler(trials: Sequence[Trial]) -> ASHAScheduler:
    """Returns a scheduler that may stop a trial after a quarter and after half of its tokens, but not later."""
    tokens = max(parse_training_flags(trial.flags).optimization.training_tokens for trial in trials)
    return ASHAScheduler(
        time_attr="tokens",
        grace_period=max(1, tokens // 4),
        max_t=max(2, tokens * 9 // 10),
        reduction_factor=2,
        stop_last_trials=False,
    )


def _outcome(result: tune.Result) -> dict[str, Any]:
    if result.error:
        return {"failed": str(result.error).strip().rpartition("\n")[2][:300]}
    metrics = result.metrics or {}
    if "refused" in metrics:
        return {"refused": metrics["refused"]}
    if "metrics" in metrics:
        return {key: metrics[key] for key in _EVALUATED_KEYS}
    return {"stopped": metrics.get("tokens", 0)}


def _check_resources(cpus: int, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(
            f"--cpus_per_trial {cpus} --gpus_per_trial {gpus:g}: no machine has as many; there are {there}; lower them"
        )


class _TrialLog(tune.Callback):
    """Logs the progress and the end of each trial. `ended` holds the numbers of the trials that have ended."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.ended: set[int] = set()
        self._last: dict[str, float] = {}

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
            tokens = f"{result.get('tokens', 0):,}"
            log.info("%s: stopped early after %s tokens, less promising than others", self._name(trial), tokens)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        log.warning("%s: failed, and is not tried again: %s", self._name(trial), _error_of(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        log.warning("%s: failed (%s); going on from its last checkpoint", self._name(trial), _error_of(trial))


def _error_of(trial: Any) -> str:
    """Returns the last line of the error that Ray recorded for one of its trials."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError, AttributeError):
        return "its machine, or Ray on that machine, is gone"
    return lines[-1][:300] if lines else "no reason given"
