"""Which bytes of a tensor's memory nobody has written yet.

Memory of `torch.empty` and its kin is known by its storage; what of it holds other bits than the fill of
`tests.support.allocations` has been written by PyTorch, what a kernel wrote is kept from launch to launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .arena import Storage

_MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@dataclass
class _Made:
    """Memory made without values; ``unset`` are its bytes that nobody has written, None before anybody asked."""

    memory: StorageWeakRef
    dtype: torch.dtype
    unset: np.ndarray | None = None


class Unset:
    """The storages that were made without values."""

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remembers what is made without values."""
        with mock.patch.object(*_MAKERS[0], self._watched(torch.empty)):
            with mock.patch.object(*_MAKERS[1], self._watched(torch.empty_like)):
                with mock.patch.object(*_MAKERS[2], self._watched(torch.empty_strided)):
                    with mock.patch.object(*_MAKERS[3], self._watched(torch.Tensor.new_empty)):
                        yield
        self._made.clear()

    def _watched(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments: Any, **options: Any) -> torch.Tensor:
            found = make(*arguments, **options)
            if type(found) is torch.Tensor and found.device.type == "cpu" and found.numel():
                storage = found.untyped_storage()
                self._made[storage.data_ptr()] = _Made(StorageWeakRef(storage), found.dtype)
            return found

        return made

    def storage(self, tensor: torch.Tensor) -> Storage:
        """The memory of a tensor, as the arena takes it."""
        memory = tensor.untyped_storage()
        address, size = memory.data_ptr(), memory.nbytes()
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.zeros(0, np.uint8)
        made = self._made.get(address)
        if made is None or made.memory.expired():
            return Storage(data, address % 256)
        if made.unset is None:
            made.unset = np.ones(size, bool)
        if made.unset.any():
            elements = torch.empty(0, dtype=made.dtype).set_(memory)
            floating = made.dtype.is_floating_point
            held = torch.isnan(elements) if floating else elements == torch.iinfo(made.dtype).max
            made.unset &= np.repeat(held.numpy(), made.dtype.itemsize)
        return Storage(data, address % 256, made.unset if made.unset.any() else None)
