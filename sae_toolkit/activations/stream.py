"""The stream of shuffled activation batches that an SAE is trained on, made from rows of tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from sae_toolkit.activations.massive import without_massive
from sae_toolkit.activations.shuffle_buffer import ShuffleBuffer, on_device
from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import UserError, is_out_of_memory
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.positions import PositionFilter

log = logging.getLogger(__name__)


class ActivationSource(Protocol):
    """Anything that returns the activations [B, T, D] of tokens [B, T]."""

    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...


class ActivationStream(Iterator[torch.Tensor]):
    """An endless iterator of shuffled activation batches [batch_size, D], in `dtype`.

    Rows of tokens are drawn without replacement, in an order that depends on the seed only (in their own order if
    `mix_fraction` is 0). They go through the language model up to its hook. The positions that the filter leaves out
    are dropped, and the rest is mixed in a `ShuffleBuffer`. A second pass over the rows starts when the first one is
    used up, in another order. With several ranks, each rank runs its own share of the rows, and the ranks' batches
    together equal the batches of a single rank.

    The activations of several hooks are concatenated along D. Massive ones are left out by `without_massive`, on each
    rank's share of the rows, so that ranks can differ from a single one at the last token of a share.

    Args:
        source: the language model, or a cache in front of it.
        rows_NT: token ids, the same on all ranks.
        positions: which positions are kept.
        assistant_NT: booleans, True where the assistant speaks; None if `positions` need not know it.
        batch_size: how many activations a batch has, on all ranks together.
        buffer_size: how many activations are mixed at a time, on all ranks together.
        mix_fraction: share of the buffer that is kept back and mixed with the activations that come next, in [0, 1].
        rows_per_forward: how many rows go through the language model at a time, on all ranks together.
        total: how many activations the caller will take. Once the stream has read this many, it keeps none back.
        seed: seed of the order of the rows and of the mixing.
        dtype: dtype of the batches.
        ranks: the ranks that share the rows.
        widths: the width of each hook; None where there is one hook.
        saes_per_hook: how many SAEs are trained at each hook.
        device: device of the batches; None for the source's device. If it differs from the source's device, the next
            rows go through the model while the caller works on a batch.
        epochs: how many passes over the rows are expected. The start of a further one is a warning.
        row_ids: the ids of the rows to use; None for all.
    """

    _COUNTS = ("epoch", "next_row", "n_kept", "n_massive", "n_replaced", "rows_at_once")

    def __init__(
        self,
        source: ActivationSource,
        rows_NT: np.ndarray,
        positions: PositionFilter,
        assistant_NT: np.ndarray | None = None,
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
        saes_per_hook: int = 1,
        device: str | torch.device | None = None,
        epochs: int = 1,
        row_ids: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.device = torch.device(device or source.device)
        self._ahead: ThreadPoolExecutor | None = None
        if (self.device.type, self.device.index or 0) != (source.device.type, source.device.index or 0):
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="activations")
        # The rows that run ahead: their epoch, the first of them, and their result.
        self._next: tuple[tuple[int, int], Future[tuple[int, torch.Tensor]]] | None = None
        self.rows_NT = rows_NT
        self.row_ids = np.arange(len(rows_NT)) if row_ids is None else row_ids
        self.positions = positions
        self.assistant_NT = assistant_NT
        self.max_activation_norms: list[float] | None = None  # at each hook
        self.median_norms: list[float] | None = None  # at each hook, massive activations included
        self.total = total
        self.rows_per_forward = rows_per_forward
        self.rows_at_once = rows_per_forward  # the most that this rank runs at a time; lowered if memory runs out
        self.dtype = dtype
        self.seed = seed
        self.ranks = ranks
        self.widths = widths
        self.saes_per_hook = saes_per_hook
        self.shuffled = mix_fraction > 0
        self.epochs = epochs
        generator = torch.Generator().manual_seed(seed)
        self.buffer = ShuffleBuffer(buffer_size, batch_size, mix_fraction, generator, ranks)
        self.epoch = 0
        self.next_row = 0
        self.n_kept = 0
        self.n_massive = 0  # tokens that are dropped
        self.n_replaced = 0  # activations at one hook in whose place there are others
        self._order = self._row_order()

    def _row_order(self) -> np.ndarray:
        if not self.shuffled:
            return self.row_ids
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.row_ids)

    @property
    def passes(self) -> float:
        """How many passes over the rows have been made, a part of one included."""
        return self.epoch + self.next_row / len(self.row_ids)

    def _next_unfiltered(self) -> torch.Tensor:
        """Returns the activations [N, D] of this rank's share of the next rows, at the positions that the filter keeps.

        Massive activations are still among them.
        """
        if self.next_row >= len(self.row_ids):
            self.epoch, self.next_row = self.epoch + 1, 0
            self._order = self._row_order()
            expected = self.epoch < self.epochs
            log.log(
                logging.INFO if expected else logging.WARNING,
                "the training text is used up; pass %d over it begins%s",
                self.epoch + 1,
                "" if expected else f", more than --epochs {self.epochs}",
            )
        place = self.epoch, self.next_row
        if self._next is not None and self._next[0] == place:
            n_rows, acts_ND = self._next[1].result()
        else:
            n_rows, acts_ND = self._run_rows(self.next_row)
        self.next_row += n_rows
        if self._ahead is not None and self.next_row < len(self.row_ids):
            self._next = (self.epoch, self.next_row), self._ahead.submit(self._run_rows, self.next_row)
        return acts_ND

    def _run_rows(self, first: int) -> tuple[int, torch.Tensor]:
        """Runs the rows from `first` on. Returns how many all ranks ran, and the activations of this rank's share.

        If memory runs out, a single rank runs fewer rows. With several ranks, a rank runs its share in pieces instead,
        because all ranks have to stay at the same row.
        """
        picked = self._order[first : first + self.rows_per_forward]
        mine = np.array_split(picked, self.ranks.size)[self.ranks.rank]
        if len(mine) == 0:  # a pass can end with fewer rows than there are ranks
            return len(picked), self._run(self.rows_NT, self.assistant_NT, self._order[:1])[:0]
        pieces = self._pieces(self.rows_NT, self.assistant_NT, mine)
        if self.ranks.is_alone:
            return next(pieces)
        return len(picked), torch.cat([acts_ND for _, acts_ND in pieces])

    def _pieces(
        self, rows_NT: np.ndarray, assistant_NT: np.ndarray | None, picked: np.ndarray
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Runs the picked rows, as many at a time as the memory suffices for.

        Yields:
            How many rows were run, and the activations [N, D] at the positions that are kept.
        """
        while len(picked):
            try:
                piece = self._run(rows_NT, assistant_NT, picked[: self.rows_at_once])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._lower_rows_at_once(len(picked))
                continue
            yield min(len(picked), self.rows_at_once), piece
            picked = picked[self.rows_at_once :]

    def of_other_rows(
        self, rows_NT: np.ndarray, assistant_NT: np.ndarray | None, dtype: torch.dtype, *, shares: bool
    ) -> torch.Tensor:
        """Returns the activations of rows that the stream does not have, without those that it would leave out.

        The stream itself stays as it is.

        Args:
            rows_NT: token ids, the same on all ranks.
            assistant_NT: as that of the stream.
            dtype: dtype of the activations.
            shares: whether each rank runs its share of the rows, of which there are as many as ranks or more. Otherwise
                each runs all.

        Returns:
            [N, D] on the CPU, of the rows that this rank has run.

        Raises:
            UserError: the memory does not suffice for one row.
        """
        self.wait()
        mine = np.arange(len(rows_NT))
        if shares:
            mine = mine[self.ranks.rank :: self.ranks.size]  # the first activations of all ranks are of the first rows
        pieces = []
        with Progress("held-out text", len(mine), unit="contexts", speaks=self.ranks.is_main) as progress:
            for n_rows, acts_ND in self._pieces(rows_NT, assistant_NT, mine):
                pieces.append(self._without_massive(acts_ND)[0].to("cpu", dtype))
                progress.advance(n_rows)
        return torch.cat(pieces)

    def _run(self, rows_NT: np.ndarray, assistant_NT: np.ndarray | None, picked: np.ndarray) -> torch.Tensor:
        """Returns the activations [N, D] of the picked rows at the positions that are kept."""
        tokens_BT = rows_NT[picked].astype(np.int64)
        acts_BTD = self.source.activations(torch.from_numpy(tokens_BT))
        assistant_BT = None if assistant_NT is None else assistant_NT[picked]
        kept = torch.from_numpy(self.positions.keeps_tokens(tokens_BT, assistant_BT).ravel().nonzero()[0])
        return acts_BTD.flatten(0, 1)[on_device(kept, acts_BTD.device)].to(
            self.device, non_blocking=self.device.type == "cuda"
        )

    def _lower_rows_at_once(self, n_left: int) -> None:
        n_tried = min(self.rows_at_once, n_left)
        if n_tried == 1:
            raise UserError(
                "--store_batch_size_prompts 1: there is no memory left for one context; lower"
                " --context_size, --expansion_factor or --n_batches_in_buffer"
            ) from None
        self.rows_at_once = n_tried // 2
        log.warning("out of memory: going on with --store_batch_size_prompts %d", self.rows_at_once)
        if self.source.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """Adds the activations that are not massive to the buffer, and returns them."""
        added = []
        for acts_ND in chunks:
            n_all = len(acts_ND)
            acts_ND, n_replaced = self._without_massive(acts_ND)
            kept, massive, replaced = zip(
                *self.ranks.counts(len(acts_ND), n_all - len(acts_ND), n_replaced), strict=True
            )
            self.n_kept += sum(kept)
            self.n_massive += sum(massive)
            self.n_replaced += sum(replaced)
            self.buffer.add(acts_ND, kept)
            added.append(acts_ND)
        self.buffer.serve_if_full()
        return added[0] if len(added) == 1 else torch.cat(added)

    def _without_massive(self, acts_ND: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self.max_activation_norms is None:
            return acts_ND, 0
        limits = self.max_activation_norms[:: self.saes_per_hook]
        return without_massive(acts_ND, self._widths(acts_ND), limits)

    def at_each_hook(self, acts_ND: torch.Tensor) -> Sequence[torch.Tensor]:
        """Splits activations [N, D] into those of each hook, and returns them for each SAE that is trained there."""
        at_hooks = acts_ND.split(self._widths(acts_ND), dim=-1)
        return [acts for acts in at_hooks for _ in range(self.saes_per_hook)]

    def _widths(self, acts_ND: torch.Tensor) -> list[int]:
        return self.widths or [acts_ND.shape[-1]]

    def _norms(self, acts_ND: torch.Tensor) -> torch.Tensor:
        """Returns the L2 norms [H, N] at each of H hooks."""
        return torch.stack([acts.float().norm(dim=-1) for acts in self.at_each_hook(acts_ND)])

    def calibrate(self, n_batches: int, max_norm_multiple: float | None) -> torch.Tensor:
        """Measures the first activations of the stream and sets the norm limits. The activations stay in the stream.

        Args:
            n_batches: how many batches to measure.
            max_norm_multiple: the norm limit at each hook, as a multiple of the median L2 norm there; None for no
                limit.

        Returns:
            This rank's measured activations [N, D] without the massive ones. All ranks together measure n_batches x
            batch_size activations or a few more, massive ones included.

        Raises:
            UserError: there is a norm limit, and the median norm is not finite.
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
                        f"--lm_dtype {self.source.dtype}: the median norm of the activations is {median}; use another"
                        " dtype"
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
        """Waits until the rows that run ahead are done. The source is then not in use until the next batch is taken."""
        if self._next is not None:
            self._next[1].exception()

    def clear(self) -> None:
        """Frees the activations that the stream holds, and does not count them as kept. No batch can be taken then."""
        self.wait()
        self._next = None
        self.n_kept -= len(self.buffer)
        self.buffer.clear()

    def close(self) -> None:
        """Waits until the rows that run ahead are done. The stream does not run rows ahead after that."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that, with the arguments, determines the next batches. Only rank 0's state is complete."""
        return {
            "buffer": self.buffer.state_dict(),
            "counts": {name: getattr(self, name) for name in self._COUNTS},
            "max_activation_norms": self.max_activation_norms,
            "median_norms": self.median_norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. The run that saved it may have had another number of ranks."""
        self.buffer.load_state_dict(state["buffer"], self.device)
        for name, count in state["counts"].items():
            setattr(self, name, count)
        self.max_activation_norms = state["max_activation_norms"]
        self.median_norms = state.get("median_norms")  # older checkpoints have none
        self._order = self._row_order()
