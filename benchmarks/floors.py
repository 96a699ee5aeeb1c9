"""The least time that the hardware allows for the job of train_speed.py.

It has two parts: the language model alone, as measured, and the SAE's step, whose operations and bytes are counted and
divided by measured peaks of the hardware.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sae_toolkit.model.devices import choose_lm_dtype
from sae_toolkit.model.loading import find_model, load_language_model


def measure_floors(size: Mapping[str, int], device: str, model_dir: Path, n_rows: int, n_steps: int) -> dict[str, Any]:
    """Measures the floors of a job.

    Args:
        size: of the job, from `train_job.JOBS`.
        device: cpu or cuda.
        model_dir: the saved language model.
        n_rows: contexts in one forward pass of the language model.
        n_steps: timed steps of a contender, which decide how long the language model is measured.

    Returns:
        Seconds a token: `lm`, the language model alone; `sae`, the SAE's step; `sae_bfloat16`, the same with its
        products in the language model's dtype. The measured peaks: `gflops`, `gflops_bfloat16` and `gigabytes` (GB/s).
        `dtype`: that of the language model.
    """
    dtype = choose_lm_dtype("auto", device)
    lm = _seconds_of_language_model(size, device, model_dir, dtype, n_rows, n_steps)
    # The encoder's product in the SAE's own dtype, float32 (on a GPU in TF32). Where a CPU has bfloat16 arithmetic,
    # training uses it, so there also in bfloat16.
    in_float32 = _flops(size, device, "highest" if device == "cpu" else "high")
    in_bfloat16 = _flops(size, device, "medium") if device == "cpu" and dtype == torch.bfloat16 else in_float32
    bandwidth = _bandwidth(device)
    batch = size["batch"]
    operations, moved = step_operations(size), step_bytes(size)
    return {
        "lm": lm,
        "sae": (operations / in_float32 + moved / bandwidth) / batch,
        "sae_bfloat16": (operations / in_bfloat16 + moved / bandwidth) / batch,
        "gflops": in_float32 / 1e9,
        "gflops_bfloat16": in_bfloat16 / 1e9,
        "gigabytes": bandwidth / 1e9,
        "dtype": str(dtype),
    }


def step_operations(size: Mapping[str, int]) -> int:
    """Returns the operations of an SAE's step.

    They are the encoder's product on all features; on k features the decoder's, the gradient of the values and those of
    both weights.
    """
    return 2 * size["batch"] * size["d_in"] * (size["d_sae"] + 4 * size["k"])


def step_bytes(size: Mapping[str, int]) -> int:
    """Returns the least number of bytes that an SAE's step reads and writes.

    Each weight is read in the forward and in the backward pass, its gradient is written there and read for clipping,
    and Adam reads 4 values and writes 3. The pre-activations are written and read.
    """
    return 4 * (2 * size["d_in"] * size["d_sae"] * (2 + 1 + 1 + 7) + 2 * size["batch"] * size["d_sae"])


def _seconds_of_language_model(
    size: Mapping[str, int], device: str, model_dir: Path, dtype: torch.dtype, n_rows: int, n_steps: int
) -> float:
    """Returns the seconds a token of the language model up to its hook."""
    model = load_language_model(find_model(str(model_dir)), f"model.layers.{size['layer']}", device, dtype)
    model.keep_only_up_to_hook()
    tokens_BT = torch.randint(3, model.config.vocab_size, (n_rows, size["context"]))
    return _seconds(lambda: model.activations(tokens_BT), min(15.0, 0.15 * n_steps), device) / tokens_BT.numel()


def _flops(size: Mapping[str, int], device: str, precision: str) -> float:
    """Returns the operations per second in the encoder's product, at one of torch's precisions."""
    torch.set_float32_matmul_precision(precision)
    x = torch.randn(size["batch"], size["d_in"], device=device)
    W = torch.randn(size["d_sae"], size["d_in"], device=device)
    return 2 * size["batch"] * size["d_in"] * size["d_sae"] / _seconds(lambda: F.linear(x, W), 5, device)


def _bandwidth(device: str) -> float:
    """Returns the bytes per second that a copy reads and writes."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _seconds(lambda: target.copy_(source), 2, device)


def _seconds(work: Callable[[], Any], for_seconds: float, device: str) -> float:
    """Returns the median time of some work, repeated for about as long as a contender runs."""
    times: list[float] = []
    end = time.perf_counter() + for_seconds
    while time.perf_counter() < end or len(times) < 4:
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
