"""Settings of a comparison of libraries, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_toolkit.settings.fields import build_parser, flag, from_flags
from sae_toolkit.settings.values import Positive


@dataclass(frozen=True)
class ContenderSettings:
    """SAEs that are compared."""

    libraries: tuple[str, ...] = flag(("saelens", "sparsify", "dictionary_learning"), metavar="LIBRARY[:KIND][@LR,...]")
    """libraries to compare. A library trains each kind of SAE that it has, or only KIND, with its own learning rate, or
    with LR; of several rates, joined by commas, the best is chosen for each L0
    """
    learning_rates: Positive | None = flag(None, metavar="N")
    """choose the learning rate of sparsify and dictionary_learning, where none follows @, for each L0 among N: the
    library's own, and others at half powers of ten around it. The first seed is trained with all of them, and the one
    that recovers most of the loss on validation text is chosen: a half of the held-out documents, which nothing else is
    measured on (default: the library's own)
    """
    l0: tuple[Positive, ...] | None = None
    """train with each of these numbers of active features per token (default: 20 40 80 160; with --quick 64)"""
    seeds: Positive = flag(1, metavar="N")
    """train each SAE with N random seeds: --seed and the numbers after it"""


@dataclass(frozen=True)
class ComparisonRunSettings:
    """Comparison."""

    quick: bool = False
    """train with one L0 and on 250,000 tokens, unless --l0 or --training_tokens is given"""
    comparison_dir: Path | None = None
    """directory of the comparison (default: comparisons/OUTPUT_NAME)"""
    parallel: Positive = flag(1, metavar="N")
    """number of trainings at a time, each with its share of the cores"""
    num_samples: Positive | None = None
    """number of sequences to evaluate each SAE on (default: that of evaluate_sae_real_activations.py)"""
    dry_run: bool = False
    """list the SAEs, and stop"""
    verbose: bool = flag(False, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison, without those of its trainings."""

    contenders: ContenderSettings = field(default_factory=ContenderSettings)
    run: ComparisonRunSettings = field(default_factory=ComparisonRunSettings)


def parse_comparison_flags(description: str, argv: Sequence[str] | None = None) -> tuple[ComparisonSettings, list[str]]:
    """Parses the flags of a comparison.

    Args:
        description: description of the script, for --help.

    Returns:
        The settings of the comparison, and the words of the command line that are flags of its trainings.

    Raises:
        UserError: the value of a flag cannot be right.
    """
    own, words = build_parser(ComparisonSettings, description=description).parse_known_args(argv)
    return from_flags(ComparisonSettings, vars(own)), words
