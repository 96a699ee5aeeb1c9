"""The trials of a sweep. Each has flags, a directory and a cache of activations."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import TRAINING_FLAGS, TrainingSettings

# Trials with the same values of these flags share a cache. They may differ in the flags of the text, since a cache
# finds activations by their tokens.
_OF_ACTIVATIONS = "model_name layer layers hook_name hook_names lm_dtype context_size set trust_remote_code".split()


# Trials with other values of these are evaluated on other activations.
_OF_MEASUREMENTS = (
    *("model_name", "layer", "hook_name", "dataset_path", "dataset_config", "dataset_split", "text_column"),
    *("chat_tokens", "fallback_dataset", "held_out_fraction", "held_out_seed", "context_size"),
    *("exclude_special_tokens", "skip_positions", "max_activation_norm_multiple"),
)


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep, followed by its evaluation.

    Args:
        number: counted from 1.
        values: the values of the flags that the sweep varies, by name.
        flags: the command line of sae_lens_train.py, without the flags that say where files go.
        directory: where the trial's files go.
        cache: the directory of its cached activations; None to cache none.
    """

    number: int
    values: dict[str, str]
    flags: list[str]
    directory: Path
    cache: Path | None

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items()) or "the only one"

    def training_flags(self) -> list[str]:
        """Returns the whole command line of the training. Each attempt at the trial uses the same one."""
        cache = [] if self.cache is None else ["--cache_activations", str(self.cache)]
        return [*self.flags, "--checkpoint_path", str(self.directory), *cache, "--resume"]


def make_trials(
    base: Sequence[str],
    directory: Path,
    *,
    grids: Sequence[str],
    ranges: Sequence[str] = (),
    n_samples: int | None = None,
    seed: int = 0,
    caches: bool = True,
) -> list[Trial]:
    """Returns the trials of a sweep. Equal arguments give equal trials, so that a stopped sweep can go on.

    Where the seed is swept, all trials hold out the same documents, those of the seed in `base`.

    Args:
        base: the flags that all trials have in common.
        directory: the directory of the sweep.
        grids: `name=value,value,...`. Without `n_samples` every combination of the values is a trial.
        ranges: `name=low:high`, sampled log-uniformly; whole numbers where both ends are whole numbers.
        n_samples: how many trials to draw from the ranges and from the grids' values; None for all combinations.
        seed: the seed of the draws.
        caches: whether trials cache and share their activations.

    Raises:
        UserError: a flag does not exist, cannot be swept, or has a value that training would refuse.
    """
    of_grid: dict[str, list[str]] = {}
    for text in grids:
        name, values = _name_and_values("--grid", text, of_grid)
        of_grid[name] = values.split(",")
    of_range: dict[str, tuple[float, float, bool]] = {}
    for text in ranges:
        name, values = _name_and_values("--range", text, {**of_grid, **of_range})
        of_range[name] = _ends(text, values)
    if of_range and n_samples is None:
        raise UserError(f"--range {ranges[0]}: give --sample N, how many trials to draw")
    if not of_grid and not of_range:
        raise UserError("--grid: nothing is varied; give one, such as --grid k=32,64 lr=3e-4,1e-3")
    if n_samples is None:
        combinations = [dict(zip(of_grid, values, strict=True)) for values in itertools.product(*of_grid.values())]
    else:
        draws = random.Random(seed)
        combinations = [
            {name: draws.choice(values) for name, values in of_grid.items()}
            | {name: _draw(draws, *ends) for name, ends in of_range.items()}
            for _ in range(n_samples)
        ]
    distinct = {json.dumps(values): values for values in combinations}.values()
    if "seed" in combinations[0] and "held_out_seed" not in combinations[0]:
        base = [*base, "--held_out_seed", str(parse_training_flags(base).held_out_seed)]
    return [_trial(number, values, base, directory, caches) for number, values in enumerate(distinct, 1)]


def measured_otherwise(trials: Sequence[Trial]) -> list[str]:
    """Returns the swept flags of which trials have different values, and that choose what an SAE is measured on."""
    return [
        name for name in _OF_MEASUREMENTS if len({trial.values[name] for trial in trials if name in trial.values}) > 1
    ]


def _name_and_values(flag: str, text: str, seen: Mapping[str, Any]) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise UserError(f"{flag} {text}: must be NAME=VALUES, such as k=32,64 (--grid) or lr=1e-4:1e-2 (--range)")
    name = name.removeprefix("--")
    if name not in TRAINING_FLAGS:
        near = difflib.get_close_matches(name, list(TRAINING_FLAGS), n=1)
        hint = f"; the closest is {near[0]}" if near else ""
        raise UserError(f"{flag} {text}: sae_lens_train.py has no flag --{name}{hint}")
    if not TRAINING_FLAGS[name].may_be_swept:
        raise UserError(f"{flag} {text}: --{name} cannot be swept; give it once, as a flag of all trials")
    if name in seen:
        raise UserError(f"{flag} {text}: --{name} is swept twice; give all its values at once")
    return name, values


def _ends(text: str, values: str) -> tuple[float, float, bool]:
    """Returns both ends of a range, and whether they are whole numbers."""
    low, colon, high = values.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not colon or not 0 < ends[0] < ends[1] < math.inf:
        raise UserError(f"--range {text}: must be NAME=LOW:HIGH, with 0 < LOW < HIGH")
    return *ends, low.isdigit() and high.isdigit()


def _draw(draws: random.Random, low: float, high: float, whole: bool) -> str:
    value = math.exp(draws.uniform(math.log(low), math.log(high)))
    return str(round(value)) if whole else f"{value:.3g}"


def _trial(number: int, values: dict[str, str], base: Sequence[str], directory: Path, caches: bool) -> Trial:
    flags = [*base, *(word for name, value in values.items() for word in (f"--{name}", value))]
    try:
        settings = parse_training_flags(flags)
    except UserError as error:
        raise UserError(f"trial {number} ({' '.join(f'{n}={v}' for n, v in values.items())}): {error}") from None
    if settings.model.layers or settings.model.hook_names:
        raise UserError("--layers, --hook_names: a trial trains one SAE; sweep them, as in --grid layer=4,8,12")
    if settings.optimization.seeds > 1:
        raise UserError(
            f"--seeds {settings.optimization.seeds}: a trial trains one SAE; sweep them, as in --grid seed=42,43,44"
        )
    if settings.text.held_out_fraction == 0:
        raise UserError("--held_out_fraction 0: leaves no text to measure the trials on; use 0.1")
    given = settings.as_flags()
    cache = directory / "activations" / _hash({name: given[name] for name in _OF_ACTIVATIONS}) if caches else None
    return Trial(number, values, flags, directory / "trials" / _hash(_swept(settings) | {"cached": caches}), cache)


def _swept(settings: TrainingSettings) -> dict[str, Any]:
    """Returns the values of the flags that a sweep may vary. They identify a trial, and so name its directory.

    A flag that the recipe chooses has no value yet.
    """
    return {
        name: None if name in settings.chosen else value
        for name, value in settings.as_flags().items()
        if (each := TRAINING_FLAGS.get(name)) and each.may_be_swept
        if not (each.is_later and value == each.default)
    }


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
