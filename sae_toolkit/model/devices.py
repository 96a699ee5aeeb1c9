"""Devices, dtypes and free memory."""

from __future__ import annotations

import re

import psutil
import torch

from sae_toolkit.errors import UserError


def choose_device(device: str, local_rank: int = 0) -> str:
    """The device to run on: `auto` is the first CUDA device, else the CPU.

    Args:
        local_rank: of this process, where several share the machine: `auto` and `cuda` are a device for each.

    Raises:
        UserError: a CUDA device was asked for that torch does not see.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank:
        device = f"cuda:{local_rank}"
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise UserError(f"--device {device}: must be cpu, cuda, cuda:N or auto")
    parsed = torch.device(device)
    if parsed.type == "cuda":
        n_devices = torch.cuda.device_count()
        if not torch.cuda.is_available() or (parsed.index or 0) >= n_devices:
            raise UserError(
                f"--device {device}: torch {torch.__version__} sees {n_devices} CUDA devices on this machine;"
                " use --device cpu, or install a torch built for this machine's driver (README, Troubleshooting)"
            )
    return device


def choose_llm_device(llm_device: str | None, n_devices: int, device: str) -> str:
    """The language model's device: the SAE's, unless another is asked for.

    Raises:
        UserError: a CUDA device was asked for that torch does not see, or more than there are.
    """
    try:
        chosen = device if llm_device is None else choose_device(llm_device)
    except UserError as error:
        raise UserError(str(error).replace("--device", "--llm_device", 1)) from None
    parsed = torch.device(chosen)
    there = torch.cuda.device_count() - (parsed.index or 0) if parsed.type == "cuda" else 0
    if n_devices > 1 and n_devices > there:
        raise UserError(f"--n_devices {n_devices}: torch sees {there} CUDA devices from {chosen} on")
    return chosen


def choose_lm_dtype(dtype: str, device: str) -> torch.dtype:
    """The language model's dtype: `auto` is bfloat16 where the hardware computes in it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: torch's, on whichever device, or numpy's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: str) -> int:
    """Bytes that a run on a device can take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
