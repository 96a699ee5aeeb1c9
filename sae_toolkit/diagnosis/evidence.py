"""`Evidence`, which the diagnosis examines, and `Finding`, a cause that it found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_toolkit.diagnosis.history import TrainingHistory
from sae_toolkit.diagnosis.probes import Probes
from sae_toolkit.evaluation.health import STANDARDS, Standard
from sae_toolkit.settings.evaluation import EvaluationSettings

# The fields of an SAE's metadata that the causes read.
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
    """One cause that was found.

    Args:
        cause: name of the cause, in a few words.
        metrics: health metrics that it makes unhealthy.
        says: one line with the measurements that show the cause.
        flags: what to change, as words of a command line; at most three flags.
        effect: estimated share of the problem that this cause explains, in [0, 1].
        of_training: whether `flags` belong to the training; if not, they belong to the evaluation.
        leave_out: names of flags of the evaluation that were given and should not be.
    """

    cause: str
    metrics: tuple[str, ...]
    says: str
    flags: tuple[str, ...]
    effect: float
    of_training: bool = True
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Everything that the diagnosis examines.

    Args:
        summary: content of evaluation.json.
        probes: measurements made for the diagnosis.
        metadata: the fields of the SAE's cfg.json that `METADATA` lists.
        history: history of the training; None if no run of this project trained the SAE.
        sae_name: what --sae_path takes for the SAE.
        evaluation: settings of the evaluation.
    """

    summary: Mapping[str, Any]
    probes: Probes
    metadata: Mapping[str, Any]
    history: TrainingHistory | None
    sae_name: str
    evaluation: EvaluationSettings

    @property
    def unhealthy(self) -> tuple[str, ...]:
        """The health metrics that are not healthy, unsettled ones included."""
        return tuple(metric for metric in ALL_METRICS if self.summary["health"][metric] != "healthy")

    @property
    def metrics(self) -> Mapping[str, float]:
        """All metrics by name, with NaN where evaluation.json has null."""
        return {name: math.nan if value is None else value for name, value in self.summary["metrics"].items()}

    @property
    def d_sae(self) -> int:
        return self.summary["sae"]["d_sae"]

    @property
    def d_in(self) -> int:
        return self.summary["sae"]["d_in"]

    def flag(self, name: str) -> Any:
        """Returns the value of a flag of the training; None if there is no history."""
        return None if self.history is None else self.history.settings.as_flags()[name]

    def by_flag(self, name: str) -> bool:
        """Whether a flag of the evaluation, and not the SAE's record, gave one of the `sources`."""
        return self.summary["sources"].get(name) == "flag"

    @property
    def architecture(self) -> str:
        """Architecture during the training. The saved one can differ: a BatchTopK SAE is saved as a JumpReLU SAE."""
        return self.metadata.get("training_architecture") or self.summary["sae"]["architecture"]


def standard_of(metric: str) -> Standard:
    """Returns the standard of a health metric."""
    return next(standard for standard in STANDARDS if standard.metric == metric)


def outside(value: float, low: float, high: float) -> float:
    """Returns how far a value lies outside a range: 1 - high / value above it, 1 - value / low below it."""
    return 1 - high / value if value > high else 1 - value / low


def percent(value: float) -> str:
    """Returns a share as a percentage, or as a plain number if it is 10 or more in magnitude."""
    return f"{value:.1%}" if abs(value) < 10 else f"{value:.2g}"


def titles(metrics: Sequence[str]) -> str:
    """Returns the titles of health metrics, as part of a sentence."""
    return ", ".join(standard_of(metric).title.lower() for metric in metrics)
