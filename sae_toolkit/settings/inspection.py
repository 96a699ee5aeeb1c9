"""Settings of an inspection of features, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, ReadTextSettings
from sae_toolkit.settings.fields import build_parser, flag, from_flags
from sae_toolkit.settings.values import NonNegative, Positive


@dataclass(frozen=True)
class FeatureSettings:
    """What is kept of each feature."""

    tokens: Positive = 1_000_000
    """read at least this many tokens of text, or all that there are"""
    examples: NonNegative = 20
    """keep this many of the contexts that a feature fires in: those in which it fires most strongly"""
    drawn_examples: NonNegative = 20
    """keep this many more, drawn at random from all contexts that it fires in, so that all strengths are among them"""
    neighbors: NonNegative = 5
    """list this many features whose decoder vectors are nearest to the feature's"""
    promoted: NonNegative = 10
    """list this many tokens that the feature's decoder vector makes likelier, and as many that it makes less likely"""


@dataclass(frozen=True)
class InspectionRunSettings:
    """Results."""

    output: Path | None = None
    """directory for the results, with one below it for each SAE if there are several (default: features in the
    directory of each SAE)
    """
    save_every: Positive = 300
    """save the work after so many seconds, so that the same command goes on after a kill"""
    verbose: bool = flag(False, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class InspectionSettings:
    """All settings of an inspection."""

    saes: EvaluatedSAESettings
    text: ReadTextSettings = field(default_factory=ReadTextSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    run: InspectionRunSettings = field(default_factory=InspectionRunSettings)


def parse_inspection_flags(description: str, argv: Sequence[str] | None = None) -> InspectionSettings:
    """Parses the flags of an inspection.

    Args:
        description: description of the script, for --help.

    Raises:
        UserError: a flag is unknown, its value cannot be right, or two flags do not fit together.
    """
    parser = build_parser(InspectionSettings, description=description)
    settings = from_flags(InspectionSettings, vars(parser.parse_args(argv)))
    if not settings.saes.sae_path:
        raise UserError("--sae_path: names no SAE; name the directory of an SAE or of a run")
    if settings.saes.layer is not None and settings.saes.hook_name is not None:
        raise UserError(
            f"--layer {settings.saes.layer} and --hook_name {settings.saes.hook_name}: only one of them can choose the"
            " hook; leave out the other"
        )
    return settings
