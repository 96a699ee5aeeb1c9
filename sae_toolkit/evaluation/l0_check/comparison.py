"""Which L0 the decoder statistics of several SAEs point to.

Shapes: S SAEs, G groups of SAEs with the same L0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_SAME_L0 = 1.05  # SAEs with L0s within this factor count as seeds of one L0
# A value within this share of the lowest one counts as low as it. The paper finds the elbow by eye; on SAEs of
# different seeds at one k, c_dec differs by less than this.
_AS_LOW = 0.02

Why = Literal["one L0", "too low", "too high", "flat"]


@dataclass(frozen=True)
class Curve:
    """A statistic over L0.

    Args:
        mean_G: mean over the SAEs of each L0, in ascending order of L0.
        std_G: standard deviation over these SAEs; None where there is one.
        lowest: index of the L0 with the lowest mean.
        elbow, last: index of the lowest and of the highest L0 whose mean is as low as that: within 2%, or within twice
            the standard error of the difference over seeds.
    """

    mean_G: list[float]
    std_G: list[float | None]
    lowest: int
    elbow: int
    last: int

    @classmethod
    def of(cls, values_GS: Sequence[Sequence[float]]) -> Curve:
        """Returns the curve of the values of the SAEs of each L0."""
        mean_G = [statistics.mean(values) for values in values_GS]
        std_G = [statistics.stdev(values) if len(values) > 1 else None for values in values_GS]
        freedom = sum(len(values) - 1 for values in values_GS)
        squares = sum(std**2 * (len(values) - 1) for std, values in zip(std_G, values_GS, strict=True) if std)
        std = math.sqrt(squares / freedom) if freedom else 0.0
        lowest = min(range(len(mean_G)), key=mean_G.__getitem__)

        def is_as_low(i: int) -> bool:
            error = std * math.sqrt(1 / len(values_GS[i]) + 1 / len(values_GS[lowest]))
            return mean_G[i] - mean_G[lowest] <= max(_AS_LOW * abs(mean_G[lowest]), 2 * error)

        as_low = [i for i in range(len(mean_G)) if is_as_low(i)]
        return cls(mean_G, std_G, lowest, as_low[0], as_low[-1])


@dataclass(frozen=True)
class Comparison:
    """What SAEs of several L0s say together.

    Args:
        l0_G: mean L0 of the SAEs that have the same one, in ascending order.
        n_saes_G: how many SAEs these are.
        c_dec, s_n_dec: the statistics over these L0s.
        points_to: the elbow of c_dec and the L0 of its lowest value; None if it points to no L0.
        why_not: why it points to none: all SAEs have one L0; all L0s may be too low or too high, as the lowest value is
            at the border of the L0s; or the values of all L0s are as low.
        s_n_dec_agrees: whether s_n_dec is lowest at these L0s too, or at the next one.
    """

    l0_G: list[float]
    n_saes_G: list[int]
    c_dec: Curve
    s_n_dec: Curve
    points_to: tuple[float, float] | None
    why_not: Why | None
    s_n_dec_agrees: bool

    def as_record(self) -> dict[str, Any]:
        """Returns the comparison as evaluation.json stores it."""

        def record(curve: Curve) -> dict[str, Any]:
            lowest, elbow = self.l0_G[curve.lowest], self.l0_G[curve.elbow]
            return {"mean": curve.mean_G, "std": curve.std_G, "lowest_at_l0": lowest, "elbow_at_l0": elbow}

        return {
            "l0": self.l0_G,
            "n_saes": self.n_saes_G,
            "c_dec": record(self.c_dec),
            "s_n_dec": record(self.s_n_dec),
            "points_to_l0": None if self.points_to is None else list(self.points_to),
            "why_not": self.why_not,
            "s_n_dec_agrees": self.s_n_dec_agrees,
        }


def compare(l0_S: Sequence[float], c_dec_S: Sequence[float], s_n_dec_S: Sequence[float]) -> Comparison:
    """Returns which L0 the statistics of SAEs point to.

    c_dec decides, as in version 3 of arXiv 2508.16560, and s_n_dec is a second opinion. In the paper's toy models c_dec
    is lowest at the true L0. In its language models it can be flat above an elbow, where sparse probing is best.

    Args:
        l0_S: L0 of each SAE.
        c_dec_S, s_n_dec_S: their statistics.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(l0_S)), key=l0_S.__getitem__):
        if groups and l0_S[i] <= _SAME_L0 * l0_S[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    l0_G = [statistics.mean(l0_S[i] for i in group) for group in groups]
    curves = [Curve.of([[values_S[i] for i in group] for group in groups]) for values_S in (c_dec_S, s_n_dec_S)]
    c_dec, s_n_dec = curves
    highest = len(groups) - 1
    why_not: Why | None = None
    if highest == 0:
        why_not = "one L0"
    elif c_dec.elbow == 0 and c_dec.last == highest:
        why_not = "flat"
    elif c_dec.lowest == highest:
        why_not = "too low"
    elif c_dec.elbow == 0:
        why_not = "too high"
    points_to = None if why_not else (l0_G[c_dec.elbow], l0_G[c_dec.lowest])
    agrees = s_n_dec.elbow <= c_dec.lowest + 1 and c_dec.elbow <= s_n_dec.lowest + 1
    return Comparison(l0_G, [len(group) for group in groups], c_dec, s_n_dec, points_to, why_not, agrees)
