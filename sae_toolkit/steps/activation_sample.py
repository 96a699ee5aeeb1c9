"""The sample of activations that the calibration of an SAE's L0 needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sae_toolkit.activations.shuffle_buffer import on_device
from sae_toolkit.distributed.ranks import ALONE, Ranks

CAPACITY = 16_384  # activations that were trained on, on all ranks together
DTYPE = torch.float32  # of a sample of what was trained on
# Of held-out text: as much as the evaluation measures on. Contexts differ: over 4,096 tokens L0 is 1.5% to 3% off that
# over all of them, in the mean, and over half of them 0.3% to 0.6%.
_MOST_HELD_OUT, LEAST_HELD_OUT = 52_500, 8192
_HELD_OUT_SHARE = 2  # a short run must not spend more time on held-out text than on its training


def held_out_tokens(training_tokens: int) -> int:
    """Returns on how many tokens of held-out text the L0 of a run is calibrated; 0 if the run is too short for it."""
    n = min(training_tokens // _HELD_OUT_SHARE, _MOST_HELD_OUT)
    return n if n >= LEAST_HELD_OUT else 0


class ActivationSample:
    """Activations of held-out text, once `hold` has set them.

    Without them it is a uniform sample of those that the SAE was trained on: all at first, later `CAPACITY` drawn at
    random. An SAE has a lower L0 on what it was trained on than on other text.

    The random sample is a reservoir (Vitter 1985, algorithm R). The draws depend on the number of the step only, so
    they need no random state, and torch's is not touched. They are made on the CPU, and do not wait for the device.

    Args:
        device: where the sample is kept.
        ranks: the ranks that share the sample. Each keeps its part of it, drawn from the activations that it is given.
    """

    def __init__(self, device: str | torch.device, ranks: Ranks = ALONE) -> None:
        self.device = torch.device(device)
        self.ranks = ranks
        self.capacity = -(-CAPACITY // ranks.size)
        self._storage: torch.Tensor | None = None
        self._n = 0  # how many activations are kept
        self._n_seen = 0  # how many were given
        self._counts: list[tuple[int, ...]] = []  # how many each rank kept and was given, if this is that of all ranks
        self.is_held_out = False

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        """How many bytes the activations take in a state."""
        return 0 if self.is_empty or self.is_held_out else self.acts_ND.nbytes

    @property
    def acts_ND(self) -> torch.Tensor:
        """The activations [N, D] that this rank keeps. Those of steps that were not finite are included.

        It is only allowed if there are any.
        """
        assert self._storage is not None
        return self._storage[: self._n]

    @property
    def is_empty(self) -> bool:
        """Whether no rank has any activations."""
        return self._storage is None

    def hold(self, acts_ND: torch.Tensor) -> None:
        """Takes activations of held-out text, in place of what there is. What is added later is left out.

        They stay on the CPU, in the dtype that they have: a rounding of large ones would change which features fire.

        Args:
            acts_ND: this rank's share of the raw activations.
        """
        self._storage = acts_ND.to("cpu", copy=True)
        self._n, self._n_seen, self.is_held_out = len(acts_ND), 0, True

    def first(self, n: int | None) -> torch.Tensor:
        """Returns this rank's share of the first n activations of held-out text, or all if n is None.

        A random sample has no order, and is returned whole.
        """
        return self.acts_ND if n is None or not self.is_held_out else self.acts_ND[: -(-n // self.ranks.size)]

    @torch.no_grad()
    def add(self, acts_ND: torch.Tensor, step: int) -> None:
        """Takes the raw activations of a training step.

        Args:
            acts_ND: this rank's activations.
            step: number of the step.
        """
        if self.is_held_out:
            return
        if self._storage is None:
            self._storage = torch.empty(self.capacity, acts_ND.shape[1], dtype=DTYPE, device=self.device)
        n_free = min(self.capacity - self._n, len(acts_ND))
        self._storage[self._n : self._n + n_free] = acts_ND[:n_free]
        self._n += n_free
        self._n_seen += n_free
        if n_free < len(acts_ND):
            self._replace(acts_ND[n_free:], step)

    def _replace(self, acts_ND: torch.Tensor, step: int) -> None:
        """Puts each activation into a random place out of as many as there were activations so far, if it exists."""
        assert self._storage is not None
        random = np.random.default_rng((step, self.ranks.rank))
        places = random.integers(0, np.arange(self._n_seen, self._n_seen + len(acts_ND)) + 1)
        self._n_seen += len(acts_ND)
        chosen = np.flatnonzero(places < self.capacity)[::-1]
        places, first = np.unique(places[chosen], return_index=True)  # the last of those that have the same place
        if len(places):
            rows = on_device(torch.from_numpy(chosen[first]), acts_ND.device)
            self._storage[on_device(torch.from_numpy(places), self.device)] = acts_ND[rows].to(self.device, DTYPE)

    def of_all_ranks(self) -> ActivationSample:
        """Returns the sample of all ranks on the CPU of rank 0, and this rank's part on the others. Collective."""
        if self.ranks.is_alone or self._storage is None or self.is_held_out:
            return self
        counts = self.ranks.counts(self._n, self._n_seen)
        parts = self.ranks.gather_to_main(self.acts_ND.cpu())
        whole = ActivationSample("cpu")
        whole._storage = torch.cat(parts) if parts else self.acts_ND
        whole._n, whole._n_seen = len(whole._storage), sum(n_seen for _, n_seen in counts)
        whole._counts = counts
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of a random sample. Held-out activations are not part of it: a resumed run has the text."""
        return {
            "acts": None if self._storage is None or self.is_held_out else self.acts_ND.cpu().clone(),
            "counts": self._counts or [(self._n, self._n_seen)],  # of each rank
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. The run that saved it may have had another number of ranks."""
        acts_ND, counts = state["acts"], state["counts"]
        if acts_ND is None:
            return
        if len(counts) == self.ranks.size:
            mine_ND = acts_ND.split([n for n, _ in counts])[self.ranks.rank]
            n_seen = counts[self.ranks.rank][1]
        else:
            mine_ND = acts_ND[self.ranks.rank :: self.ranks.size][: self.capacity]
            n_seen = sum(n_seen for _, n_seen in counts) // self.ranks.size
        self._storage = torch.empty(self.capacity, acts_ND.shape[1], dtype=DTYPE, device=self.device)
        self._storage[: len(mine_ND)] = mine_ND
        self._n, self._n_seen = len(mine_ND), n_seen
