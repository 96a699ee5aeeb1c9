"""One trial on a Ray worker. sae_lens_train.py and the evaluation run as processes, which end when the worker does."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.directories import finished_sae, read_metrics, write_result
from sae_toolkit.many_runs.processes import failure_reason, script_command, start_process
from sae_toolkit.many_runs.sweep.trials import Trial

_SECONDS_BETWEEN_REPORTS = 2.0
_STOP_SECONDS = 120  # time to write a checkpoint


class SweepTrial(tune.Trainable):
    """Trains and evaluates the SAE of one trial.

    A later attempt at a trial continues an earlier one: the training from its last checkpoint, or the evaluation of
    the finished SAE.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters passes `trials` and `settings`
        self, config: dict[str, Any], trials: list[Trial], settings: dict[str, Any]
    ) -> None:
        """Takes the trial with the number config["number"], and the settings that `run_trials` makes for all trials."""
        self.trial = trials[config["number"] - 1]
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.is_training = True
        self.trial.directory.mkdir(parents=True, exist_ok=True)

    def step(self) -> dict[str, Any]:
        """Waits for a short time. Returns the metrics so far, or the result where the trial has finished.

        Raises:
            RuntimeError: a process failed. Ray then makes another attempt.
        """
        if self.process is None:
            finished = finished_sae(self.trial.directory)
            if finished:
                self.sae = str(finished)
                self._start_evaluation()
            else:
                self._start_training()
        assert self.process is not None
        try:
            status = self.process.wait(_SECONDS_BETWEEN_REPORTS)
        except subprocess.TimeoutExpired:
            return self._progress()
        if status == 2:  # a mistake in the flags or the text, which would fail another attempt too
            return self._finish({"refused": failure_reason(self._log)})
        if status != 0:
            raise RuntimeError(f"exit status {status}: {failure_reason(self._log)}")
        if self.is_training:
            self.sae = self._output.read_text().strip()
            self._start_evaluation()
            return self._progress()
        return self._finish(self._evaluation())

    def _start_training(self) -> None:
        self.is_training = True
        self._start("sae_lens_train.py", *self.trial.training_flags())

    def _start_evaluation(self) -> None:
        self.is_training = False
        trusts = ["--trust_remote_code"] if self.settings["trust_remote_code"] else []
        flags = self.settings["evaluation_flags"]
        self._start("evaluate_sae_real_activations.py", "--sae_path", self.sae, *trusts, *flags)

    @property
    def _output(self) -> Path:
        return self.trial.directory / ("training.out" if self.is_training else "evaluation.out")

    @property
    def _log(self) -> Path:
        return self._output.with_suffix(".log")

    def _start(self, script: str, *flags: str) -> None:
        with self._output.open("w") as output, self._log.open("a") as log:
            self.process = start_process(
                [*script_command(script), *flags],
                output=output,
                log=log,
                cwd=self.settings["cwd"],
                OMP_NUM_THREADS=str(self.settings["cpus_per_trial"]),
                WANDB_RUN_GROUP=self.settings["name"],
            )

    def _progress(self) -> dict[str, Any]:
        """Returns the metrics for the scheduler. The evaluation leaves out `tokens`, so that it stops no trial."""
        if not self.is_training:
            return {"promise": 0.0}
        latest = self._latest_metrics()
        if latest is None:
            return {"tokens": 0, "promise": 0.0}
        return {
            "tokens": latest["details/n_training_samples"],
            "l0": latest["metrics/l0"],
            "explained_variance": latest["metrics/explained_variance"],
            "dead_features": latest["sparsity/dead_features"] / latest["d_sae"],
            "promise": _promise(latest),
        }

    def _latest_metrics(self) -> dict[str, Any] | None:
        metrics = read_metrics(self.trial.directory)
        return metrics[-1] if metrics else None

    def _evaluation(self) -> dict[str, Any]:
        summary = json.loads((Path(self.sae) / "evaluation.json").read_text())
        n_healthy = summary["health"]["healthy"] or 0
        return {
            "sae": self.sae,
            "metrics": summary["metrics"],
            "health": summary["health"],
            "n_healthy": n_healthy,
            "promise": n_healthy + 1.0,
        }

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        latest = self._latest_metrics()
        result = {"tokens": latest["details/n_training_samples"] if latest else 0, "promise": -1.0} | result
        if "metrics" in result:  # the cause of a refusal may be corrected, so a refused trial is tried again
            write_result(self.trial.directory, result | {"evaluation_flags": self.settings["evaluation_flags"]})
        return result | {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Saves nothing, since the training's own checkpoints are in the trial's directory."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        """Stops the process if it still runs. A training saves a checkpoint first."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()


def _promise(metrics: Mapping[str, Any]) -> float:
    """Returns a score in [0, 3] by which the scheduler compares unfinished trainings after the same number of tokens.

    The score is the number of healthy metrics among L0 and dead features, plus the explained variance limited to
    [0, 1], which decides between trainings with the same number.
    """
    now = {"l0": metrics["metrics/l0"], "dead_features": metrics["sparsity/dead_features"] / metrics["d_sae"]}
    n_healthy = sum(each.status(now[each.metric]) == "healthy" for each in STANDARDS if each.metric in now)
    explained = metrics["metrics/explained_variance"]
    return n_healthy + (min(max(explained, 0.0), 1.0) if math.isfinite(explained) else 0.0)
