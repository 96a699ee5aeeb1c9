"""One buffer in which the activations of many contexts are mixed, on one process or spread over several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae_toolkit.distributed.ranks import ALONE, Ranks


class ShuffleBuffer:
    """Mixes the activations of many contexts; serves the batches that SAELens's `mixing_buffer` would.

    Unlike that generator it copies nothing while it fills, keeps the language model's dtype, and has a state
    that can be saved between any two batches.

    It is one buffer however many ranks there are: each holds the activations that it computed, all know who holds
    which, and draw the same batches. A rank is served those of a batch that it holds, about 1/size of them.

    Args:
        capacity: how many activations it gathers before it serves any, on all ranks together.
        batch_size: how many it serves at a time, likewise.
        mix_fraction: share of the capacity that stays behind to be mixed with what comes next, in [0, 1].
            At 0 nothing is shuffled.
        generator: CPU generator of the permutations, in the same state on all ranks.
        ranks: who holds it.
    """

    def __init__(
        self,
        capacity: int,
        batch_size: int,
        mix_fraction: float,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.capacity = max(capacity, batch_size)
        self.batch_size = batch_size
        self.mix_fraction = mix_fraction
        self.generator = generator
        self.ranks = ranks
        self._storage: torch.Tensor | None = None  # this rank's activations
        self._n_here = 0
        self._owners = torch.empty(0, dtype=torch.int16)  # the rank of each activation of all, in order
        self._order: torch.Tensor | None = None  # of this rank's activations, while they are served; None while filling
        self._n_here_before = torch.empty(0)  # of each activation of all
        self._next = 0
        self._end = 0

    def __len__(self) -> int:
        """How many activations it holds that have not been served, on all ranks."""
        return len(self._owners) - self._next

    @property
    def filling(self) -> bool:
        return self._order is None

    def add(self, acts_ND: torch.Tensor, counts: Sequence[int] | None = None) -> None:
        """Copies activations in. Only while filling.

        Args:
            acts_ND: this rank's.
            counts: how many each rank adds; None where this is the only one.
        """
        if self._storage is None or self._n_here + len(acts_ND) > len(self._storage):
            expected = -(-self.capacity // self.ranks.size)
            grown = acts_ND.new_empty(max(expected, self._n_here) + len(acts_ND), acts_ND.shape[1])
            if self._storage is not None:
                grown[: self._n_here] = self._storage[: self._n_here]
            self._storage = grown
        self._storage[self._n_here : self._n_here + len(acts_ND)] = acts_ND
        self._n_here += len(acts_ND)
        counts = (len(acts_ND),) if counts is None else counts
        new = torch.arange(len(counts), dtype=torch.int16).repeat_interleave(torch.tensor(counts))
        self._owners = torch.cat((self._owners, new))

    def serve_if_full(self) -> None:
        """Starts to serve where the capacity is reached."""
        if self.filling and len(self._owners) >= self.capacity:
            self._serve(keep=int(self.capacity * self.mix_fraction))

    def drain(self) -> None:
        """Starts to serve all it holds: nothing more will be added."""
        if self.filling:
            self._serve(keep=0)

    def _serve(self, keep: int) -> None:
        n = len(self._owners)
        order = torch.randperm(n, generator=self.generator) if self.mix_fraction > 0 else torch.arange(n)
        here = self._owners == self.ranks.rank
        place_here = here.cumsum(0) - 1
        self._owners, here = self._owners[order], here[order]
        self._set_order(place_here[order[here]])
        self._end = max(1, (n - keep) // self.batch_size) * self.batch_size

    def _set_order(self, order: torch.Tensor) -> None:
        assert self._storage is not None
        self._order = on_device(order, self._storage.device)  # once: a copy in each step would wait for the device
        here = self._owners == self.ranks.rank
        self._n_here_before = torch.cat((here.new_zeros(1, dtype=torch.long), here.cumsum(0)))
        self._next = 0

    def take(self) -> torch.Tensor:
        """The next batch, [batch_size, D], or this rank's part of it. Only while not filling."""
        assert self._order is not None and self._storage is not None
        end = min(self._next + self.batch_size, len(self._owners))
        batch = self._storage[self._order[self._n_here_before[self._next] : self._n_here_before[end]]]
        self._next += self.batch_size
        if self._next >= self._end:
            rest = self._order[self._n_here_before[end] :]
            self._storage[: len(rest)] = self._storage[rest]
            self._n_here, self._owners = len(rest), self._owners[end:]
            self._next, self._order = 0, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What it still holds, on all ranks, in the order in which it is or will be served; whole on rank 0 alone."""
        assert self._storage is not None
        here = self._storage[: self._n_here].cpu()  # on the device there may be no room for a copy
        if self._order is not None:
            here = here[self._order[self._n_here_before[self._next] :].cpu()]
        owners = self._owners[self._next :]
        acts = here
        if not self.ranks.is_alone and (parts := self.ranks.gather_to_main(here)):
            acts = here.new_empty(len(owners), *here.shape[1:])
            for rank, part in enumerate(parts):
                acts[owners == rank] = part
        return {
            "acts": acts,
            "owners": owners,
            "serving": not self.filling,
            "end": self._end - self._next,
            "ranks": self.ranks.size,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._owners = state["owners"]
        if state["ranks"] != self.ranks.size:
            self._owners = (torch.arange(len(self._owners)) % self.ranks.size).to(self._owners.dtype)
        self._storage = state["acts"][self._owners == self.ranks.rank].to(device)
        self._n_here, self._next, self._end, self._order = len(self._storage), 0, state["end"], None
        if state["serving"]:
            self._set_order(torch.arange(self._n_here))
        self.generator.set_state(state["generator"].cpu())


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a CPU tensor without waiting for what a CUDA device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
