"""Finds flags with which a run takes less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

_LOWEST = {"store_batch_size_prompts": 1, "n_batches_in_buffer": 8, "train_batch_size_tokens": 512}
_LOWEST_EXPANSION_FACTOR = 2


@dataclass(frozen=True)
class LoweredRun:
    """A run after some of its flags were lowered.

    Args:
        cfg: its configuration.
        evaluates: whether it measures on held-out text during training.
        peak: the most bytes that it takes. They may still be too many.
        flags: the words of a command line that lower the flags.
    """

    cfg: LanguageModelSAERunnerConfig[Any]
    evaluates: bool
    peak: int
    flags: tuple[str, ...]


def lower_peak(
    cfg: LanguageModelSAERunnerConfig[Any],
    peak: Callable[[LanguageModelSAERunnerConfig[Any], bool], int],
    capacity: int,
    *,
    evaluates: bool,
    given: Collection[str] = (),
) -> LoweredRun:
    """Lowers flags of a run until its peak is at most `capacity`, or until nothing lowers it further.

    First it leaves out the measurements on held-out text during training, for which a run keeps the whole language
    model. Then it halves one flag in each round: the one with which the peak becomes lowest. The number of features
    stays at least twice the width of the activations.

    Args:
        cfg: the run's configuration.
        peak: returns the most bytes that a configuration takes, with and without measurements on held-out text.
        capacity: the bytes that are there.
        evaluates: whether the run measures on held-out text during training.
        given: names of flags that must stay as they are.
    """
    measures, changed = evaluates, dict[str, int]()
    if measures and peak(cfg, True) > max(capacity, peak(cfg, False)) and "eval_every" not in given:
        measures = False
    while (now := peak(cfg, measures)) > capacity:
        halved = [(name, half) for name, half in _halves(cfg) if name not in given]
        name, half = min(halved, key=lambda each: peak(each[1], measures), default=("", cfg))
        if peak(half, measures) >= now:
            break
        cfg = half
        changed[name] = cfg.sae.d_sae // cfg.sae.d_in if name == "expansion_factor" else getattr(cfg, name)
    if evaluates and peak(cfg, True) <= capacity:  # the other flags suffice
        measures = True
    elif evaluates and not measures:
        changed = {"eval_every": 0} | changed
    words = tuple(word for name, value in changed.items() for word in (f"--{name}", str(value)))
    return LoweredRun(cfg, measures, peak(cfg, measures), words)


def _halves(
    cfg: LanguageModelSAERunnerConfig[Any],
) -> list[tuple[str, LanguageModelSAERunnerConfig[Any]]]:
    """Returns the configuration with half of one flag, for each flag that may be halved, with the flag's name."""
    halves = []
    for name, lowest in _LOWEST.items():
        if (value := getattr(cfg, name) // 2) >= lowest:
            half = copy.copy(cfg)
            setattr(half, name, value)
            halves.append((name, half))
    factor = cfg.sae.d_sae // (2 * cfg.sae.d_in)
    # With fewer features the widths of a matryoshka SAE would have to change too.
    if factor >= _LOWEST_EXPANSION_FACTOR and not hasattr(cfg.sae, "matryoshka_widths"):
        half = copy.copy(cfg)
        half.sae = copy.copy(cfg.sae)
        half.sae.d_sae = factor * cfg.sae.d_in
        if half.sae.d_sae >= getattr(cfg.sae, "k", 1):
            halves.append(("expansion_factor", half))
    return halves
