"""The trials of a sweep: which flags each has, what it has come to, and which is best."""

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
from sae_toolkit.evaluation.health import STANDARDS
from sae_toolkit.many_runs.processes import pareto_front as pareto_front_of
from sae_toolkit.many_runs.processes import read_result
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import TRAINING_FLAGS, TrainingSettings

# What activations depend on, beside the text: trials that share these can share a cache.
_OF_ACTIVATIONS = "model_name layer layers hook_name hook_names lm_dtype context_size set trust_remote_code".split()


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep, with its evaluation.

    Args:
        number: from 1.
        values: of the flags that the sweep varies.
        flags: all of its words on the command line of sae_lens_train.py, but for where its files go.
        directory: of its files.
        cache: of its activations, if it has one.
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
        """What its training is started with, the first time and after each interruption."""
        cache = [] if self.cache is None else ["--cache_activations", str(self.cache)]
        return [*self.flags, "--checkpoint_path", str(self.directory), *cache, "--resume"]

    def result(self) -> dict[str, Any] | None:
        """What it came to; None while it has not."""
        return read_result(self.directory)


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
    """The trials of a sweep, the same each time.

    Args:
        base: flags that all trials have.
        directory: of the sweep.
        grids: `name=value,value,...`; every combination of their values is a trial.
        ranges: `name=low:high`, drawn from evenly in the logarithm; whole numbers where both ends are.
        n_samples: how many trials to draw, of the ranges and of the grids' values; None for all combinations.
        seed: of the draws.
        caches: whether trials keep and share their activations.

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
    combinations = list({json.dumps(values): values for values in combinations}.values())  # each once
    return [_trial(n, values, base, directory, caches) for n, values in enumerate(combinations, 1)]


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
        raise UserError(f"{flag} {text}: --{name} is not one to sweep; give it once, beside the grid")
    if name in seen:
        raise UserError(f"{flag} {text}: --{name} is swept twice")
    return name, values


def _ends(text: str, values: str) -> tuple[float, float, bool]:
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
        parsed = parse_training_flags(flags)
    except UserError as error:
        raise UserError(f"trial {number} ({' '.join(f'{n}={v}' for n, v in values.items())}): {error}") from None
    if parsed.model.layers or parsed.model.hook_names:
        raise UserError("--layers, --hook_names: a trial trains one SAE; sweep them, as in --grid layer=4,8,12")
    cache = None
    if caches:
        cache = directory / "activations" / _key({name: parsed.as_flags()[name] for name in _OF_ACTIVATIONS})
    return Trial(number, values, flags, directory / "trials" / _key(_of_run(parsed) | {"cached": caches}), cache)


def _of_run(settings: TrainingSettings) -> dict[str, Any]:
    """What tells a trial from another: the flags that a sweep may vary."""
    return {
        name: value
        for name, value in settings.as_flags().items()
        if (each := TRAINING_FLAGS.get(name)) and each.may_be_swept
        if not (each.is_later and value == each.default)
    }


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def in_order(results: Sequence[tuple[Trial, Mapping[str, Any]]]) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Trials that were evaluated, the best first: by the number of healthy metrics, then by loss recovered."""
    return sorted(
        (pair for pair in results if "metrics" in pair[1]),
        key=lambda pair: (pair[1]["n_healthy"], pair[1]["metrics"]["loss_recovered"] or -math.inf),
        reverse=True,
    )


def pareto_front(results: Sequence[tuple[Trial, Mapping[str, Any]]]) -> list[tuple[Trial, Mapping[str, Any]]]:
    """The trials that no other beats in both L0 (lower) and loss recovered (higher), by L0."""
    measured = [pair for pair in results if None not in (_l0(pair[1]), _recovered(pair[1]))]
    return [measured[i] for i in pareto_front_of([(_l0(result), _recovered(result)) for _, result in measured])]


def _l0(result: Mapping[str, Any]) -> Any:
    return result.get("metrics", {}).get("l0")


def _recovered(result: Mapping[str, Any]) -> Any:
    return result.get("metrics", {}).get("loss_recovered")


def promise(reading: Mapping[str, Any], d_sae: int) -> float:
    """How promising a run is in the middle, to be compared with others of as many tokens: how many of L0 and dead
    features are healthy, and the explained variance (from 0 to 1) where these are the same.
    """
    standards = {standard.metric: standard for standard in STANDARDS}
    now = {"l0": reading["metrics/l0"], "dead_features": reading["sparsity/dead_features"] / d_sae}
    healthy = sum(low <= now[metric] <= high for metric in now for low, high in [standards[metric].healthy])
    explained = reading["metrics/explained_variance"]
    return healthy + (min(max(explained, 0.0), 1.0) if math.isfinite(explained) else 0.0)
