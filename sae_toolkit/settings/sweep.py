"""Settings of a sweep, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sae_toolkit.settings.fields import build_parser, flag, from_flags
from sae_toolkit.settings.values import NonNegative, NonNegativeFloat, Positive


@dataclass(frozen=True)
class TrialSettings:
    """Trials."""

    grid: tuple[str, ...] = flag((), action="extend", metavar="NAME=V1,V2")
    """values to try for a flag of sae_lens_train.py; for several flags, all combinations are tried"""
    range: tuple[str, ...] = flag((), action="extend", metavar="NAME=LOW:HIGH")
    """draw values for a flag of sae_lens_train.py between LOW and HIGH, evenly in the logarithm; needs --sample"""
    sample: Positive | None = flag(None, metavar="N")
    """run N trials at random instead of all combinations"""
    sample_seed: NonNegative = 0
    """random seed of --sample"""
    no_cache: bool = False
    """do not keep the activations of the language model; each trial computes them again"""


@dataclass(frozen=True)
class SweepRunSettings:
    """Sweep."""

    early_stop: bool = False
    """stop trials early whose metrics are behind those of the others (Ray's ASHA scheduler)"""
    sweep_dir: str | None = None
    """directory of the sweep (default: sweeps/OUTPUT_NAME)"""
    address: str | None = None
    """Ray cluster to run on: auto, or host:port of its head (default: only this machine)"""
    cpus_per_trial: Positive = 1
    """number of CPU cores of each trial"""
    gpus_per_trial: NonNegativeFloat | None = None
    """number of GPUs of each trial (default: 1, or 0 on a machine without GPUs)"""
    num_samples: Positive | None = None
    """number of sequences to evaluate each SAE on (default: that of evaluate_sae_real_activations.py)"""
    dry_run: bool = False
    """list the trials, and stop"""


@dataclass(frozen=True)
class SweepSettings:
    """Settings of a sweep, without those of its trainings."""

    trials: TrialSettings = field(default_factory=TrialSettings)
    run: SweepRunSettings = field(default_factory=SweepRunSettings)


def parse_sweep_flags(description: str, argv: Sequence[str] | None = None) -> tuple[SweepSettings, list[str]]:
    """Parses the flags of a sweep.

    Args:
        description: description of the script, for --help.

    Returns:
        The settings of the sweep, and the words of the command line that are flags of its trainings.

    Raises:
        UserError: the value of a flag cannot be right.
    """
    own, words = build_parser(SweepSettings, description=description).parse_known_args(argv)
    return from_flags(SweepSettings, vars(own)), words
