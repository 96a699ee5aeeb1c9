"""Searches the sparsity penalty with which a training ends at its target L0, from one whole training to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sae_toolkit.many_runs.comparison.contenders import Entry
from sae_toolkit.many_runs.directories import read_result

MAX_TRIALS = 4
TOLERANCE = 0.1  # a search ends at an L0 that is so near to its target, as a ratio


def distance(l0: float, target: float) -> float:
    """Returns by how much an L0 is off its target, as the logarithm of their ratio, without its sign."""
    return abs(math.log(max(l0, 1e-3) / target))


def tried_before(entry: Entry) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Returns penalty and L0 of all earlier trainings of the same kind, whatever their target L0 and seed.

    First those with the same learning rate, then those with others, each training once: the results of two searches
    can hold the same earlier one.
    """
    same: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    kind = entry.directory.name.partition("-l0_")[0]
    for path in sorted(entry.directory.parent.glob(f"dictionary_learning-{entry.contender.architecture}-*")):
        of_rate = same if path.name.startswith(f"{kind}-l0_") else others
        of_rate += [(penalty, l0) for penalty, l0 in (read_result(path) or {}).get("tried", [])]
    return list(dict.fromkeys(same)), list(dict.fromkeys(others))


def next_penalty(
    tried: Sequence[tuple[float, float]],
    target: float,
    first: float,
    elsewhere: Sequence[tuple[float, float]] = (),
    own: Sequence[tuple[float, float]] = (),
) -> float:
    """Returns the sparsity penalty to try next, read off a line of log penalty over log L0 at the target.

    The line goes through the trial with the L0 nearest to the target. If that is within 3% of the target, its penalty
    is tried as it is. The slope comes from the next nearest trial that fits it, with a lower L0 at a higher penalty.
    If there is none, it comes from `elsewhere` in the same way, and else is -1. It is limited to [-3, -0.2]. Trainings
    that collapsed do not count: those with a lower L0 at a lower penalty than another.

    A penalty that the search itself has tried is not tried again: where L0 does not fall with the penalty, or is far
    from that of other seeds, the search goes on from its own nearest trial, by further steps of the same size, each to
    between half and twice the penalty.

    Args:
        tried: pairs of penalty and L0.
        target: the L0 that is wanted.
        first: the penalty to begin with.
        elsewhere: pairs of penalty and L0 with other learning rates, where the search begins if `tried` is empty.
        own: the pairs among `tried` that this search has trained, none of them near enough to the target to end it.
    """
    same, others = (_nearest_first(_not_collapsed(trials), target) for trials in (tried, elsewhere))
    points = same or others
    if not points:
        return first
    slope = min(max(_slope(points) or _slope(others) or -1.0, -3.0), -0.2)

    def step_from(point: tuple[float, float]) -> float:
        return slope * (math.log(target) - point[0])

    fits = bool(same) and abs(same[0][0] - math.log(target)) <= math.log(1.03)
    proposed = points[0][1] + (0 if fits else step_from(points[0]))
    if own and _is_among(proposed, own):
        nearest_own = _nearest_first(own, target)[0]
        step = min(max(step_from(nearest_own), -math.log(2)), math.log(2))
        proposed = nearest_own[1] + step
        while _is_among(proposed, own):
            proposed += step
    return math.exp(proposed)


def _not_collapsed(tried: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the trials without those that have both a lower penalty and a lower L0 than another."""
    return [one for one in tried if not any(penalty > one[0] and l0 > one[1] for penalty, l0 in tried)]


def _is_among(log_penalty: float, tried: Sequence[tuple[float, float]]) -> bool:
    return any(abs(math.log(penalty) - log_penalty) < 0.01 for penalty, _ in tried)


def _nearest_first(tried: Sequence[tuple[float, float]], target: float) -> list[tuple[float, float]]:
    """Returns log L0 and log penalty of each trial, that with the L0 nearest to the target first."""
    points = {(math.log(max(l0, 1e-3)), math.log(penalty)) for penalty, l0 in tried}
    return sorted(points, key=lambda point: (abs(point[0] - math.log(target)), point))


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns the slope from the first point to the next with which it falls; None if there is no such point."""
    for l0, penalty in points[1:]:
        run, rise = l0 - points[0][0], penalty - points[0][1]
        if abs(run) > 0.05 and rise * run < 0:
            return rise / run
    return None
