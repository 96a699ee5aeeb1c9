"""The settings of a sweep, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from sae_toolkit.settings.fields import add_flags, flag, from_flags
from sae_toolkit.settings.values import NonNegative, NonNegativeFloat, Positive
from sae_toolkit.terminal.console import Parser


@dataclass(frozen=True)
class TrialSettings:
    """Trials."""

    grid: tuple[str, ...] = flag((), action="extend", metavar="NAME=V1,V2")
    """values to combine, of any flag"""
    range: tuple[str, ...] = flag((), action="extend", metavar="NAME=LOW:HIGH")
    """ends to draw between"""
    sample: Positive | None = flag(None, metavar="N")
    """draw N trials at random rather than run all combinations"""
    sample_seed: NonNegative = 0
    """of these draws"""
    no_cache: bool = False
    """do not keep activations; trials compute their own"""


@dataclass(frozen=True)
class SweepRunSettings:
    """Sweep."""

    early_stop: bool = False
    """stop trials that promise too little (ASHA)"""
    sweep_dir: str | None = None
    """directory of the sweep (default: sweeps/OUTPUT_NAME)"""
    address: str | None = None
    """a Ray cluster: auto, or host:port of its head (default: this machine alone)"""
    cpus_per_trial: Positive = 1
    """cores of each trial"""
    gpus_per_trial: NonNegativeFloat | None = None
    """GPUs of each trial (default: 1 where there are any)"""
    num_samples: Positive | None = None
    """sequences of each evaluation (default: the evaluation's)"""
    dry_run: bool = False
    """list the trials, and stop"""


@dataclass(frozen=True)
class SweepSettings:
    """A sweep's own settings."""

    trials: TrialSettings = field(default_factory=TrialSettings)
    run: SweepRunSettings = field(default_factory=SweepRunSettings)


def parse_sweep_flags(description: str, argv: Sequence[str] | None = None) -> tuple[SweepSettings, list[str]]:
    """Parses the flags of a sweep.

    Args:
        description: of the script, for its help.

    Returns:
        The sweep's own settings, and the words that are flags of all trials.

    Raises:
        UserError: the value of a flag cannot be right.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, SweepSettings)
    own, words = parser.parse_known_args(argv)
    return from_flags(SweepSettings, vars(own)), words
