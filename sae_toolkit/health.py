"""The published standards that a healthy SAE meets, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_toolkit.dead_features import DeadFeatureEstimates

LEAST_REPLACED_SHARE = 0.98
LEAST_SEQUENCES = 10  # with fewer, an interval drawn from them says little


@dataclass(frozen=True)
class Standard:
    """Closed ranges of one metric. Outside both it is unhealthy."""

    metric: str
    title: str
    healthy: tuple[float, float]
    borderline: tuple[float, float]

    def status(self, value: float) -> str:
        """`healthy`, `borderline` or `unhealthy`."""
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


def judge(
    metrics: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    dead: DeadFeatureEstimates,
    *,
    loss_sequences: int,
    sequences: int,
) -> dict[str, Any]:
    """Each metric's status, `healthy` (how many are) and `of` (how many there are).

    A metric is `unsettled` where the sample cannot tell its status: its 95% interval reaches into another
    status, it is an average over fewer than 10 sequences, it is no number, or dead features are too many and
    those that the sample was too small to see may make the difference. Where the SAE stood in for less than
    98% of the tokens that are not special, the measurements say too little of it: every status is `unsettled`
    and `healthy` is None.
    """
    if not metrics["replaced_share"] >= LEAST_REPLACED_SHARE:
        return {**{s.metric: "unsettled" for s in STANDARDS}, "healthy": None, "of": len(STANDARDS)}
    enough = {"loss_recovered": loss_sequences >= LEAST_SEQUENCES, "l0": sequences >= LEAST_SEQUENCES}
    statuses = {}
    for standard in STANDARDS:
        value = metrics[standard.metric]
        could_be = [*intervals.get(standard.metric, ()), value]
        if standard.metric == "dead_features":
            could_be.append(dead.expected_in_the_long_run)
        seen = {standard.status(v) for v in could_be}
        settled = len(seen) == 1 and enough.get(standard.metric, True) and not math.isnan(value)
        if standard.metric == "dead_features" and standard.status(value) == "healthy":
            settled = True  # more tokens only find more of them alive
        statuses[standard.metric] = standard.status(value) if settled else "unsettled"
    return {**statuses, "healthy": list(statuses.values()).count("healthy"), "of": len(STANDARDS)}
