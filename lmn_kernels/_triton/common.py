"""What all launchers share: dtypes of products, precision, the device and the launches that it gets."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import LAUNCHES, Launch

# TRITON_INTERPRET=1, set before Triton is imported, makes every kernel run as Python on CPU tensors (tests only).
INTERPRETED: bool = triton.knobs.runtime.interpret

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TYPES[dtype]


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Operand type of a product: that of the tensor, so that it reaches the tensor cores.

    Below sm_80, where Triton has no tensor-core products, operands are float32; and so is bfloat16 in the
    interpreter, whose own arithmetic in it is wrong without a word. The tests there cover that path.
    """
    if tensor.is_cuda:
        return product_dtype_on(target(tensor.device).arch, tensor.dtype)
    return torch.float32 if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor.dtype


def product_dtype_on(arch: int, dtype: torch.dtype) -> torch.dtype:
    """`product_dtype` of a GPU of compute capability ``arch`` (75, 80, …)."""
    return torch.float32 if arch < 80 else dtype


def dot_precision() -> str:
    """``input_precision`` of float32 products: IEEE unless the user allows TF32 in matrix products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """The tensor's device made current for a launch; nothing off CUDA (R11)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(value: int) -> int:
    return triton.next_power_of_2(value)


class Target(NamedTuple):
    """What the table of launches is asked by: compute capability (75, 80, …), and what the device calls itself."""

    arch: int
    model: str | None


# The interpreter has no architecture: it gets what the first one with products in 16 bits gets.
_INTERPRETER = Target(80, None)


def target(device: torch.device) -> Target:
    return _INTERPRETER if device.index is None or device.type != "cuda" else _gpu(device.index)


@functools.cache
def _gpu(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor, torch.cuda.get_device_name(index))


def launch_for(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """`launch.Table.look_up` for a device that a tensor is on: how to launch ``kernel`` there, and what served it."""
    return LAUNCHES.look_up(kernel, width, dtype, *target(device))


class CompileCase(NamedTuple):
    """One kernel in one configuration and dtype, as an offline compiler needs it.

    ``options`` are Triton's (num_warps, num_stages, maxnreg); ``default`` marks what a call gets unless a
    configuration is forced.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    dtype: torch.dtype
    default: bool


def pointer(dtype: torch.dtype) -> str:
    """A pointer's type in a compile signature."""
    return "*" + {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
