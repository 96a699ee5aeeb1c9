"""The settings of a comparison of libraries, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_toolkit.settings.fields import add_flags, flag, from_flags
from sae_toolkit.settings.values import Positive
from sae_toolkit.terminal.console import Parser


@dataclass(frozen=True)
class ContenderSettings:
    """SAEs that are compared."""

    libraries: tuple[str, ...] = flag(("saelens", "sparsify", "dictionary_learning"), metavar="LIBRARY[:KIND][@LR]")
    """libraries, all kinds of SAE of each or the one named"""
    l0: tuple[Positive, ...] | None = None
    """features active a token (default: 20 40 80 160; with --quick 64)"""
    seeds: Positive = flag(1, metavar="N")
    """of each, from --seed on"""


@dataclass(frozen=True)
class ComparisonRunSettings:
    """Comparison."""

    quick: bool = False
    """one L0 and 250,000 tokens, unless others are given"""
    comparison_dir: Path | None = None
    """directory of the comparison (default: comparisons/OUTPUT_NAME)"""
    num_samples: Positive | None = None
    """sequences of the evaluation (default: the evaluation's)"""
    dry_run: bool = False
    """list the SAEs, and stop"""
    verbose: bool = flag(False, exclusive="verbosity")
    """log details too"""
    quiet: bool = flag(False, exclusive="verbosity")
    """log nothing but warnings, errors and results"""


@dataclass(frozen=True)
class ComparisonSettings:
    """A comparison's own settings."""

    contenders: ContenderSettings = field(default_factory=ContenderSettings)
    run: ComparisonRunSettings = field(default_factory=ComparisonRunSettings)


def parse_comparison_flags(description: str, argv: Sequence[str] | None = None) -> tuple[ComparisonSettings, list[str]]:
    """Parses the flags of a comparison.

    Args:
        description: of the script, for its help.

    Returns:
        The comparison's own settings, and the words that are flags of the trainings.

    Raises:
        UserError: the value of a flag cannot be right.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, ComparisonSettings)
    own, words = parser.parse_known_args(argv)
    return from_flags(ComparisonSettings, vars(own)), words
