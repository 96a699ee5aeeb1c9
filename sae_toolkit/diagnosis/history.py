"""The history of an SAE's training: its flags, its learning curve, and how each feature fired and changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.errors import UserError, is_out_of_memory
from sae_toolkit.files.names import FLAGS_FILENAME, METRICS_FILENAME
from sae_toolkit.model.devices import random_states_restored
from sae_toolkit.saes.checkpoints import load_steps_since_fired
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.training.configuration import build_runner_config
from sae_toolkit.training.directory import find_run_directory
from sae_toolkit.training.run import create_sae

_LEAST_READINGS = 8  # for the fit of a learning curve


@dataclass(frozen=True)
class TrainingHistory:
    """The history of one SAE's training.

    Args:
        directory: directory of the run.
        settings: settings of the run.
        n_steps: number of steps of the run.
        readings: SAELens's metrics, one mapping for each recorded step; empty if the run recorded none.
        steps_since_fired_F: at the end of the run, the number of steps since each feature last fired, [F]; None if it
            is not recorded. For a feature that never fired it is the number of steps of the run.
        turned_F: cosine similarity between each decoder vector after the training and its initial value, [F], in
            [-1, 1]; None if the initial values are not random, or not known.
    """

    directory: Path
    settings: TrainingSettings
    n_steps: int
    readings: Sequence[Mapping[str, float]]
    steps_since_fired_F: torch.Tensor | None
    turned_F: torch.Tensor | None

    @property
    def full_rate_steps(self) -> tuple[int, int]:
        """The first and the last step with the full learning rate."""
        optimization = self.settings.optimization
        return optimization.lr_warm_up_steps, self.n_steps - optimization.lr_decay_steps

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and unexplained variance, [N] each, from the second half of the steps at the full rate."""
        first, last = self.full_rate_steps
        points = [
            (reading["details/n_training_samples"], 1 - reading["metrics/explained_variance"])
            for reading in self.readings
            if (first + last) / 2 <= reading["step"] <= last
        ]
        points = [(tokens, unexplained) for tokens, unexplained in points if unexplained > 0]
        return np.array([p[0] for p in points]), np.array([p[1] for p in points])

    def gain_of_doubling(self) -> float | None:
        """Returns the share of the unexplained variance that twice the tokens would explain, at most 1.

        A power law that is fitted to `curve` extrapolates it. None if there are too few readings.
        """
        tokens, unexplained = self.curve()
        if len(tokens) < _LEAST_READINGS:
            return None
        slope = np.polyfit(np.log2(tokens), np.log2(unexplained), 1)[0]
        return 1 - 2.0**slope


def load_history(sae_path: Path, sae: SAE[Any]) -> TrainingHistory | None:
    """Loads the history of an SAE's training; None if no run of this project wrote the SAE.

    Args:
        sae_path: directory of the SAE.
        sae: the SAE.
    """
    directory = find_run_directory(sae_path)
    if directory is None:
        return None
    try:
        settings = TrainingSettings.from_flags(json.loads((directory / FLAGS_FILENAME).read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # such as JSON that is not an object
        return None
    optimization, seed = settings.optimization, sae.cfg.metadata.get("seed")
    if isinstance(seed, int):  # one of several seeds of the run
        settings, name = replace(settings, optimization=replace(optimization, seed=seed)), f"seed_{seed}"
    else:
        name = sae.cfg.metadata.hook_name
    steps_since_fired_F = load_steps_since_fired(sae_path)
    if steps_since_fired_F is not None and len(steps_since_fired_F) != sae.cfg.d_sae:
        steps_since_fired_F = None
    return TrainingHistory(
        directory=directory,
        settings=settings,
        n_steps=math.ceil(optimization.training_tokens / optimization.train_batch_size_tokens),
        readings=_readings(directory / METRICS_FILENAME, name),
        steps_since_fired_F=steps_since_fired_F,
        turned_F=_turned(settings, sae),
    )


def _readings(path: Path, sae_name: str) -> list[dict[str, float]]:
    """Returns the metrics that a run recorded for one SAE, a mapping for each step; empty without a readable file."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    of_sae = [{name.removeprefix(f"{sae_name}/"): value for name, value in line.items()} for line in lines]
    needed = {"metrics/explained_variance", "details/n_training_samples"}
    return [reading for reading in of_sae if needed <= reading.keys()]


def _turned(settings: TrainingSettings, sae: SAE[Any]) -> torch.Tensor | None:
    """Returns `TrainingHistory.turned_F`.

    This creates the initial weights again from the seed. The same seed gives the same weights only on the same kind of
    device (CPU or CUDA), so this uses the kind that the run used.
    """
    if settings.sae.init_from is not None:
        return None
    trained_on, has_gpu = settings.model.device, torch.cuda.is_available()
    device = "cuda" if trained_on.startswith("cuda") or (trained_on == "auto" and has_gpu) else "cpu"
    if device == "cuda" and not has_gpu:
        return None
    try:
        cfg = build_runner_config(
            settings, sae.cfg.metadata.hook_name, d_in=sae.cfg.d_in, device=device, run_id="begin"
        )
        with random_states_restored(device):
            began_FD = create_sae(cfg).W_dec.detach().float().cpu()
    except UserError:  # settings that do not fit the SAE's width
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    ended_FD = sae.W_dec.detach().float().cpu()
    if began_FD.shape != ended_FD.shape:
        return None
    return torch.cosine_similarity(began_FD, ended_FD, dim=-1)
