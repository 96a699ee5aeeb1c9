"""The processes that train one SAE together: which of them this one is, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sae_toolkit.distributed.torchrun import is_under_torchrun, rank_in_environment
from sae_toolkit.errors import RunFailed, one_line

T = TypeVar("T")

# A rank that is gone is noticed at once; these are for one that hangs. In the middle of a step all ranks are at the
# same place, between steps the others may wait for one that reads a text or writes a checkpoint.
_WITHIN_A_STEP = timedelta(minutes=5)
_BETWEEN_STEPS = timedelta(days=2)


class Ranks:
    """This process among those that torchrun started; the only one where it started none.

    Its methods are collective: all ranks call them in the same order. A single rank is given back what it gave.

    Args:
        rank: of this process, from 0; the one of rank 0 reads the text, writes and speaks.
        size: how many there are (the world size).
        local_rank: of this process among those of its machine, from 0.
        local_size: how many there are on its machine.
        control: the group of what is said between steps, on CPUs.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self._control = control

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the least of each element over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the largest of each element over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if not self.is_alone:
            with _none_lost():
                dist.all_reduce(tensor, operation)
        return tensor

    def start_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Begins to add up a tensor over the ranks, in place; `finish` waits for it."""
        if self.is_alone:
            return None
        with _none_lost():
            return dist.all_reduce(tensor if tensor.is_contiguous() else tensor.t(), async_op=True)

    def finish(self, works: list[dist.Work | None]) -> None:
        with _none_lost():
            for work in works:
                if work is not None:
                    work.wait()
        works.clear()

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The tensors [N_r, ...] of all ranks, which may differ in their number of rows."""
        if self.is_alone:
            return [rows]
        lengths = [n for (n,) in self._gather_counts((len(rows),), None)]  # within a step: no patience for days
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in lengths]
        with _none_lost():
            dist.all_gather(found, padded)
        return [part[:length] for part, length in zip(found, lengths, strict=True)]

    def gather_to_main(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The CPU tensors [N_r, D] of all ranks, on rank 0; an empty list on the others."""
        lengths = [n for (n,) in self.counts(len(rows))]
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in lengths] if self.is_main else None
        raw = None if found is None else [part.view(torch.uint8) for part in found]
        with _none_lost():
            dist.gather(padded.view(torch.uint8), raw, dst=0, group=self._control)
        return [part[:length] for part, length in zip(found or [], lengths if found else [], strict=True)]

    def scatter_from_main(self, rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """This rank's part of the CPU tensor [N, ...] that rank 0 has, in equal parts.

        Args:
            rows: on rank 0.
            like: of the part's shape and dtype.
        """
        part = torch.empty_like(like, device="cpu", memory_format=torch.contiguous_format)
        parts = None if rows is None else [each.contiguous().view(torch.uint8) for each in rows.chunk(self.size)]
        with _none_lost():
            dist.scatter(part.view(torch.uint8), parts, src=0, group=self._control)
        return part

    def counts(self, *numbers: int) -> list[tuple[int, ...]]:
        """The whole numbers of each rank."""
        return [numbers] if self.is_alone else self._gather_counts(numbers, self._control)

    def _gather_counts(self, numbers: tuple[int, ...], group: dist.ProcessGroup | None) -> list[tuple[int, ...]]:
        mine = torch.tensor(numbers)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _none_lost():
            dist.all_gather(found, mine, group=group)
        return [tuple(each.tolist()) for each in found]

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over the ranks; so that all of them do what one of them wants."""
        return tuple(map(max, zip(*self.counts(*numbers), strict=True)))

    def broadcast(self, thing: T) -> T:
        """What rank 0 has, a small thing."""
        if self.is_alone:
            return thing
        things: list[Any] = [thing]
        with _none_lost():
            dist.broadcast_object_list(things, src=0, group=self._control)
        return things[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Makes a tensor that of rank 0, in place."""
        if not self.is_alone:
            with _none_lost():
                dist.broadcast(tensor if tensor.is_contiguous() else tensor.t(), src=0)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Lets one process of each machine do something, such as a download, before the others of it do."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def wait(self) -> None:
        """Waits until all ranks are here."""
        self.counts()


ALONE = Ranks()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the other processes that torchrun started, over gloo for CPUs and NCCL for GPUs.

    Raises:
        RunFailed: they do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if is_under_torchrun() else 1
    if size == 1:
        yield ALONE
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    with _none_lost():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_WITHIN_A_STEP)
        control = dist.new_group(backend="gloo", timeout=_BETWEEN_STEPS)
    try:
        yield Ranks(rank_in_environment(), size, local_rank, local_size, control)
    finally:
        dist.destroy_process_group()


@contextmanager
def _none_lost() -> Iterator[None]:
    """A collective that fails says that another rank is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's are torch's DistBackendError, or this alone
        raise RunFailed(
            f"rank {rank_in_environment()}: another process of this run is gone or hangs"
            f" ({one_line(error).rpartition('] ')[2]})"
        ) from error
