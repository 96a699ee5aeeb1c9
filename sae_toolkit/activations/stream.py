"""Rows of tokens to shuffled batches of activations: what SAELens's trainer is fed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from sae_toolkit.activations.shuffle_buffer import ShuffleBuffer, on_device
from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import UserError
from sae_toolkit.model.devices import is_out_of_memory
from sae_toolkit.text.positions import PositionFilter

log = logging.getLogger(__name__)


class ActivationSource(Protocol):
    """What gives the activations [B, T, D] of tokens [B, T]."""

    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...


class ActivationStream(Iterator[torch.Tensor]):
    """An endless iterator of shuffled activation batches [batch_size, D], in `dtype`.

    Rows of tokens are drawn without replacement in an order that the seed fixes (in their own order where
    `mix_fraction` is 0), go through the language model up to its hook, lose the positions that the filter
    leaves out, and are mixed in a `ShuffleBuffer`. A second pass over the rows starts only when the first
    one is used up. Where there are several ranks each runs its own share of the rows, and the batches of all
    together are those of one. Activations of several hooks lie side by side, and one that is massive at any of them
    is left out at all.

    Args:
        source: the language model, or a cache before it.
        rows_NT: token ids, the same on all ranks.
        positions: which positions are kept.
        total: how many activations will be asked for; the last ones are not held back for mixing.
        rows_per_forward: how many rows go through the language model at a time, on all ranks together.
        ranks: who share the rows.
        widths: of the hooks; None where there is one.
        device: where batches are wanted; None for where the source is. Where that is another device, the next rows run
            while the caller works on a batch.
    """

    _COUNTS = ("epoch", "next_row", "n_kept", "n_massive", "rows_at_once")

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
        ranks: Ranks = ALONE,
        widths: list[int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.source = source
        self.device = torch.device(device or source.device)
        self._ahead: ThreadPoolExecutor | None = None
        if (self.device.type, self.device.index or 0) != (source.device.type, source.device.index or 0):
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._next: tuple[tuple[int, int], Future[tuple[int, torch.Tensor]]] | None = (
            None  # of which rows, and their activations
        )
        self.rows_NT = rows_NT
        self.positions = positions
        self.max_activation_norms: list[float] | None = None  # at each hook
        self.median_norms: list[float] | None = None  # likewise, massive activations included
        self.total = total
        self.rows_per_forward = rows_per_forward
        self.rows_at_once = rows_per_forward  # less on a rank, or where memory is short
        self.dtype = dtype
        self.seed = seed
        self.ranks = ranks
        self.widths = widths
        self.shuffled = mix_fraction > 0
        generator = torch.Generator().manual_seed(seed)
        self.buffer = ShuffleBuffer(buffer_size, batch_size, mix_fraction, generator, ranks)
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
        """Runs the next rows; [N, D] activations of the token positions that are kept, massive ones included: those
        of this rank's share.
        """
        if self.next_row >= len(self.rows_NT):
            self.epoch, self.next_row = self.epoch + 1, 0
            self._order = self._row_order()
            log.warning("the training text is used up; pass %d over it begins", self.epoch + 1)
        place = self.epoch, self.next_row
        if self._next is not None and self._next[0] == place:
            n_rows, acts_ND = self._next[1].result()
        else:
            n_rows, acts_ND = self._of_rows(self.next_row)
        self.next_row += n_rows
        if self._ahead is not None and self.next_row < len(self.rows_NT):
            self._next = (self.epoch, self.next_row), self._ahead.submit(self._of_rows, self.next_row)
        return acts_ND

    def _of_rows(self, first: int) -> tuple[int, torch.Tensor]:
        """Runs rows from `first` on; how many on all ranks, and the activations of this one's. Where memory is short a
        single rank runs fewer of them; one of several, its share in pieces, for they all have to be at the same row.
        """
        picked = self._order[first : first + self.rows_per_forward]
        mine = np.array_split(picked, self.ranks.size)[self.ranks.rank]
        if len(mine) == 0:  # the last rows of a pass are fewer than the ranks
            return len(picked), self._run(self._order[:1])[:0]
        pieces: list[torch.Tensor] = []
        while len(mine):
            try:
                pieces.append(self._run(mine[: self.rows_at_once]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._lower_rows_at_once(len(mine))
                continue
            if self.ranks.is_alone:
                return min(len(mine), self.rows_at_once), pieces[0]
            mine = mine[self.rows_at_once :]
        return len(picked), torch.cat(pieces)

    def _run(self, picked: np.ndarray) -> torch.Tensor:
        tokens_BT = self.rows_NT[picked].astype(np.int64)
        acts_BTD = self.source.activations(torch.from_numpy(tokens_BT))
        kept = torch.from_numpy(self.positions.keeps_tokens(tokens_BT).ravel().nonzero()[0])
        return acts_BTD.flatten(0, 1)[on_device(kept, acts_BTD.device)].to(
            self.device, non_blocking=self.device.type == "cuda"
        )

    def _lower_rows_at_once(self, n_left: int) -> None:
        n_tried = min(self.rows_at_once, n_left)
        if n_tried == 1:
            raise UserError(
                "--store_batch_size_prompts 1: one context does not fit in memory beside the rest; lower"
                " --context_size, --expansion_factor or --n_batches_in_buffer"
            ) from None
        self.rows_at_once = n_tried // 2
        log.warning("out of memory: going on with --store_batch_size_prompts %d", self.rows_at_once)
        if self.source.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """Adds activations to the buffer without the massive ones; returns those added."""
        added = []
        for acts_ND in chunks:
            n_all = len(acts_ND)
            if self.max_activation_norms is not None:
                norms_HN = self._norms(acts_ND)
                acts_ND = acts_ND[(norms_HN <= norms_HN.new_tensor(self.max_activation_norms)[:, None]).all(dim=0)]
            counts = self.ranks.counts(len(acts_ND), n_all - len(acts_ND))
            self.n_kept += sum(kept for kept, _ in counts)
            self.n_massive += sum(massive for _, massive in counts)
            self.buffer.add(acts_ND, [kept for kept, _ in counts])
            added.append(acts_ND)
        self.buffer.serve_if_full()
        return added[0] if len(added) == 1 else torch.cat(added)

    def at_each_hook(self, acts_ND: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, D] activations as those of each hook."""
        return [acts_ND] if self.widths is None else acts_ND.split(self.widths, dim=-1)

    def _norms(self, acts_ND: torch.Tensor) -> torch.Tensor:
        """L2 norms [H, N] at each of H hooks."""
        return torch.stack([acts.float().norm(dim=-1) for acts in self.at_each_hook(acts_ND)])

    def calibrate(self, n_batches: int, max_norm_multiple: float | None) -> torch.Tensor:
        """Measures the first activations of the stream, which stay in it, and freezes the norm limits.

        Args:
            n_batches: how many batches to measure on.
            max_norm_multiple: the limit, as a multiple of their median L2 norm at a hook; None for no limit.

        Returns:
            [N, D] the activations measured, without the massive ones; n_batches x batch_size or more, on all ranks
            together.

        Raises:
            UserError: the activations are not finite.
        """
        needed = n_batches * self.buffer.batch_size
        chunks: list[torch.Tensor] = []
        n_run = 0
        while n_run < needed:
            chunks.append(self._next_unfiltered())
            n_run += sum(n for (n,) in self.ranks.counts(len(chunks[-1])))
        norms_HN = torch.cat([self._norms(acts_ND) for acts_ND in chunks], dim=1)
        self.median_norms = torch.cat(self.ranks.gather(norms_HN.t().contiguous())).median(dim=0).values.tolist()
        if max_norm_multiple is not None:
            for median in self.median_norms:
                if not math.isfinite(median):
                    raise UserError(
                        f"--lm_dtype {self.source.dtype}: the activations' median norm is {median}; use another"
                    )
            self.max_activation_norms = [max_norm_multiple * median for median in self.median_norms]
        return self._add(chunks).to(self.dtype)

    def __next__(self) -> torch.Tensor:
        while self.buffer.filling:
            if self.n_kept >= self.total and len(self.buffer) >= self.buffer.batch_size:
                self.buffer.drain()
            else:
                self._add([self._next_unfiltered()])
        return self.buffer.take().to(self.dtype)

    def wait(self) -> None:
        """Waits for rows that run ahead; until the next batch nothing else uses the source."""
        if self._next is not None:
            self._next[1].exception()

    def close(self) -> None:
        """Waits for rows that run ahead, so that their model can be used otherwise."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """All that the batches still to come depend on, but for the rows and the arguments; whole on rank 0 alone."""
        return {
            "buffer": self.buffer.state_dict(),
            "counts": {name: getattr(self, name) for name in self._COUNTS},
            "max_activation_norms": self.max_activation_norms,
            "median_norms": self.median_norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, whether or not as many ranks saved it."""
        self.buffer.load_state_dict(state["buffer"], self.device)
        for name, count in state["counts"].items():
            setattr(self, name, count)
        self.max_activation_norms = state["max_activation_norms"]
        self.median_norms = state.get("median_norms")  # checkpoints of before have none
        self._order = self._row_order()
