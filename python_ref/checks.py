"""Checks of what a caller hands in. Every message names the argument, what was expected, what came."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def concrete(tensor: Tensor) -> bool:
    """Whether reading a value costs no device synchronisation and breaks no trace."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)  # a fake tensor has no values
    if not plain or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # torch.vmap's have one for every sample, and look like any other.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_float(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    check_tensor(name, value)
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype {[str(d) for d in FLOATS]}, got {value.dtype}")


def check_shape(name: str, value: Tensor, shape: tuple[int | None, ...], axes: str = "") -> None:
    """``None`` in ``shape`` admits any size; ``axes`` names the axes in the message."""
    got = tuple(value.shape)
    if got == shape:
        return
    if len(got) != len(shape) or any(want is not None and want != size for want, size in zip(shape, got, strict=True)):
        expected = "[" + ", ".join("*" if want is None else str(want) for want in shape) + "]"
        raise ValueError(f"{name}: expected shape {axes + ' = ' if axes else ''}{expected}, got {list(got)}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_ids(name: str, value: Tensor, shape: tuple[int, ...] | torch.Size, low: int, high: int) -> None:
    """Integers in ``low … high``; the range is checked where that costs no synchronisation."""
    check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {value.dtype}")
    check_shape(name, value, tuple(shape))
    if concrete(value) and value.numel():
        least, most = (int(bound) for bound in torch.aminmax(value))
        if least < low or most > high:
            raise ValueError(f"{name}: expected values in {low} … {high}, got {least} … {most}")


def check_no_tangent(name: str, value: Tensor) -> None:
    """The operations have no forward-mode derivative, and the dispatcher would drop a tangent without a word.

    Raises:
        NotImplementedError: the tensor carries one.
    """
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{name}: expected a tensor without a forward-mode tangent; use backward mode")


def check_rows(rows: Tensor, count: int, device: torch.device) -> Tensor:
    """``rows`` of a batch of ``count``, indices or a ``[count]`` bool mask, as a mask.

    Raises:
        TypeError, ValueError: they are neither, or out of range.
    """
    check_tensor("rows", rows)
    if rows.dtype == torch.bool:
        check_shape("rows", rows, (count,))
        return rows
    check_ids("rows", rows, tuple(rows.shape[:1]), 0, count - 1)
    return torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, rows.long(), True)


def plain_int(value: object) -> int | None:
    """An integer of Python's, of NumPy's or of any other kind as a plain one; None for what is none, as a bool."""
    # A SymInt: a size that torch.export or torch.compile has left open.
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)):
        return None  # a tensor's number may lie on another device
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_positive(name: str, value: object, least: int = 1) -> int:
    """The integer, as `plain_int` has it: what is kept must be one, for torch.compile and for JSON."""
    number = plain_int(value)
    if number is None or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return number
