"""The SAEs that a comparison trains, by library, kind, L0, learning rate and seed, and the outcome of each."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.directories import read_result
from sae_toolkit.settings.values import positive_float

TITLES = {"saelens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
_KINDS = {
    "saelens": ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"),
    "sparsify": ("topk",),
    "dictionary_learning": ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "p_anneal"),
}
_ONLY_BY_NAME = "p_anneal"  # a kind that `dictionary_learning` alone leaves out


@dataclass(frozen=True)
class Contender:
    """One kind of SAE of one library.

    Args:
        library: a key of `TITLES`.
        architecture: the kind. One name stands for the same kind in all libraries.
        lr: the learning rate; None for the library's own, and if one of `rates` is chosen.
        rates: the learning rates to choose from for each target L0, in ascending order, with None for the library's
            own. Empty if there is nothing to choose.
    """

    library: str
    architecture: str
    lr: float | None = None
    rates: tuple[float | None, ...] = ()

    @property
    def name(self) -> str:
        return self.name_at(self.lr) + (", lr chosen" if self.rates else "")

    def name_at(self, lr: float | None) -> str:
        """Returns the name of the SAEs of this kind that are trained with one learning rate."""
        return f"{TITLES[self.library]} {self.architecture}" + ("" if lr is None else f", lr {lr:g}")


@dataclass(frozen=True)
class Entry:
    """One SAE of a comparison.

    Args:
        contender: its library and kind.
        l0: its target L0.
        lr: its learning rate; None for the library's own.
        seed: the seed of its weights and of the order of its text.
        directory: where its files go. Entries with the same directory are the same SAE.
    """

    contender: Contender
    l0: int
    lr: float | None
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.contender.name_at(self.lr)}, L0 {self.l0}, seed {self.seed}"

    def trained(self) -> dict[str, Any] | None:
        """Returns the result of its training, as `train_saelens` describes it; None where it is not trained yet."""
        result = read_result(self.directory)
        return result if result and Path(result["sae"]).is_dir() else None


@dataclass(frozen=True)
class Outcome:
    """The outcome of one SAE of a comparison.

    Args:
        entry: the SAE.
        trained: from `Entry.trained`; None if the training failed.
        evaluation: from `read_evaluation`; None if the training or the evaluation failed.
        failed: why it failed; None if it did not.
    """

    entry: Entry
    trained: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    failed: str | None

    @property
    def lr(self) -> float | None:
        """The learning rate; None if it is the library's own and was not recorded."""
        recorded = None if self.trained is None else self.trained["lr"]
        return self.entry.lr if recorded is None else recorded


def parse_contenders(texts: Sequence[str]) -> list[Contender]:
    """Returns the contenders of words such as `saelens`, `sparsify:topk` or `saelens:gated@2e-3`, without duplicates.

    Several learning rates, as in `saelens:gated@1e-3,2e-3`, are those to choose from.

    Raises:
        UserError: a library does not exist or has no such kind; a learning rate is not a number above 0, or is given
            twice; or a kind has two lists of learning rates.
    """
    found: dict[Contender, None] = {}
    for text in texts:
        what, at, listed = text.partition("@")
        library, colon, kind = what.partition(":")
        if library not in _KINDS:
            raise UserError(f"--libraries {text}: no such library{_closest(library, TITLES)}")
        kinds = _KINDS[library]
        if colon and kind not in kinds:
            raise UserError(
                f"--libraries {text}: {TITLES[library]} trains {', '.join(kinds)} here{_closest(kind, kinds)}"
            )
        rates = _parse_rates(text, listed) if at else ()
        lr, rates = (rates[0], ()) if len(rates) == 1 else (None, rates)
        chosen = [kind] if colon else [each for each in kinds if each != _ONLY_BY_NAME]
        for contender in (Contender(library, each, lr, rates) for each in chosen):
            if rates and any(other.rates and other.name == contender.name for other in found if other != contender):
                raise UserError(
                    f"--libraries {text}: {contender.name_at(None)} has another list of learning rates too; join them"
                )
            found[contender] = None
    return list(found)


def _parse_rates(text: str, listed: str) -> tuple[float, ...]:
    """Returns the learning rates of a list such as `1e-3,2e-3`, in ascending order."""
    try:
        rates = sorted(positive_float(each) for each in listed.split(","))
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--libraries {text}: after @ comes a learning rate, such as @2e-3, or several to choose from, such as"
            " @1e-3,2e-3"
        ) from None
    names = [f"{rate:g}" for rate in rates]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--libraries {text}: the learning rate {name} is there twice; give it once")
    return tuple(rates)


def _closest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the closest is {near[0]}" if near else f"; there are {', '.join(names)}"


def make_entry(contender: Contender, l0: int, lr: float | None, seed: int, directory: Path) -> Entry:
    """Returns the entry of one SAE.

    Args:
        directory: the directory of the comparison.
    """
    rate = "" if lr is None else f"-lr{lr:g}"
    name = f"{contender.library}-{contender.architecture}{rate}-l0_{l0}-seed{seed}"
    return Entry(contender, l0, lr, seed, directory / "saes" / name)
