"""The buffer in which the activations of many contexts are mixed, on one rank or spread over several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae_toolkit.distributed.ranks import ALONE, Ranks


class ShuffleBuffer:
    """Mixes the activations of many contexts and serves the same batches as SAELens's `mixing_buffer`.

    Unlike that generator, it does not copy the whole buffer whenever activations are added, it keeps the language
    model's dtype, and its state can be saved between any two batches.

    The ranks share one buffer. Each rank holds the activations that it computed. All ranks know which rank holds
    which activation, and draw the same batches. A rank is served the part of a batch that it holds, about 1/size of it.

    Args:
        capacity: how many activations all ranks together gather before any are served.
        batch_size: how many activations a batch has, on all ranks together.
        mix_fraction: share of the capacity that is kept back and mixed with the activations that come next, in
            [0, 1]. At 0 nothing is shuffled.
        generator: CPU generator of the permutations, in the same state on all ranks.
        ranks: the ranks that share the buffer.
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
        self._n_here = 0  # how many of them there are
        self._owners = torch.empty(0, dtype=torch.int16)  # which rank holds each activation, in order
        self._order: torch.Tensor | None = None  # order in which this rank serves its own; None while filling
        self._n_here_before = torch.empty(0)  # for each index into _owners: how many before it are on this rank
        self._next = 0  # the next activation to be served, as an index into _owners
        self._end = 0  # where serving stops and filling starts again

    def __len__(self) -> int:
        """Returns the number of activations that all ranks together hold and have not served."""
        return len(self._owners) - self._next

    @property
    def filling(self) -> bool:
        """Whether the buffer takes activations now; if not, it serves batches."""
        return self._order is None

    def add(self, acts_ND: torch.Tensor, counts: Sequence[int]) -> None:
        """Copies activations into the buffer. Only allowed while `filling` is true.

        Args:
            acts_ND: this rank's activations.
            counts: how many activations each rank adds.
        """
        if self._storage is None or self._n_here + len(acts_ND) > len(self._storage):
            expected = -(-self.capacity // self.ranks.size)
            grown = acts_ND.new_empty(max(expected, self._n_here) + len(acts_ND), acts_ND.shape[1])
            if self._storage is not None:
                grown[: self._n_here] = self._storage[: self._n_here]
            self._storage = grown
        self._storage[self._n_here : self._n_here + len(acts_ND)] = acts_ND
        self._n_here += len(acts_ND)
        new = torch.arange(len(counts), dtype=torch.int16).repeat_interleave(torch.tensor(counts))
        self._owners = torch.cat((self._owners, new))

    def serve_if_full(self) -> None:
        """Starts to serve if the capacity is reached."""
        if self.filling and len(self._owners) >= self.capacity:
            self._serve(keep=int(self.capacity * self.mix_fraction))

    def drain(self) -> None:
        """Starts to serve all that is left, as nothing more will be added."""
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
        """Returns the next batch [batch_size, D], or this rank's part of it. Only allowed while `filling` is false."""
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

    def clear(self) -> None:
        """Frees all activations."""
        assert self._storage is not None
        self._storage, self._owners = self._storage[:0].clone(), self._owners[:0]
        self._n_here = self._next = self._end = 0
        self._order = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with the unserved activations in the order in which they will be served.

        On rank 0 these are the activations of all ranks, on another rank only its own.
        """
        assert self._storage is not None
        here = self._storage[: self._n_here].cpu()  # the device may have no room for a copy
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
        """Restores a state. The run that saved it may have had another number of ranks."""
        self._owners = state["owners"]
        if state["ranks"] != self.ranks.size:
            self._owners = (torch.arange(len(self._owners)) % self.ranks.size).to(self._owners.dtype)
        self._storage = state["acts"][self._owners == self.ranks.rank].to(device)
        self._n_here, self._next, self._end, self._order = len(self._storage), 0, state["end"], None
        if state["serving"]:
            self._set_order(torch.arange(self._n_here))
        self.generator.set_state(state["generator"].cpu())


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a CPU tensor to a device without waiting for the work that a CUDA device has queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
