"""What there is to tell an unhealthy SAE's causes by, and what a cause that was found says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_toolkit.diagnosis.history import TrainingHistory
from sae_toolkit.evaluation.health import STANDARDS, Standard
from sae_toolkit.evaluation.probes import Probes

# What of an SAE's metadata tells of its training.
METADATA = (
    "model_name",
    "hook_name",
    "training_architecture",
    "training_architecture_details",
    "median_activation_norm",
)
ALL_METRICS = tuple(standard.metric for standard in STANDARDS)


@dataclass(frozen=True)
class Finding:
    """One cause.

    Args:
        cause: in a few words.
        metrics: that it makes unhealthy.
        says: what the measurements say, in a line.
        flags: what to change, as words of a command line; at most three flags.
        of_training: whether they are flags of the training; else of the evaluation.
        effect: share of the trouble that is due to it, in [0, 1].
    """

    cause: str
    metrics: tuple[str, ...]
    says: str
    flags: tuple[str, ...]
    effect: float
    of_training: bool = True


@dataclass(frozen=True)
class Evidence:
    """What there is to tell causes by.

    Args:
        summary: the content of evaluation.json.
        probes: measured for the diagnosis.
        metadata: what the SAE says of its training (cfg.json).
        history: what the run left; None where no run of this project trained the SAE.
    """

    summary: Mapping[str, Any]
    probes: Probes
    metadata: Mapping[str, Any]
    history: TrainingHistory | None

    @property
    def unhealthy(self) -> tuple[str, ...]:
        """The metrics that are not healthy, unsettled ones included."""
        return tuple(metric for metric in ALL_METRICS if self.summary["health"][metric] != "healthy")

    @property
    def metrics(self) -> Mapping[str, float]:
        return {name: math.nan if value is None else value for name, value in self.summary["metrics"].items()}

    @property
    def d_sae(self) -> int:
        return self.summary["sae"]["d_sae"]

    @property
    def d_in(self) -> int:
        return self.summary["sae"]["d_in"]

    def flag(self, name: str) -> Any:
        return None if self.history is None else self.history.settings.as_flags()[name]

    @property
    def architecture(self) -> str:
        """That it was trained as; saved, a BatchTopK is a JumpReLU."""
        return self.metadata.get("training_architecture") or self.summary["sae"]["architecture"]


def standard_of(metric: str) -> Standard:
    return next(standard for standard in STANDARDS if standard.metric == metric)


def outside(value: float, low: float, high: float) -> float:
    """How far a value lies outside a range, as a share of the way to nothing or to everything."""
    return 1 - high / value if value > high else 1 - value / low


def percent(value: float) -> str:
    return f"{value:.1%}" if abs(value) < 10 else f"{value:.2g}"


def titles(metrics: Sequence[str]) -> str:
    return ", ".join(standard_of(metric).title.lower() for metric in metrics)
