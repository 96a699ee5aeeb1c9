"""What a comparison trains: which library's SAE of which kind, at which L0, with which seed, and what it came to."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.processes import read_result
from sae_toolkit.settings.values import positive_float

TITLES = {"saelens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
# Kinds by library -> SAELens's name of the architecture.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "saelens": {
        **{name: name for name in ("standard", "topk", "batchtopk", "jumprelu", "gated")},
        "matryoshka": "matryoshka_batchtopk",
    },
    "sparsify": {"topk": "topk"},
    "dictionary_learning": {
        **{name: name for name in ("standard", "topk", "batchtopk", "jumprelu", "gated")},
        "matryoshka": "matryoshka_batchtopk",
        "p_anneal": "standard",
    },
}
_ONLY_BY_NAME = {("dictionary_learning", "p_anneal")}
LIBRARIES = tuple(TITLES)


@dataclass(frozen=True)
class Contender:
    """One kind of SAE of one library.

    Args:
        library: one of `LIBRARIES`.
        architecture: one of that library's.
        lr: learning rate; None for the library's own choice.
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
        contender: whose.
        l0: that it is to have.
        seed: of its weights and of the order of its text.
        directory: of its files.
    """

    contender: Contender
    l0: int
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.contender.name}, L0 {self.l0}, seed {self.seed}"

    @property
    def is_own(self) -> bool:
        """Whether sae_lens_train.py trains it, as a run with a record of its own."""
        return self.contender.library == "saelens"

    def trained(self) -> dict[str, Any] | None:
        """What its training came to: the `sae`'s directory, `seconds`, `peak_bytes`, `tried`; None while it has not."""
        result = read_result(self.directory)
        return result if result and Path(result["sae"]).is_dir() else None

    def evaluation(self) -> dict[str, Any] | None:
        """The content of its evaluation.json; None while there is none."""
        trained = self.trained()
        try:
            return json.loads((Path(trained["sae"]) / "evaluation.json").read_text()) if trained else None
        except (OSError, ValueError):
            return None


def parse_contenders(texts: Sequence[str]) -> list[Contender]:
    """Contenders from words such as `saelens`, `sparsify:topk` or `dictionary_learning:batchtopk@2e-3`, each once.

    Raises:
        UserError: there is no such library, or it has no such architecture.
    """
    found: dict[Contender, None] = {}
    for text in texts:
        what, at, rate = text.partition("@")
        library, colon, architecture = what.partition(":")
        if library not in ARCHITECTURES:
            raise UserError(f"--libraries {text}: no such library{_closest(library, LIBRARIES)}")
        kinds = ARCHITECTURES[library]
        if colon and architecture not in kinds:
            raise UserError(
                f"--libraries {text}: {TITLES[library]} trains {', '.join(kinds)} here{_closest(architecture, kinds)}"
            )
        lr = None
        if at:
            try:
                lr = positive_float(rate)
            except argparse.ArgumentTypeError:
                raise UserError(f"--libraries {text}: after @ comes a learning rate, such as @2e-3") from None
        chosen = [architecture] if colon else [kind for kind in kinds if (library, kind) not in _ONLY_BY_NAME]
        found |= dict.fromkeys(Contender(library, kind, lr) for kind in chosen)
    return list(found)


def _closest(name: str, names: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the closest is {near[0]}" if near else f"; there are {', '.join(names)}"


def make_entries(
    contenders: Sequence[Contender], l0s: Sequence[int], seeds: Sequence[int], directory: Path
) -> list[Entry]:
    """All SAEs of a comparison, one contender after the other: those of the first L0 and seed first."""
    return [
        Entry(contender, l0, seed, directory / "saes" / _directory_name(contender, l0, seed))
        for seed in seeds
        for l0 in l0s
        for contender in contenders
    ]


def _directory_name(contender: Contender, l0: int, seed: int) -> str:
    rate = "" if contender.lr is None else f"-lr{contender.lr:g}"
    return f"{contender.library}-{contender.architecture}{rate}-l0_{l0}-seed{seed}"
