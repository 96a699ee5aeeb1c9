"""Records what a program does on a fake CUDA device: its memory, and the places where the host waits for the device.

Tensors on the CPU are real and have values, so the program takes its usual path. Tensors on the device have shapes
only. Import this module after `fake_device.install`.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from sae_toolkit import ROOT

# The host reads the number of results of these operators, or their result itself.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_"}


class Recorder(TorchDispatchMode):
    """Runs operators on CPU tensors as they are, and those on CUDA tensors in a `FakeTensorMode`.

    The `FakeTensorMode` raises an error if an operator mixes devices in a way that CUDA does not allow.

    Attributes:
        live_bytes: bytes of all storages on the device that are alive.
        peak_bytes: the most that `live_bytes` was since `begin`.
        peak_at: file and line of the program at that time.
        waits: how often the host waited for the device since `begin`, by the reason, file and line.
        n_operators: number of operators on the device since `begin`. Views are not counted.
        integer: the value of each integer that the host reads from the device.
        share_true: the share of true values in a mask on the device, where the number of true values matters.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.live_bytes = self.peak_bytes = 0
        self.peak_at = ""
        self.waits: Counter[str] = Counter()
        self.n_operators = 0
        self.integer = 1
        self.share_true = 1.0
        self.n_passed = 0  # how often `pass_events` was called
        self._storages: set[int] = set()
        self._pinned: set[int] = set()
        self._known: dict[int, int] = {}  # the value of these storages, where `integer` would not do

    def begin(self) -> None:
        """Begins a part of the program, which is recorded on its own."""
        self.peak_bytes = self.live_bytes
        self.peak_at = ""
        self.waits.clear()
        self.n_operators = 0
        self.pass_events()

    def pass_events(self) -> None:
        """Lets the device pass all events that were recorded so far."""
        self.n_passed += 1

    def wait(self, why: str) -> None:
        """Records that the host waits for the device."""
        self.waits[f"{why} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        target = kwargs.get("device")
        target_type = None if target is None else torch.device(target).type
        if not on_device and target_type != "cuda":
            return self._on_cpu(func, name, args, kwargs)
        if name == "aten::_to_copy" and target_type not in (None, tensors[0].device.type):
            self._copied(name, tensors[0], kwargs.get("non_blocking", False), target_type)
            if target_type == "cpu":
                return self._read(tensors[0], kwargs.get("dtype") or tensors[0].dtype)
        if name == "aten::copy_" and args[0].device.type != args[1].device.type:
            self._copied(name, args[1], len(args) > 2 and args[2], args[0].device.type, args[0])
            if args[0].device.type == "cpu":
                with unset_fake_temporarily():
                    return args[0].copy_(self._read(args[1], args[1].dtype))
        if name in _WAITING:
            self.wait(name)
            return self._result_that_is_read(func, name, args, kwargs)
        if name in _INDEXING:
            args = (args[0], self._indices(name, args[1]), *args[2:])
        out = func(*args, **kwargs)
        if not func.is_view:
            self.n_operators += 1
        self._track(out)
        return out

    def _on_cpu(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name == "aten::is_pinned":
            return self._key(args[0]) in self._pinned
        with unset_fake_temporarily():
            if name == "aten::_pin_memory":
                out = args[0].clone()
                self._pin(out)
                return out
            pinned = kwargs.get("pin_memory")
            out = func(*args, **(kwargs | {"pin_memory": False} if pinned else kwargs))
            if pinned:
                self._pin(out)
            return out

    def _pin(self, tensor: torch.Tensor) -> None:
        key = self._key(tensor)
        self._pinned.add(key)
        weakref.finalize(tensor.untyped_storage(), self._pinned.discard, key)

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _copied(
        self, name: str, source: torch.Tensor, non_blocking: bool, target: str, into: torch.Tensor | None = None
    ) -> None:
        """Records a wait unless a copy between host and device may go on beside the program.

        torch pins the memory that a copy to the host allocates. Other memory of the host has to be pinned already.
        """
        on_host = source if source.device.type == "cpu" else into
        pinned = on_host is None or self._key(on_host) in self._pinned
        if not (non_blocking and pinned):
            self.wait(f"{name} to {target} of {tuple(source.shape)}")

    def _value(self, dtype: torch.dtype) -> bool | int | float:
        """Returns what the host reads from the device: `integer`, and otherwise true or 1."""
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else self.integer

    def _read(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns a copy on the host."""
        with unset_fake_temporarily():
            return torch.full(tensor.shape, self._known.get(self._key(tensor), self._value(dtype)), dtype=dtype)

    def _result_that_is_read(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name == "aten::_local_scalar_dense":
            return self._value(args[0].dtype)
        if name == "aten::equal":
            return True
        n = max(1, int(self.share_true * args[0].numel()))
        with self.fake_mode:
            if name == "aten::nonzero":
                out: Any = torch.empty(n, args[0].ndim, dtype=torch.long, device=args[0].device)
            elif name == "aten::masked_select":
                out = args[0].new_empty(n)
            elif name == "aten::bincount":
                length = max(self.integer, kwargs.get("minlength", args[2] if len(args) > 2 else 0))
                out = torch.empty(length, dtype=torch.long, device=args[0].device)
            elif name == "aten::unique_consecutive":  # as if all values were equal
                out = (args[0].new_empty(1), torch.empty_like(args[0]), args[0].new_empty(1, dtype=torch.long))
                self._known[self._key(out[2])] = args[0].numel()
            else:
                raise NotImplementedError(f"{name} at {_place()}: what it returns on a fake device is not written yet")
        self._track(out)
        return out

    def _indices(self, name: str, indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Returns indices without masks. The host waits for the number of true values, and to copy an index over."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is None or (index.device.type == "cuda" and index.dtype != torch.bool):
                found.append(index)
                continue
            self.wait(f"{name} with {'a mask' if index.dtype == torch.bool else 'an index on the CPU'}")
            if index.dtype != torch.bool:
                found.append(index)
                continue
            n = int(self.share_true * index.numel())
            with self.fake_mode:
                found += [torch.empty(n, dtype=torch.long, device="cuda") for _ in range(index.ndim)]
        return found

    def _track(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda" or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key, n_bytes = storage._cdata, storage.nbytes()
            if key in self._storages:
                continue
            self._storages.add(key)
            self.live_bytes += n_bytes
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self.peak_at = self.live_bytes, _place()
            weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self._storages.discard(key)
        self._known.pop(key, None)
        self.live_bytes -= n_bytes


def _place() -> str:
    """Returns file and line of the innermost function of the package."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT / "sae_toolkit")):
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of the package"


class _FlashAttention(TorchFunctionMode):
    """Takes the place of torch's attention on the device, whose choice of a kernel is in the CUDA build only.

    The flash kernel that torch chooses there holds nothing of size T x T, if it gets no mask.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda":
            if kwargs.get("attn_mask") is not None:
                raise NotImplementedError("attention with a mask, which the flash kernel does not take")
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Context manager in which tensors on "cuda" are fake. It yields the recorder of what happens there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode, Recorder(fake_mode) as recorder, _FlashAttention():

        class Event:
            """A CUDA event. To wait for it before `pass_events` was called is a wait for the device."""

            def __init__(self, *_args: Any, **_kwargs: Any) -> None:
                self._recorded_at = -1

            def record(self, *_stream: Any) -> None:
                self._recorded_at = recorder.n_passed

            def synchronize(self) -> None:
                if self._recorded_at == recorder.n_passed:
                    recorder.wait("an event that was just recorded")

        # Transformers would take fake tensors for those of a graph that is traced, and build a mask for attention.
        masking_utils.is_tracing = lambda tensor=None: False
        with suppress(ModuleNotFoundError):  # a kernel is compared with exact results before it is used; none are here
            kernel = import_module("sae_toolkit.steps.feature_kernel")
            kernel._works_on = lambda device, d_in: True
        torch.cuda.Event = Event  # type: ignore[misc, assignment]
        torch.cuda.synchronize = lambda device=None: recorder.wait("torch.cuda.synchronize")
        yield recorder
