"""The devices and dtypes that a run uses, and the memory that is free on them."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from sae_lens.util import dtype_to_str

from sae_toolkit.errors import UserError, failed_allocation, is_out_of_memory, one_line

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = {_M_MMAP_THRESHOLD: 2**28, _M_TRIM_THRESHOLD: 2**30}
_RETURNED = {_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26}  # where glibc's own limits end when they grow
_kept = [False]  # what `freed_memory` chose, the innermost last


def choose_device(device: str, local_rank: int = 0, flag: str = "--device") -> str:
    """Returns the device to run on: for `auto` a CUDA device if torch sees one, else the CPU.

    Args:
        device: cpu, cuda, cuda:N, mps (the GPU of an Apple machine) or auto.
        local_rank: this process's rank on its machine. With `auto` and `cuda` each rank gets a device of its own.
        flag: the flag that named the device, for messages.

    Raises:
        UserError: the name is none of these, or names a device that torch does not see.
    """
    if device == "auto":
        if torch.backends.mps.is_available():
            log.info("%s auto: the CPU; torch sees an Apple GPU too, which %s mps uses (not measured)", flag, flag)
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank:
        device = f"cuda:{local_rank}"
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", device) is None:
        raise UserError(f"{flag} {device}: must be cpu, cuda, cuda:N, mps or auto")
    parsed = torch.device(device)
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{flag} mps: torch {torch.__version__} sees no Apple GPU on this machine; use {flag} cpu")
    if parsed.type == "cuda":
        n_devices = torch.cuda.device_count()
        if not torch.cuda.is_available() or (parsed.index or 0) >= n_devices:
            raise UserError(
                f"{flag} {device}: torch {torch.__version__} sees {n_devices} CUDA devices on this machine;"
                f" use {flag} cpu, or install a torch built for this machine's driver (README, Troubleshooting)"
            )
    return device


def choose_llm_device(llm_device: str | None, n_devices: int, device: str) -> str:
    """Returns the language model's first device: `llm_device` if it is given, else the SAE's device.

    Args:
        llm_device: the value of --llm_device; None if it was not given.
        n_devices: the number of devices that the model is to be spread over.
        device: the SAE's device.

    Raises:
        UserError: torch does not see the device, or sees fewer than `n_devices` devices from that one on.
    """
    chosen = device if llm_device is None else choose_device(llm_device, flag="--llm_device")
    parsed = torch.device(chosen)
    there = torch.cuda.device_count() - (parsed.index or 0) if parsed.type == "cuda" else 0
    if n_devices > 1 and n_devices > there:
        raise UserError(f"--n_devices {n_devices}: torch sees {there} CUDA devices from {chosen} on; lower it")
    return chosen


def choose_lm_dtype(dtype: str, device: str) -> torch.dtype:
    """Returns the language model's dtype: for `auto` bfloat16 if the hardware is faster in it, else float32.

    Raises:
        UserError: another dtype than float32 on an Apple GPU.
    """
    if torch.device(device).type == "mps":
        if dtype not in ("auto", "float32"):
            raise UserError(f"--lm_dtype {dtype}: on mps only float32 is supported; leave it out")
        return torch.float32
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = cpu_is_faster_in_bfloat16(torch.cpu.get_capabilities())
    return torch.bfloat16 if has_bfloat16 else torch.float32


def cpu_is_faster_in_bfloat16(capabilities: Mapping[str, bool | int | str]) -> bool:
    """Returns whether a CPU multiplies matrices faster in bfloat16 than in float32.

    With AMX it does, and so do AMD's processors with AVX512-BF16. On Intel's, AVX512-BF16 alone (where a virtual
    machine hides AMX) has half the speed of float32: 164 and 307 GFLOP/s for 2,048 x 576 x 1,536 on 2 cores.

    Args:
        capabilities: what `torch.cpu.get_capabilities` returns.
    """
    if capabilities.get("amx_bf16"):
        return True
    return bool(capabilities.get("avx512_bf16")) and not str(capabilities.get("cpu_name", "")).startswith("Intel")


@contextmanager
def out_of_memory_answered(what: str, answer: str | Callable[[], str]) -> Iterator[None]:
    """Context manager that turns an error about memory that has run out into a `UserError` of one line.

    Args:
        what: the flag and what was tried, such as `--sae_path ./my_sae: loading it`.
        answer: what to do about it, or a function that finds that out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(failed_allocation(error) or error)
        to_do = answer if isinstance(answer, str) else answer()
        raise UserError(f"{what} ran out of memory ({reason}); {to_do}") from None


def release_memory() -> None:
    """Returns the memory that nothing refers to any more to the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def freed_memory(device: str, *, is_kept: bool) -> Iterator[None]:
    """Context manager that chooses whether a process on the CPU keeps the memory that tensors leave.

    glibc returns large blocks to the system. Each step of a training then gets their pages anew, and each page zeroed:
    at 32x a seventh of the time. If it is kept, blocks of up to 256 MiB stay, and up to 1 GiB at the end of the heap.
    That is for work which asks for the same sizes again and again. With other sizes the heap gets holes, and the peak
    rises by up to 1 GiB. At its end the choice is again that of before.

    It does nothing on other devices, with other C libraries, and where the environment sets these limits.

    Args:
        device: where the tensors are.
        is_kept: whether the process keeps the memory, or returns it, as it does where nothing is chosen.
    """
    before = _kept[-1]
    _kept.append(is_kept)
    _limit_malloc(device, is_kept, before)
    try:
        yield
    finally:
        _kept.pop()
        _limit_malloc(device, before, is_kept)


def _limit_malloc(device: str, is_kept: bool, was_kept: bool) -> None:
    environment = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if is_kept == was_kept or torch.device(device).type != "cpu" or environment:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for limit, size in (_KEPT if is_kept else _RETURNED).items():
            libc.mallopt(limit, size)
        if not is_kept:
            libc.malloc_trim(0)


def with_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on a device that has float64: itself, or on mps, which has none, a copy on the CPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


@contextmanager
def random_states_restored(*devices: str) -> Iterator[None]:
    """Context manager that restores the random states of the CPU and of these devices at its end."""
    types = {torch.device(device).type for device in devices}
    mps_state = torch.mps.get_rng_state() if "mps" in types else None
    with torch.random.fork_rng([device for device in devices if torch.device(device).type == "cuda"]):
        yield
    if mps_state is not None:
        torch.mps.set_rng_state(mps_state)


def free_memory(device: str) -> int:
    """Returns how many bytes a run can use on a device. On a CPU they include what this process already holds."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if torch.device(device).type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def what_would_fit(
    n_parameters: int, device: str, dtype: torch.dtype, n_devices: int | None, devices: str, free: int
) -> str:
    """Returns a phrase that says what a model takes, what was free, and which flags would let it fit.

    Args:
        n_parameters: the model's number of parameters.
        device: the first device that it was to be loaded on.
        dtype: the dtype that it was to be loaded in.
        n_devices: the number of CUDA devices, from `device` on; None if the script has no --n_devices.
        devices: the devices, in words.
        free: bytes that were free on them.
    """
    takes = n_parameters * dtype.itemsize
    flags = []
    if dtype.itemsize > 2 and 2 * n_parameters < free:
        flags.append("--lm_dtype bfloat16")
    if torch.device(device).type == "cuda":
        if n := _n_devices_for(takes, device, n_devices, free):
            flags.append(f"--n_devices {n}")
        on_cpu = n_parameters * max(dtype.itemsize, choose_lm_dtype("auto", "cpu").itemsize)
        if on_cpu < free_memory("cpu"):
            flags.append("--device cpu" if n_devices is None else "--llm_device cpu")
    return (
        f"it takes about {takes / 2**30:.2f} GiB in {dtype_to_str(dtype)}, and {free / 2**30:.2f} GiB were free on"
        f" {devices}; " + (f"it would fit with {' or '.join(flags)}" if flags else "a smaller model is needed")
    )


def _n_devices_for(takes: int, device: str, n_devices: int | None, free: int) -> int | None:
    """Returns how many CUDA devices, from `device` on, have room for `takes` bytes; None if no number has."""
    if n_devices is None:
        return None
    first = torch.device(device).index or 0
    for index in range(first + n_devices, torch.cuda.device_count()):
        free += free_memory(f"cuda:{index}")
        if takes < free:
            return index + 1 - first
    return None
