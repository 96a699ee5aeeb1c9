"""The learning rates that a comparison tries for each kind of SAE and L0, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Contender, Outcome

DEMO_LR, DEMO_STEPS = 3e-4, 500_000_000 // 2048
"""The learning rate of dictionary_learning_demo, and the number of steps that its settings are made for."""

_MOST_RATES = 7
# More of the loss is recovered with a higher L0 too, so a rate that leads to one is chosen only if all rates do.
_HIGHEST_L0 = 1.1  # times the target


@dataclass(frozen=True)
class Choice:
    """The choice of a learning rate for one contender and target L0.

    Args:
        contender: the kind of SAE.
        l0: the target L0.
        tried: the outcomes of the learning rates in ascending order, measured on validation text.
    """

    contender: Contender
    l0: int
    tried: tuple[Outcome, ...]

    @property
    def chosen(self) -> Outcome | None:
        """The outcome that recovers most of the loss on validation text; None if all trainings failed.

        It is one of those whose L0 is at most 10% above the target, if there are any.
        """
        measured = [each for each in self.tried if each.evaluation and _metrics(each)["loss_recovered"] is not None]
        not_above = [each for each in measured if _metrics(each)["l0"] <= _HIGHEST_L0 * self.l0]
        return max(not_above or measured, key=lambda each: _metrics(each)["loss_recovered"], default=None)

    @property
    def border(self) -> str | None:
        """`lowest` or `highest` if the chosen learning rate is at that border of those tried, and otherwise None."""
        ends = {self.tried[0].entry: "lowest", self.tried[-1].entry: "highest"}
        return ends.get(self.chosen.entry) if self.chosen else None


def _metrics(outcome: Outcome) -> Mapping[str, Any]:
    assert outcome.evaluation is not None
    return outcome.evaluation["metrics"]


def check_learning_rates(contenders: Sequence[Contender], n_rates: int | None) -> None:
    """Checks the value of --learning_rates.

    Args:
        contenders: from `parse_contenders`.
        n_rates: how many learning rates to try for each contender that names none; None for the library's own alone.

    Raises:
        UserError: there is nothing to choose from, there are more than 7, or there is no such contender.
    """
    if n_rates is None:
        return
    flag = f"--learning_rates {n_rates}"
    if not 2 <= n_rates <= _MOST_RATES:
        raise UserError(f"{flag}: must be 2 to {_MOST_RATES}; leave it out to train with the library's own rate")
    if not any(_takes_rates(contender) for contender in contenders):
        raise UserError(
            f"{flag}: no SAE here takes them: SAELens is trained with --lr, and a rate after @ stays as it is; list"
            " rates after @, as in saelens:batchtopk@1e-3,2e-3, or leave it out"
        )


def _takes_rates(contender: Contender) -> bool:
    return contender.library != "saelens" and contender.lr is None and not contender.rates


def with_learning_rates(
    contenders: Sequence[Contender], n_rates: int | None, *, d_sae: int, n_steps: int
) -> list[Contender]:
    """Returns the contenders with the learning rates that --learning_rates lets them choose from.

    A contender that has a list of its own takes the place of the one that would be given some.

    Args:
        contenders: from `parse_contenders`.
        n_rates: as for `check_learning_rates`.
        d_sae: number of features.
        n_steps: number of steps of a training.
    """
    if n_rates is None:
        return list(contenders)
    with_list = {(each.library, each.architecture) for each in contenders if each.rates}
    return [
        replace(each, rates=rates_around(each.library, n_rates, d_sae=d_sae, n_steps=n_steps))
        if _takes_rates(each)
        else each
        for each in contenders
        if not (_takes_rates(each) and (each.library, each.architecture) in with_list)
    ]


def list_saes(
    contenders: Sequence[Contender], l0s: Sequence[int], seeds: Sequence[int], n_rates: int | None
) -> list[str]:
    """Returns the names of the SAEs of a comparison, the contender varying fastest, and the seed slowest.

    Args:
        contenders: from `parse_contenders`.
        l0s: the target L0s.
        seeds: the seeds.
        n_rates: as for `check_learning_rates`.
    """
    names = {}
    for contender in with_learning_rates(contenders, n_rates, d_sae=2**14, n_steps=1):
        listed = ", ".join(f"{rate:g}" for rate in contender.rates if rate is not None)
        among = listed if len(listed.split(", ")) == len(contender.rates) else f"{len(contender.rates)} rates"
        names[contender] = f"{contender.name} among {among}" if contender.rates else contender.name
    return [f"{name}, L0 {l0}, seed {seed}" for seed in seeds for l0 in l0s for name in names.values()]


def own_rate(library: str, d_sae: int) -> float:
    """Returns the learning rate that sparsify or dictionary_learning has for SAEs of `d_sae` features.

    sparsify (trainer.py) divides 5e-3, its rate for signum, by sqrt(d_sae / 2^14).
    """
    return {"dictionary_learning": DEMO_LR, "sparsify": 5e-3 / math.sqrt(d_sae / 2**14)}[library]


def rates_around(library: str, n_rates: int, *, d_sae: int, n_steps: int) -> tuple[float | None, ...]:
    """Returns learning rates at half powers of ten around the library's own, in ascending order.

    The library's own, None, is among them. There are as many below as above, or one more above. The rate of
    dictionary_learning is made for many steps, and a run of less than a tenth of them needs a higher one: there the
    rates begin one half power higher, if that leaves the library's own among them.
    """
    lowest = -((n_rates - 1) // 2)
    if library == "dictionary_learning" and n_steps < DEMO_STEPS / 10:
        lowest = min(0, lowest + 1)
    own = own_rate(library, d_sae)
    return tuple(
        None if power == 0 else float(f"{own * 10 ** (power / 2):.2g}") for power in range(lowest, lowest + n_rates)
    )
