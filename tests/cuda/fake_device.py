"""A CUDA device for fake tensors, on a machine without a GPU, in a torch that was built with CUDA or without.

Call `install` before torch is imported. It compiles `device_guard.cpp` with g++, once for each version of torch, and
loads it. The library cannot be unloaded, so this belongs into a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("device_guard.cpp")
_BYTES_OF_CARD = 80 * 2**30


def install() -> None:
    """Loads the device, and makes torch.cuda answer as with one card of 80 GiB that supports bfloat16.

    Raises:
        RuntimeError: torch was imported earlier.
        subprocess.CalledProcessError: the library cannot be compiled.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake device has to be installed before torch is imported")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_directory = Path(spec.origin).parent
    library = _compiled(torch_directory)
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_directory / "lib" / name), ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(library))
    import torch  # noqa: F401 (between the hooks and the guard: see device_guard.cpp)

    device.register_device_guard()
    _answer_as_one_card()


def _compiled(torch_directory: Path) -> Path:
    version = (torch_directory / "version.py").read_bytes()
    key = hashlib.sha256(version + str(torch_directory).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"sae-toolkit-fake-device-{os.getuid()}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        include = torch_directory / "include"
        subprocess.run(
            [
                *("g++", "-shared", "-fPIC", "-std=c++20", "-O1", str(_SOURCE), "-o", str(unfinished)),
                *(f"-I{include}", f"-I{sysconfig.get_path('include')}"),
                *(f"-L{torch_directory / 'lib'}", "-lc10", "-ltorch_cpu"),
            ],
            check=True,
        )
        unfinished.rename(library)  # at once, as another process may be waiting for it
    return library


def _answer_as_one_card() -> None:
    import torch
    from torch._subclasses import fake_tensor

    class AtDevice(torch.cuda.device):
        def __init__(self, device: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_error: object) -> None:
            pass

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (_BYTES_OF_CARD, _BYTES_OF_CARD),
        "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "device": AtDevice,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # Neither may allocate on the card: the creation of a fake tensor, and that of a tensor from numbers.
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = True
    torch.autograd.set_multithreading_enabled(False)  # the modes of this thread see its backward passes too
