"""One trial on a Ray worker: sae_lens_train.py and the evaluation, each as a process of its own that dies with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from ray import tune

from sae_toolkit.many_runs.processes import finished_sae, last_line_of, readings_of, script, start_process, write_result
from sae_toolkit.many_runs.sweep.trials import Trial, promise

_SECONDS_BETWEEN_REPORTS = 2.0
_STOP_SECONDS = 120  # for a checkpoint to be written


class SweepTrial(tune.Trainable):
    """Trains and evaluates the SAE of one trial. It goes on where an earlier attempt at the trial ended: training from
    its last checkpoint, evaluation from the finished SAE.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters gives the others
        self, config: dict[str, Any], trials: list[Trial], settings: dict[str, Any]
    ) -> None:
        """Takes the trial of config["number"], from 1; `settings` are those that `run_trials` makes for all."""
        self.trial = trials[config["number"] - 1]
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.is_training = True
        self.trial.directory.mkdir(parents=True, exist_ok=True)

    def step(self) -> dict[str, Any]:
        """Waits a little; the metrics as they stand, or at the end what the trial came to."""
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
        if status == 2:  # a mistake in its flags or text, which another attempt would make again
            return self._finish({"refused": last_line_of(self._log)})
        if status != 0:
            raise RuntimeError(f"exit status {status}: {last_line_of(self._log)}")
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
        self._start("evaluate_sae_real_activations.py", "--sae_path", self.sae, *self.settings["evaluation_flags"])

    @property
    def _output(self) -> Path:
        return self.trial.directory / ("training.out" if self.is_training else "evaluation.out")

    @property
    def _log(self) -> Path:
        return self._output.with_suffix(".log")

    def _start(self, name: str, *flags: str) -> None:
        with self._output.open("w") as output, self._log.open("a") as log:
            self.process = start_process(
                [*script(name), *flags],
                output=output,
                log=log,
                cwd=self.settings["cwd"],
                OMP_NUM_THREADS=str(self.settings["cpus_per_trial"]),
                WANDB_RUN_GROUP=self.settings["name"],
            )

    def _progress(self) -> dict[str, Any]:
        """What a scheduler can compare; it does so by tokens, which are left out while the SAE is evaluated."""
        if not self.is_training:
            return {"promise": 0.0}
        reading = self._reading()
        if reading is None:
            return {"tokens": 0, "promise": 0.0}
        return {
            "tokens": reading["details/n_training_samples"],
            "l0": reading["metrics/l0"],
            "explained_variance": reading["metrics/explained_variance"],
            "dead_features": reading["sparsity/dead_features"] / reading["d_sae"],
            "promise": promise(reading, reading["d_sae"]),
        }

    def _reading(self) -> dict[str, Any] | None:
        readings = readings_of(self.trial.directory)
        return readings[-1] if readings else None

    def _evaluation(self) -> dict[str, Any]:
        summary = json.loads((Path(self.sae) / "evaluation.json").read_text())
        return {
            "sae": self.sae,
            "metrics": summary["metrics"],
            "health": summary["health"],
            "n_healthy": summary["health"]["healthy"] or 0,
            "promise": (summary["health"]["healthy"] or 0) + 1.0,
        }

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        reading = self._reading()
        result = {"tokens": reading["details/n_training_samples"] if reading else 0, "promise": -1.0} | result
        if "metrics" in result:  # a refusal may be mended, and is tried again
            write_result(self.trial.directory, result)
        return result | {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: what an attempt leaves lies in the trial's directory, with the training's own checkpoints."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        """Stops what runs, which saves a checkpoint first."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
