"""The published standards of a healthy SAE, and the function that judges an SAE by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates

LEAST_REPLACED_SHARE = 0.98
LEAST_SEQUENCES = 10  # an interval from fewer sequences is unreliable


@dataclass(frozen=True)
class Standard:
    """The closed ranges of one metric that are healthy and borderline; a value outside both is unhealthy."""

    metric: str
    title: str
    healthy: tuple[float, float]
    borderline: tuple[float, float]

    def status(self, value: float) -> str:
        """Returns `healthy`, `borderline` or `unhealthy`."""
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
    """Returns the status of each metric; `healthy`, the number of healthy metrics; and `of`, the number of metrics.

    A metric is `unsettled` if the sample cannot tell its status:

    - its 95% interval reaches into another status, or could not be computed;
    - it is measured on fewer than 10 sequences;
    - it is not finite;
    - it is the share of dead features, this is not healthy, and there are so few tokens that unseen rare features could
      change the status. A healthy share is settled on any number of tokens, since with more tokens it can only fall.

    If the SAE replaced the activations of less than 98% of the tokens that are not special, these tokens are
    too few to judge it: every status is `unsettled` and `healthy` is None.

    Args:
        metrics: values by name, with `replaced_share`.
        intervals: 95% intervals [low, high] by name, of the metrics that have one.
        dead: estimates about the features that never fired.
        loss_sequences: number of sequences that the losses are measured on.
        sequences: number of sequences that the other metrics are measured on.
    """
    if not metrics["replaced_share"] >= LEAST_REPLACED_SHARE:
        return {**{s.metric: "unsettled" for s in STANDARDS}, "healthy": None, "of": len(STANDARDS)}
    n_sequences = {"loss_recovered": loss_sequences, "l0": sequences, "dead_features": sequences}
    statuses = {}
    for standard in STANDARDS:
        metric, value = standard.metric, metrics[standard.metric]
        low, high = intervals.get(metric, (value, value))
        if metric == "dead_features":
            low = dead.expected_in_the_long_run
        inside = [end for end in (*standard.healthy, *standard.borderline) if low < end < high]
        possible = {standard.status(v) for v in (low, value, high, *inside)}
        settled = len(possible) == 1 and n_sequences.get(metric, math.inf) >= LEAST_SEQUENCES
        if metric in ("loss_recovered", "l0"):
            settled &= metric in intervals
        if metric == "dead_features":
            settled &= dead.tokens >= dead.tokens_to_settle
            settled |= standard.status(value) == "healthy"
        statuses[metric] = standard.status(value) if settled and math.isfinite(value) else "unsettled"
    return {**statuses, "healthy": list(statuses.values()).count("healthy"), "of": len(STANDARDS)}
