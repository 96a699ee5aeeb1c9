"""Rows of tokens to shuffled batches of activations: what SAELens's trainer is fed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.memory import is_out_of_memory
from sae_toolkit.position_filter import PositionFilter

log = logging.getLogger(__name__)


class ActivationSource(Protocol):
    """What gives the activations [B, T, D] of tokens [B, T]."""

    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...


class ShuffleBuffer:
    """Mixes the activations of many contexts; serves the batches that SAELens's `mixing_buffer` would.

    Unlike that generator it copies nothing while it fills, keeps the language model's dtype, and has a state
    that can be saved between any two batches.

    Args:
        capacity: how many activations it gathers before it serves any.
        batch_size: how many it serves at a time.
        mix_fraction: share of the capacity that stays behind to be mixed with what comes next, in [0, 1].
            At 0 nothing is shuffled.
        generator: CPU generator of the permutations.
    """

    def __init__(self, capacity: int, batch_size: int, mix_fraction: float, generator: torch.Generator) -> None:
        self.capacity = max(capacity, batch_size)
        self.batch_size = batch_size
        self.mix_fraction = mix_fraction
        self.generator = generator
        self._storage: torch.Tensor | None = None
        self._size = 0
        self._order: torch.Tensor | None = None  # the permutation being served; None while filling
        self._next = 0
        self._end = 0

    def __len__(self) -> int:
        """How many activations it holds that have not been served."""
        return self._size - self._next

    @property
    def nbytes(self) -> int:
        """What its state takes."""
        return 0 if self._storage is None else self._storage[: self._size].nbytes + 8 * self._size

    @property
    def filling(self) -> bool:
        return self._order is None

    def add(self, acts_ND: torch.Tensor) -> None:
        """Copies activations in. Only while filling; from `capacity` on it starts to serve."""
        if self._storage is None or self._size + len(acts_ND) > len(self._storage):
            grown = acts_ND.new_empty(max(self.capacity, self._size) + len(acts_ND), acts_ND.shape[1])
            if self._storage is not None:
                grown[: self._size] = self._storage[: self._size]
            self._storage = grown
        self._storage[self._size : self._size + len(acts_ND)] = acts_ND
        self._size += len(acts_ND)
        if self._size >= self.capacity:
            self._serve(keep=int(self.capacity * self.mix_fraction))

    def drain(self) -> None:
        """Starts to serve all it holds: nothing more will be added."""
        if self.filling:
            self._serve(keep=0)

    def _serve(self, keep: int) -> None:
        shuffled = self.mix_fraction > 0
        order = torch.randperm(self._size, generator=self.generator) if shuffled else torch.arange(self._size)
        assert self._storage is not None
        self._order = _on_device(order, self._storage.device)  # once: a copy in each step would wait for the device
        self._next = 0
        self._end = max(1, (self._size - keep) // self.batch_size) * self.batch_size

    def take(self) -> torch.Tensor:
        """The next batch, [batch_size, D]. Only while not filling."""
        assert self._order is not None and self._storage is not None
        batch = self._storage[self._order[self._next : self._next + self.batch_size]]
        self._next += self.batch_size
        if self._next >= self._end:
            rest = self._order[self._next :]
            self._storage[: len(rest)] = self._storage[rest]
            self._size, self._next, self._order = len(rest), 0, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "acts": None if self._storage is None else self._storage[: self._size].cpu(),
            "order": None if self._order is None else self._order.cpu(),
            "next": self._next,
            "end": self._end,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        acts = state["acts"]
        self._storage = None if acts is None else acts.to(device)
        self._size = 0 if acts is None else len(acts)
        self._order = None if state["order"] is None else state["order"].to(device)
        self._next, self._end = state["next"], state["end"]
        self.generator.set_state(state["generator"].cpu())


class ActivationStream(Iterator[torch.Tensor]):
    """An endless iterator of shuffled activation batches [batch_size, D], in `dtype`.

    Rows of tokens are drawn without replacement in an order that the seed fixes (in their own order where
    `mix_fraction` is 0), go through the language model up to its hook, lose the positions that the filter
    leaves out, and are mixed in a `ShuffleBuffer`. A second pass over the rows starts only when the first
    one is used up.

    Args:
        source: the language model, or a cache before it.
        rows_NT: token ids.
        positions: which positions are kept.
        total: how many activations will be asked for; the last ones are not held back for mixing.
        rows_per_forward: how many rows go through the language model at a time.
    """

    _COUNTS = ("epoch", "next_row", "n_kept", "n_massive", "rows_per_forward")

    def __init__(
        self,
        source: ActivationSource,
        rows_NT: np.ndarray,
        positions: PositionFilter,
        *,
        batch_size: int,
        buffer_size: int,
        mix_fraction: float,
        rows_per_forward: int,
        total: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.source = source
        self.rows_NT = rows_NT
        self.positions = positions
        self.total = total
        self.rows_per_forward = rows_per_forward
        self.dtype = dtype
        self.seed = seed
        self.shuffled = mix_fraction > 0
        self.buffer = ShuffleBuffer(buffer_size, batch_size, mix_fraction, torch.Generator().manual_seed(seed))
        self.epoch = 0
        self.next_row = 0
        self.n_kept = 0
        self.n_massive = 0
        self._order = self._row_order()

    def _row_order(self) -> np.ndarray:
        if not self.shuffled:
            return np.arange(len(self.rows_NT))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows_NT))

    def _next_unfiltered(self) -> torch.Tensor:
        """Runs the next rows; [N, D] activations of the token positions that are kept, massive ones included."""
        if self.next_row >= len(self.rows_NT):
            self.epoch, self.next_row = self.epoch + 1, 0
            self._order = self._row_order()
            log.warning("the training text is used up; pass %d over it begins", self.epoch + 1)
        tokens_BT, acts_BTD = self._run(self._order[self.next_row : self.next_row + self.rows_per_forward])
        self.next_row += len(tokens_BT)
        kept = torch.from_numpy(self.positions.keeps_tokens(tokens_BT).ravel().nonzero()[0])
        return acts_BTD.flatten(0, 1)[_on_device(kept, acts_BTD.device)]

    def _run(self, picked: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Tokens and activations of rows: of fewer than were asked for where more do not fit in memory."""
        while True:
            tokens_BT = self.rows_NT[picked].astype(np.int64)
            try:
                return tokens_BT, self.source.activations(torch.from_numpy(tokens_BT))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(picked) == 1:
                    raise UserError(
                        "--store_batch_size_prompts 1: one context does not fit in memory beside the rest; lower"
                        " --context_size, --expansion_factor or --n_batches_in_buffer"
                    ) from None
            picked = picked[: len(picked) // 2]
            self.rows_per_forward = len(picked)
            log.warning("out of memory: going on with --store_batch_size_prompts %d", self.rows_per_forward)
            if self.source.device.type == "cuda":
                torch.cuda.empty_cache()

    def _add(self, acts_ND: torch.Tensor) -> torch.Tensor:
        """Adds activations to the buffer without the massive ones; returns those added."""
        if self.positions.max_activation_norm is not None:
            kept_ND = acts_ND[self.positions.keeps_norms(acts_ND)]
            self.n_massive += len(acts_ND) - len(kept_ND)
            acts_ND = kept_ND
        self.n_kept += len(acts_ND)
        self.buffer.add(acts_ND)
        return acts_ND

    def calibrate(self, n_batches: int, max_norm_multiple: float | None) -> torch.Tensor:
        """Freezes the norm limit on the first activations of the stream, which stay in it.

        Args:
            n_batches: how many batches to measure on.
            max_norm_multiple: the limit, as a multiple of their median L2 norm; None for no limit.

        Returns:
            [n_batches x batch_size or more, D] the activations measured, without the massive ones.

        Raises:
            UserError: the activations are not finite.
        """
        needed = n_batches * self.buffer.batch_size
        chunks: list[torch.Tensor] = []
        while sum(map(len, chunks)) < needed:
            chunks.append(self._next_unfiltered())
        acts_ND = torch.cat(chunks)
        if max_norm_multiple is not None:
            median = acts_ND.float().norm(dim=-1).median().item()
            if not math.isfinite(median):
                raise UserError(
                    f"--lm_dtype {self.source.dtype}: the activations' median norm is {median}; use another"
                )
            self.positions = replace(self.positions, max_activation_norm=max_norm_multiple * median)
        return self._add(acts_ND).to(self.dtype)

    def __next__(self) -> torch.Tensor:
        while self.buffer.filling:
            if self.n_kept >= self.total and len(self.buffer) >= self.buffer.batch_size:
                self.buffer.drain()
            else:
                self._add(self._next_unfiltered())
        return self.buffer.take().to(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All that the batches still to come depend on, but for the rows and the arguments."""
        return {
            "buffer": self.buffer.state_dict(),
            "counts": {name: getattr(self, name) for name in self._COUNTS},
            "max_activation_norm": self.positions.max_activation_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"], self.source.device)
        for name, count in state["counts"].items():
            setattr(self, name, count)
        self.positions = replace(self.positions, max_activation_norm=state["max_activation_norm"])
        self._order = self._row_order()


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a CPU tensor without waiting for what a CUDA device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
