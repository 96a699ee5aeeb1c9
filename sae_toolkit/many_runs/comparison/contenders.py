"""The SAEs that a comparison trains, by library, kind, L0 and seed, and the outcome of each."""

from __future__ import annotations

import argparse
import difflib
import json
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
        lr: the learning rate; None for the library's own choice.
    """

    library: str
    architecture: str
    lr: float | None = None

    @property
    def name(self) -> str:
        return f"{TITLES[self.library]} {self.architecture}" + ("" if self.lr is None else f", lr {self.lr:g}")


@dataclass(frozen=True)
class Entry:
    """One SAE of a comparison.

    Args:
        contender: its library and kind.
        l0: its target L0.
        seed: the seed of its weights and of the order of its text.
        directory: where its files go.
    """

    contender: Contender
    l0: int
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.contender.name}, L0 {self.l0}, seed {self.seed}"

    def trained(self) -> dict[str, Any] | None:
        """Returns the result of its training, as `train_saelens` describes it; None where it is not trained yet."""
        result = read_result(self.directory)
        return result if result and Path(result["sae"]).is_dir() else None

    def evaluation(self) -> dict[str, Any] | None:
        """Returns the content of its evaluation.json; None where it is not evaluated yet."""
        trained = self.trained()
        try:
            return json.loads((Path(trained["sae"]) / "evaluation.json").read_text()) if trained else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class Outcome:
    """The outcome of one SAE of a comparison.

    Args:
        entry: the SAE.
        trained: from `Entry.trained`; None if the training failed.
        evaluation: from `Entry.evaluation`; None if the training or the evaluation failed.
        failed: why it failed; None if it did not.
    """

    entry: Entry
    trained: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    failed: str | None


def parse_contenders(texts: Sequence[str]) -> list[Contender]:
    """Returns the contenders of words such as `saelens`, `sparsify:topk` or `saelens:gated@2e-3`, without duplicates.

    Raises:
        UserError: a library does not exist or has no such kind, or the learning rate is not a number above 0.
    """
    found: dict[Contender, None] = {}
    for text in texts:
        what, at, rate = text.partition("@")
        library, colon, kind = what.partition(":")
        if library not in _KINDS:
            raise UserError(f"--libraries {text}: no such library{_closest(library, TITLES)}")
        kinds = _KINDS[library]
        if colon and kind not in kinds:
            raise UserError(
                f"--libraries {text}: {TITLES[library]} trains {', '.join(kinds)} here{_closest(kind, kinds)}"
            )
        lr = None
        if at:
            try:
                lr = positive_float(rate)
            except argparse.ArgumentTypeError:
                raise UserError(f"--libraries {text}: after @ comes a learning rate, such as @2e-3") from None
        chosen = [kind] if colon else [each for each in kinds if each != _ONLY_BY_NAME]
        found |= dict.fromkeys(Contender(library, each, lr) for each in chosen)
    return list(found)


def _closest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the closest is {near[0]}" if near else f"; there are {', '.join(names)}"


def make_entries(
    contenders: Sequence[Contender], l0s: Sequence[int], seeds: Sequence[int], directory: Path
) -> list[Entry]:
    """Returns an entry for each seed, L0 and contender. The contender varies fastest, and the seed slowest."""
    return [
        Entry(contender, l0, seed, directory / "saes" / _directory_name(contender, l0, seed))
        for seed in seeds
        for l0 in l0s
        for contender in contenders
    ]


def _directory_name(contender: Contender, l0: int, seed: int) -> str:
    rate = "" if contender.lr is None else f"-lr{contender.lr:g}"
    return f"{contender.library}-{contender.architecture}{rate}-l0_{l0}-seed{seed}"
