"""The ranks, which are the processes that train one SAE together, and the operations between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sae_toolkit.distributed.torchrun import RANK_IS_GONE, is_under_torchrun, rank_in_environment
from sae_toolkit.errors import RunFailed, is_out_of_memory, one_line

T = TypeVar("T")

# How long the ranks wait for one that hangs. One that has ended is noticed at once. Within a step all ranks are at the
# same place. Between steps the others may have to wait for a rank that reads a text or writes a checkpoint.
_WITHIN_A_STEP = timedelta(minutes=5)
_BETWEEN_STEPS = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """The ranks that torchrun started, as seen by this one; a single rank where it started none.

    The methods are collective: all ranks call them in the same order. With a single rank nothing is sent.
    """

    rank: int = 0  # this process; rank 0 is the main one, which reads the text, writes files and logs
    size: int = 1  # the number of ranks (the world size)
    local_rank: int = 0  # this process among the ranks of its machine
    local_size: int = 1  # the number of ranks on this machine
    control: dist.ProcessGroup | None = None  # the gloo group for what is exchanged between steps

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the minimum of each element over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the maximum of each element over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if not self.is_alone:
            with _lost_ranks_reported():
                dist.all_reduce(tensor, operation)
        return tensor

    def start_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Starts to sum a tensor over the ranks, in place. `finish` waits for the sum."""
        if self.is_alone:
            return None
        with _lost_ranks_reported():
            return dist.all_reduce(tensor if tensor.is_contiguous() else tensor.t(), async_op=True)

    def finish(self, works: list[dist.Work | None]) -> None:
        """Waits for the sums that `start_sum` started, and empties the list."""
        with _lost_ranks_reported():
            for work in works:
                if work is not None:
                    work.wait()
        works.clear()

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Returns the tensors [N_r, ...] of all ranks. The number of rows N_r may differ between ranks."""
        if self.is_alone:
            return [rows]
        lengths = [n for (n,) in self._gather_counts((len(rows),), None)]  # not by `control`, which would wait for days
        padded = _padded(rows, max(lengths))
        found = [torch.empty_like(padded) for _ in lengths]
        with _lost_ranks_reported():
            dist.all_gather(found, padded)
        return [part[:length] for part, length in zip(found, lengths, strict=True)]

    def gather_to_main(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Returns the CPU tensors [N_r, ...] of all ranks on rank 0, and an empty list on the others."""
        lengths = [n for (n,) in self.counts(len(rows))]
        padded = _padded(rows, max(lengths))
        found = [torch.empty_like(padded) for _ in lengths] if self.is_main else None
        raw = None if found is None else [part.view(torch.uint8) for part in found]
        with _lost_ranks_reported():
            dist.gather(padded.view(torch.uint8), raw, dst=0, group=self.control)
        return [part[:length] for part, length in zip(found or [], lengths if found else [], strict=True)]

    def scatter_from_main(self, rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of a CPU tensor [N, ...] that is on rank 0, cut into equal parts.

        Args:
            rows: the tensor, on rank 0; None on the others.
            like: a tensor with the part's shape and dtype.
        """
        part = torch.empty_like(like, device="cpu", memory_format=torch.contiguous_format)
        parts = None if rows is None else [each.contiguous().view(torch.uint8) for each in rows.chunk(self.size)]
        with _lost_ranks_reported():
            dist.scatter(part.view(torch.uint8), parts, src=0, group=self.control)
        return part

    def counts(self, *numbers: int) -> list[tuple[int, ...]]:
        """Returns the integers that each rank passed, in the order of the ranks."""
        return [numbers] if self.is_alone else self._gather_counts(numbers, self.control)

    def _gather_counts(self, numbers: tuple[int, ...], group: dist.ProcessGroup | None) -> list[tuple[int, ...]]:
        mine = torch.tensor(numbers)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _lost_ranks_reported():
            dist.all_gather(found, mine, group=group)
        return [tuple(each.tolist()) for each in found]

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Returns the maximum of each number over the ranks, so that all ranks can act on what one of them saw."""
        return tuple(map(max, zip(*self.counts(*numbers), strict=True)))

    def broadcast(self, thing: T) -> T:
        """Returns the object that rank 0 passed. It is pickled, so it should be small."""
        if self.is_alone:
            return thing
        things: list[Any] = [thing]
        with _lost_ranks_reported():
            dist.broadcast_object_list(things, src=0, group=self.control)
        return things[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Copies rank 0's tensor into this rank's, in place."""
        if not self.is_alone:
            with _lost_ranks_reported():
                dist.broadcast(tensor if tensor.is_contiguous() else tensor.t(), src=0)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Context manager for work, such as a download, that local rank 0 of a machine does before its other ranks."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def wait(self) -> None:
        """Waits until all ranks have called this."""
        self.counts()


ALONE = Ranks()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the other ranks that torchrun started, over gloo for CPU tensors and NCCL for CUDA tensors.

    Raises:
        RunFailed: the other ranks do not join in time.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if is_under_torchrun() else 1
    if size == 1:
        yield ALONE
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    with _lost_ranks_reported():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_WITHIN_A_STEP)
        control = dist.new_group(backend="gloo", timeout=_BETWEEN_STEPS)
    try:
        yield Ranks(rank_in_environment(), size, local_rank, local_size, control)
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost_ranks_reported() -> Iterator[None]:
    """Context manager that turns the error of a collective operation into the message that another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise it or its subclass DistBackendError
        if is_out_of_memory(error):
            raise
        raise RunFailed(
            f"rank {rank_in_environment()}: {RANK_IS_GONE} or hangs ({one_line(error).rpartition('] ')[2]}); see"
            " what the other ranks logged"
        ) from error


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the rows followed by zeros, [length, ...], as collectives need tensors of equal shape."""
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
