"""What a run left of its training: its flags, its learning curve, and what became of each feature."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.errors import UserError
from sae_toolkit.files.names import FLAGS_FILENAME, METRICS_FILENAME
from sae_toolkit.saes.checkpoints import load_steps_since_fired
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.training.configuration import build_runner_config
from sae_toolkit.training.run import create_sae

_LEAST_READINGS = 8  # that a curve is fitted to


@dataclass(frozen=True)
class TrainingHistory:
    """One SAE's training.

    Args:
        directory: of the run.
        settings: of the run.
        n_steps: how many it took.
        readings: SAELens's, by step, with `n_training_samples`; empty where the run recorded none.
        steps_since_fired_F: for how many steps each feature had been silent at the end, [F]; None where that is not on
            record. A feature that was silent for all of them never fired.
        turned_F: cosine of each decoder vector to the one that it began as, [F]; None where that cannot be told.
    """

    directory: Path
    settings: TrainingSettings
    n_steps: int
    readings: Sequence[Mapping[str, float]]
    steps_since_fired_F: torch.Tensor | None
    turned_F: torch.Tensor | None

    @property
    def full_rate_steps(self) -> tuple[int, int]:
        """The first and the last step at the full learning rate."""
        optimization = self.settings.optimization
        return optimization.lr_warm_up_steps, self.n_steps - optimization.lr_decay_steps

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and unexplained variance over the second half of the steps at the full learning rate."""
        first, last = self.full_rate_steps
        points = [
            (reading["details/n_training_samples"], 1 - reading["metrics/explained_variance"])
            for reading in self.readings
            if (first + last) / 2 <= reading["step"] <= last
        ]
        points = [(tokens, unexplained) for tokens, unexplained in points if unexplained > 0]
        return np.array([p[0] for p in points]), np.array([p[1] for p in points])

    def gain_of_doubling(self) -> float | None:
        """By what share the unexplained variance would fall with twice the tokens, as the curve goes at its end: that
        of a power law through its second half. None where there are too few readings.
        """
        tokens, unexplained = self.curve()
        if len(tokens) < _LEAST_READINGS:
            return None
        slope = np.polyfit(np.log2(tokens), np.log2(unexplained), 1)[0]
        return 1 - 2.0**slope


def load_history(sae_path: Path, sae: SAE[Any]) -> TrainingHistory | None:
    """The history of the run that wrote an SAE; None where no run of this project did.

    Args:
        sae_path: its directory.
        sae: itself, as it was loaded.
    """
    above = sae_path.absolute().parents[:2]  # one of several hooks lies a step deeper
    directory = next((parent for parent in above if (parent / FLAGS_FILENAME).is_file()), None)
    if directory is None:
        return None
    try:
        settings = TrainingSettings.from_flags(json.loads((directory / FLAGS_FILENAME).read_text()))
    except (OSError, ValueError, TypeError, AttributeError):  # AttributeError: JSON, and no object
        return None
    optimization = settings.optimization
    steps_since_fired_F = load_steps_since_fired(sae_path)
    if steps_since_fired_F is not None and len(steps_since_fired_F) != sae.cfg.d_sae:
        steps_since_fired_F = None
    return TrainingHistory(
        directory=directory,
        settings=settings,
        n_steps=math.ceil(optimization.training_tokens / optimization.train_batch_size_tokens),
        readings=_readings(directory / METRICS_FILENAME, sae.cfg.metadata.hook_name),
        steps_since_fired_F=steps_since_fired_F,
        turned_F=_turned(settings, sae),
    )


def _readings(path: Path, hook_name: str) -> list[dict[str, float]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        of_hook = {name.removeprefix(f"{hook_name}/"): value for name, value in line.items()}  # of several
        if "metrics/explained_variance" in of_hook and "details/n_training_samples" in of_hook:
            found.append(of_hook)
    return found


def _turned(settings: TrainingSettings, sae: SAE[Any]) -> torch.Tensor | None:
    """The weights that a run began with follow from its seed, on the kind of device that it ran on."""
    trained_on = settings.model.device
    if trained_on.startswith("cuda") or (trained_on == "auto" and torch.cuda.is_available()):
        device = "cuda" if torch.cuda.is_available() else None
    else:
        device = "cpu"
    if device is None:
        return None
    try:
        cfg = build_runner_config(
            settings, sae.cfg.metadata.hook_name, d_in=sae.cfg.d_in, device=device, run_id="begin"
        )
        with torch.random.fork_rng():
            began_FD = create_sae(cfg).W_dec.detach().float().cpu()
    except (UserError, torch.OutOfMemoryError):  # such as pretrained weights that are gone
        return None
    ended_FD = sae.W_dec.detach().float().cpu()
    if began_FD.shape != ended_FD.shape:
        return None
    return torch.cosine_similarity(began_FD, ended_FD, dim=-1)
