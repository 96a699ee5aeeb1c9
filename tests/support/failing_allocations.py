"""Errors of memory that has run out: real ones of this machine's allocators, and those of CUDA in its own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch


def in_numpy(*_: Any, **__: Any) -> NoReturn:
    np.empty(2**50)
    raise AssertionError("this machine has 8 PiB")


def on_the_cpu(*_: Any, **__: Any) -> NoReturn:
    torch.empty(2**50)
    raise AssertionError("this machine has 4 PiB")


def on_a_gpu(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.12 GiB free.")


def in_the_driver(*_: Any, **__: Any) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously")


def in_cublas(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def in_cudnn(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def of_a_mapped_file(*_: Any, **__: Any) -> NoReturn:
    raise OSError(12, "Cannot allocate memory")


ALL: tuple[Callable[..., NoReturn], ...] = (
    in_numpy,
    on_the_cpu,
    on_a_gpu,
    in_the_driver,
    in_cublas,
    in_cudnn,
    of_a_mapped_file,
)
