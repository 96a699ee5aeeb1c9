"""Settings of an inspection of features, and its command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sae_toolkit.errors import UserError
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, ReadTextSettings, check_hook_flags
from sae_toolkit.settings.fields import as_text, build_parser, flag, from_flags
from sae_toolkit.settings.values import NonNegative, NonNegativeFloat, Positive

_QUANTILES = 10  # of the strengths of activations, which delphi draws examples from

_LARGEST_VALUE = 1e10  # far above any activation, far below what overflows in float32
_LEAST_TEMPERATURE = 1e-3
_MOST_PROMOTED = 1000


@dataclass(frozen=True)
class FeatureSettings:
    """What is kept of each feature."""

    tokens: Positive = 1_000_000
    """read at least this many tokens of text, or all that there are"""
    examples: NonNegative = 20
    """keep this many of the contexts that a feature fires in: those in which it fires most strongly"""
    drawn_examples: NonNegative = 20
    """keep this many more, drawn at random from all contexts that it fires in, so that all strengths are among them"""
    stability: tuple[str, ...] = flag((), metavar="SAE")
    """also look for each feature in these SAEs of the same hook, such as those of other seeds"""
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
    effects: NonNegative = 0
    """turn this many features, drawn at random among those that fire, off and to their maximum, and measure what that
    does to the loss and to the tokens that they promote
    """
    no_page: bool = False
    """write features.parquet alone, without the page features.html and its data"""
    export: tuple[Literal["neuronpedia", "saedashboard", "delphi"], ...] = ()
    """also write the features for these tools: neuronpedia takes the batches of JSON that SAEDashboard writes,
    saedashboard what its own pages are made from, and delphi a cache of all activations, which takes a second pass and
    8 to 14 bytes an activation
    """
    save_every: Positive = 300
    """save the work after so many seconds, so that the same command goes on after a kill"""
    verbose: bool = flag(False, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class ExplanationSettings:
    """Features in words, and how well the words tell where a feature fires."""

    explain: str | None = flag(None, metavar="MODEL")
    """have this language model explain features, and test the explanations by delphi's detection and fuzzing scores: a
    Hugging Face model tuned to follow instructions, or with --explain_url the name that the server has for it
    """
    explain_url: str | None = flag(None, metavar="URL")
    """OpenAI-compatible address that serves the model, such as http://127.0.0.1:8000/v1; the key is taken from the
    environment variable OPENAI_API_KEY
    """
    explained_features: Positive = 50
    """explain this many features, drawn at random; more of them later go on from those that are done"""
    explain_examples: Positive = 40
    """show the model this many windows of 32 tokens in which the feature fires, at all strengths"""
    explain_tests: Positive = 50
    """test each explanation on this many other windows in which the feature fires, and as many in which it does not"""
    explain_min_windows: Positive = 200
    """leave out features that fire in fewer windows"""
    explain_new_tokens: Positive = 500
    """the longest reply, in tokens"""
    explain_requests: Positive = 8
    """number of features that are asked about at once, with --explain_url"""
    explain_budget: Positive | None = None
    """ask nothing if more tokens than this would be read and written"""


@dataclass(frozen=True)
class Steer:
    """A feature that is turned.

    Args:
        given: as it was given.
        feature: its index.
        value: its activation, or what is added to it.
        adds: whether the value is added.
    """

    given: str
    feature: int
    value: float
    adds: bool


@dataclass(frozen=True)
class SteeringSettings:
    """Turning features while the model writes, instead of reading text."""

    steer: tuple[str, ...] = flag((), metavar="FEATURE=VALUE")
    """give these features this activation at every token: 12=8.5, or 12=0 to ablate it; 12=+3 adds
    3 to it, and 12=+-3 takes 3 away
    """
    prompt: tuple[str, ...] = flag((), metavar="TEXT")
    """texts that the model continues, with the features turned and without"""
    new_tokens: Positive = 40
    """number of tokens that it writes"""
    continuations: Positive = 1
    """number of continuations of each prompt; more than one needs --temperature"""
    temperature: NonNegativeFloat = 0.0
    """draw tokens at this temperature, with the same seed with and without; 0 takes the likeliest"""

    @property
    def steers(self) -> list[Steer]:
        """The features that are turned.

        Raises:
            UserError: one is not FEATURE=VALUE, or is named twice.
        """
        steers: list[Steer] = []
        for given in self.steer:
            feature, equals, value = given.partition("=")
            adds = value.strip().startswith("+")
            try:
                steer = Steer(given, int(feature), float(value.strip().removeprefix("+")), adds)
            except ValueError:
                steer = Steer(given, -1, math.nan, False)
            if not equals or steer.feature < 0 or not abs(steer.value) <= _LARGEST_VALUE:
                raise UserError(f"--steer {given}: must be FEATURE=VALUE with an index and a number, such as 12=8.5")
            if any(other.feature == steer.feature for other in steers):
                raise UserError(f"--steer {given}: names feature {steer.feature} a second time; leave one of them out")
            steers.append(steer)
        return steers


@dataclass(frozen=True)
class InspectionSettings:
    """All settings of an inspection."""

    saes: EvaluatedSAESettings
    text: ReadTextSettings = field(default_factory=ReadTextSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    run: InspectionRunSettings = field(default_factory=InspectionRunSettings)
    explanations: ExplanationSettings = field(default_factory=ExplanationSettings)
    steering: SteeringSettings = field(default_factory=SteeringSettings)


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
    check_hook_flags(settings.saes)
    _check_steering(settings)
    _check_explanations(settings.explanations)
    if (promoted := settings.features.promoted) > _MOST_PROMOTED:
        raise UserError(f"--promoted {promoted}: these are listed for every feature; give {_MOST_PROMOTED:,} at most")
    if settings.run.effects and not settings.features.examples + settings.features.drawn_examples:
        raise UserError(
            f"--effects {settings.run.effects}: turns features in their examples, and --examples 0 --drawn_examples 0"
            " keeps none; keep some"
        )
    return settings


def _check_explanations(settings: ExplanationSettings) -> None:
    """Raises a UserError for flags of explanations that do not go together."""
    without = ExplanationSettings()
    if settings.explain is None:
        for name in (each.name for each in fields(settings)):
            if (value := getattr(settings, name)) != getattr(without, name):
                raise UserError(f"--{name} {as_text(value)}: is about --explain; give that too, or leave it out")
        return
    for name in ("explain_examples", "explain_tests"):
        if (value := getattr(settings, name)) % _QUANTILES:
            raise UserError(
                f"--{name} {value}: as many come from each tenth of the strengths; give a multiple of {_QUANTILES}"
            )
    least = settings.explain_examples + settings.explain_tests
    if settings.explain_min_windows < least:
        raise UserError(
            f"--explain_min_windows {settings.explain_min_windows}: fewer than --explain_examples and --explain_tests"
            f" take, which are {least}; raise it, or lower them"
        )
    if settings.explain_url is None and settings.explain_requests != without.explain_requests:
        raise UserError(f"--explain_requests {settings.explain_requests}: is about --explain_url; leave it out")
    if settings.explain_url is not None and not _is_address(settings.explain_url):
        raise UserError(
            f"--explain_url {settings.explain_url}: is no address; give one such as http://127.0.0.1:8000/v1"
        )


def _is_address(text: str) -> bool:
    try:
        return urlsplit(text).scheme in ("http", "https") and bool(urlsplit(text).hostname)
    except ValueError:  # brackets without an address in them
        return False


def _check_steering(settings: InspectionSettings) -> None:
    """Raises a UserError for flags of steering and of reading text that do not go together."""
    steering, without = settings.steering, InspectionSettings(settings.saes)
    if not steering.steer:
        for name in ("prompt", "new_tokens", "continuations", "temperature"):
            if (value := getattr(steering, name)) != getattr(without.steering, name):
                raise UserError(f"--{name} {as_text(value)}: is about --steer; give that too, or leave it out")
        return
    if not steering.prompt:
        raise UserError("--steer: needs a text that the model continues; give --prompt TEXT")
    if steering.continuations > 1 and steering.temperature == 0:
        raise UserError(
            f"--continuations {steering.continuations}: all would be the same; give --temperature too, such as 1"
        )
    groups = (settings.features, without.features), (settings.run, without.run)
    for group, default in (*groups, (settings.explanations, without.explanations)):
        for name in (each.name for each in fields(group) if each.name not in ("verbose", "quiet")):
            if (value := getattr(group, name)) != getattr(default, name):
                raise UserError(f"--{name} {as_text(value)}: --steer reads no text and writes no file; leave it out")
    if not settings.text.max_activation_norm_multiple:
        of_text = ("dataset", "dataset_config", "dataset_split", "text_column", "fallback_dataset")
        for name in (*of_text, "held_out_part", "chat_tokens", "context_length"):
            if (value := getattr(settings.text, name)) != getattr(without.text, name):
                raise UserError(
                    f"--{name} {as_text(value)}: --steer reads no text without --max_activation_norm_multiple; leave"
                    " it out"
                )
    if 0 < steering.temperature < _LEAST_TEMPERATURE:
        raise UserError(f"--temperature {steering.temperature:g}: give 0, or at least {_LEAST_TEMPERATURE:g}")
    assert steering.steers  # their form is checked here
