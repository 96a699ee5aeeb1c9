"""What the parts of gpu.py share: the job on a device, its clock and memory, and tables that are printed row by row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Bench:
    """One run of gpu.py.

    Args:
        size: the job's sizes, from `train_job.JOBS`.
        device: cuda, or cpu with --tiny.
        work_dir: where the model, the text and the runs are.
        found: the figures that the last part compares with the targets, by name. The parts add to it.
    """

    size: Mapping[str, Any]
    device: str
    work_dir: Path
    found: dict[str, float] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers of features: those of presets/llama3-8b.args, and those of the training benchmark."""
        return self.size["d_sae"] // 4, self.size["d_sae"]

    @property
    def model_dir(self) -> Path:
        """Directory of the language model, all layers."""
        return self.work_dir / "model"

    def milliseconds(self, work: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
        """Returns the mean time of some work. The host runs ahead of the device between repetitions, as in training."""
        for _ in range(warm_up):
            work()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / repeats * 1e3

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives memory back that nothing refers to, and starts a new measurement of the peak."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Returns the most memory that torch allocated since `free`, in GiB; None on a CPU, which does not count it."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_cuda else None


class Table:
    """A Markdown table. Each row is printed at once, so that a run that is cut short shows what it found."""

    def __init__(self, *columns: str) -> None:
        self.row(*columns)
        self.row(*("---" for _ in columns))

    def row(self, *cells: object) -> None:
        print(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |", flush=True)


def shown(value: float | None, form: str = ".2f") -> str:
    """Returns a number as a cell, empty where there is none."""
    return "" if value is None else format(value, form)
