"""Counts on a CUDA device that are read some steps later, when the device has long made them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

# How many steps pass between making a count and reading it.
STEPS_BEHIND = 4


class DelayedCounts:
    """The counts of the last steps, oldest first. One that is added now is returned `STEPS_BEHIND` steps later."""

    def __init__(self) -> None:
        self._counts: deque[Callable[[], list[int]]] = deque()

    def exchange(self, counts: torch.Tensor) -> list[int] | None:
        """Adds the counts of this step, and returns those of `STEPS_BEHIND` steps before; None if there are none."""
        self._counts.append(_Reading(counts).values)
        return self._counts.popleft()() if len(self._counts) > STEPS_BEHIND else None

    def clear(self) -> None:
        self._counts.clear()

    def state(self) -> list[list[int]]:
        """Returns the counts that are still to be returned. It waits for them."""
        return [values() for values in self._counts]

    def load(self, state: Sequence[Sequence[int]]) -> None:
        """Adds what `state` returned."""
        self._counts.extend(partial(list[int], counts) for counts in state)


class _Reading:
    """Integers that are being copied from a CUDA device while the program goes on."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        with torch.cuda.device(numbers.device):
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[int]:
        """Waits for the copy and returns the integers."""
        self._arrived.synchronize()
        return self._host.tolist()
