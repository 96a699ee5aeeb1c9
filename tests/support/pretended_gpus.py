"""GPUs that are pretended on the CPU: tensors compute there, and know which device they would be on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
_ONLY_READ = {torch._has_compatible_shallow_copy_type}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_}


class PretendedGPUs(TorchFunctionMode):
    """Context in which tensors can be moved to any `cuda:N`. An operation on tensors of two devices raises an error.

    As in torch, a tensor without axes and an index may be on the CPU. Memory belongs to a device, so views and
    parameters are where their memory is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, torch.device] = {}  # by the address of the memory; the CPU where there is none

    def place(self, tensor: torch.Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return self.places.get(tensor.untyped_storage().data_ptr(), CPU)

    def _put(self, tensor: torch.Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            if address := tensor.untyped_storage().data_ptr():
                self.places[address] = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.place(args[0])
        if func == torch.Tensor.is_cuda.__get__:
            return self.place(args[0]).type == "cuda"
        if func in _ONLY_READ or getattr(func, "__name__", "") == "__get__":  # as T, which is a view
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._moved(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(args[0], CPU if func is torch.Tensor.cpu else "cuda:0")
        asked = kwargs.pop("device", None)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = self._device_of(func, args, tensors)
        found = func(*args, **kwargs)
        device = before if asked is None else _with_number(asked)
        mine = {id(tensor) for tensor in tensors}
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in mine and not self._is_view_of(leaf, tensors):
                self._put(leaf, device)
        return found

    def _device_of(self, func: Callable[..., Any], args: Any, tensors: list[torch.Tensor]) -> torch.device:
        """Returns the device of an operation on these tensors."""
        with_memory = [tensor for tensor in tensors if tensor.numel()]
        places = [self.place(tensor) for tensor in with_memory if tensor.ndim or self.place(tensor) != CPU]
        if not places:
            return CPU
        if func in _INDEXING:  # the indices may be on the CPU
            places = [places[0], *(place for place in places[1:] if place != CPU)]
            value = args[-1]
            if func is torch.Tensor.__setitem__ and isinstance(value, torch.Tensor) and value.ndim and value.numel():
                places.append(self.place(value))
        if func == torch.Tensor.data.__set__ or func is torch.Tensor.copy_:
            return places[0]
        assert len(set(places)) == 1, f"{getattr(func, '__name__', func)} of tensors on {sorted(map(str, set(places)))}"
        return places[0]

    def _is_view_of(self, tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
        with torch._C.DisableTorchFunction():
            address = tensor.untyped_storage().data_ptr()
            return any(other.untyped_storage().data_ptr() == address for other in others)

    def _moved(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, options = None, []
        for argument in [kwargs.pop("device", None), *args]:
            if isinstance(argument, torch.Tensor):
                device, options = self.place(argument), [argument.dtype]
            elif isinstance(argument, str | torch.device):
                device = _with_number(argument)
            elif isinstance(argument, torch.dtype):
                options = [argument]
        before = self.place(tensor)
        with torch._C.DisableTorchFunction():
            moved = tensor.to(*options, dtype=kwargs["dtype"]) if "dtype" in kwargs else tensor.to(*options or [CPU])
            if moved is tensor and device in (None, before):
                return tensor
            if moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                moved = moved.detach().clone()
        self._put(moved, before if device is None else device)
        return moved


def _with_number(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device
