"""Which contender recovers most of the loss at each target L0, and by how much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from sae_toolkit.many_runs.comparison.contenders import Contender, Outcome
from sae_toolkit.many_runs.page import Table

_L0_TOLERANCE = 0.03  # an L0 that is further off the target is not the same L0


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95% interval.

    Args:
        mean: the mean.
        half_width: half of the width of the interval; None for one seed.
    """

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Returns the mean of values, one for each seed, with the 95% interval of Student's t distribution."""
        if len(values) < 2:
            return cls(values[0], None)
        t = stats.t.ppf(0.975, len(values) - 1)
        return cls(statistics.mean(values), float(t * statistics.stdev(values) / math.sqrt(len(values))))


@dataclass(frozen=True)
class Place:
    """The place of a contender at one target L0.

    Args:
        contender: the kind of SAE.
        l0: the target L0.
        loss_recovered: the share of the loss that is recovered.
        difference: how much more it recovers than the best of the others, on seeds that both have; None if there is no
            other, or no seed that both have.
        measured_l0: the mean L0 over the seeds.
        seeds: number of seeds that were measured, and of those that there are.
    """

    contender: Contender
    l0: int
    loss_recovered: Estimate
    difference: Estimate | None
    measured_l0: float
    seeds: tuple[int, int]

    @property
    def is_at_target(self) -> bool:
        """Whether the L0 is within 3% of the target."""
        return abs(self.measured_l0 / self.l0 - 1) <= _L0_TOLERANCE


def rank(outcomes: Sequence[Outcome]) -> list[Place]:
    """Returns the places of the contenders at each target L0, the best first.

    The best recovers most of the loss in the mean over the seeds. SAEs that were not measured are left out.
    """
    seeds: dict[tuple[Contender, int], set[int]] = {}
    recovered: dict[int, dict[Contender, dict[int, tuple[float, float]]]] = {}
    for outcome in outcomes:
        seeds.setdefault((outcome.entry.contender, outcome.entry.l0), set()).add(outcome.entry.seed)
        metrics = outcome.evaluation and outcome.evaluation["metrics"]
        if metrics and metrics["loss_recovered"] is not None:
            of_l0 = recovered.setdefault(outcome.entry.l0, {})
            of_l0.setdefault(outcome.entry.contender, {})[outcome.entry.seed] = metrics["loss_recovered"], metrics["l0"]
    places = []
    for l0, of_l0 in sorted(recovered.items()):
        losses = {who: {seed: loss for seed, (loss, _) in by_seed.items()} for who, by_seed in of_l0.items()}
        order = sorted(losses, key=lambda who: -statistics.mean(losses[who].values()))
        for who in order:
            best_other = next((losses[other] for other in order if other != who), {})
            paired = [loss - best_other[seed] for seed, loss in losses[who].items() if seed in best_other]
            places.append(
                Place(
                    who,
                    l0,
                    Estimate.of(list(losses[who].values())),
                    Estimate.of(paired) if paired else None,
                    statistics.mean(measured for _, measured in of_l0[who].values()),
                    (len(losses[who]), len(seeds[who, l0])),
                )
            )
    return places


def ranking_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns a row for each contender and target L0, the best of each L0 first."""
    rows = []
    places = rank(outcomes)
    numbers: dict[int, int] = {}
    for place in places:
        numbers[place.l0] = numbers.get(place.l0, 0) + 1
        off = "" if place.is_at_target else f", {place.measured_l0 / place.l0 - 1:+.0%} off the target"
        measured, of = place.seeds
        rows.append(
            [
                place.contender.name + (f" ({measured} of {of} seeds measured)" if measured < of else ""),
                str(place.l0),
                str(numbers[place.l0]),
                _percent(place.loss_recovered),
                _percent(place.difference, sign="+") if place.difference else "no other",
                f"{place.measured_l0:.1f}{off}",
            ]
        )
    return ["SAE", "Target L0", "Place", "Loss recovered", "Difference to the best other", "L0"], rows


def ranking_note(outcomes: Sequence[Outcome]) -> str:
    """Returns a paragraph that says what the numbers of the ranking are, and whose L0 is another than the target."""
    n_seeds = len({outcome.entry.seed for outcome in outcomes})
    of_seeds = (
        f"Means over {n_seeds} seeds with their 95% intervals (t distribution); differences are paired by seed."
        if n_seeds > 1
        else "One seed: without intervals."
    )
    places = rank(outcomes)
    if not places:
        return "Nothing was measured."
    off = [f"{each.contender.name} at {each.l0}" for each in places if not each.is_at_target]
    return f"{of_seeds} " + (
        f"The L0 is more than 3% off the target, so that these are not compared at equal L0: {'; '.join(off)}."
        if off
        else "All L0s are within 3% of their target."
    )


def _percent(estimate: Estimate, sign: str = "") -> str:
    mean = f"{estimate.mean:{sign}.2%}"
    return mean if estimate.half_width is None else f"{mean} ± {estimate.half_width:.2%}"
