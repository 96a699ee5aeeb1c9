"""The published standards that a healthy SAE meets, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST_REPLACED_SHARE = 0.98


@dataclass(frozen=True)
class Standard:
    """Closed ranges of one metric. Outside both it is unhealthy."""

    metric: str
    title: str
    healthy: tuple[float, float]
    borderline: tuple[float, float]

    def status(self, value: float) -> str:
        """`healthy`, `borderline` or `unhealthy`; a value that is no number is unhealthy."""
        for status, (low, high) in (("healthy", self.healthy), ("borderline", self.borderline)):
            if low <= value <= high:
                return status
        return "unhealthy"


STANDARDS = (
    Standard("loss_recovered", "Loss recovered", (0.70, math.inf), (0.60, 0.70)),
    Standard("l0", "L0", (40, 120), (20, 200)),
    Standard("dead_features", "Dead features", (0, 0.10), (0.10, 0.20)),
    Standard("decoder_absorption", "Decoder absorption", (-1, 0.25), (0.25, 0.35)),
)


def judge(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Each metric's status, `healthy` (how many are) and `of` (how many there are).

    Where the SAE stood in for less than 98% of the tokens that are not special, the measurements say too
    little of it: every status is `unsettled` and `healthy` is None.
    """
    if not metrics["replaced_share"] >= LEAST_REPLACED_SHARE:
        return {**{s.metric: "unsettled" for s in STANDARDS}, "healthy": None, "of": len(STANDARDS)}
    statuses = {s.metric: s.status(metrics[s.metric]) for s in STANDARDS}
    return {**statuses, "healthy": list(statuses.values()).count("healthy"), "of": len(STANDARDS)}
