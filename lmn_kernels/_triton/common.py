"""What all launchers share: dtypes of products, precision, the device guard."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

Config = TypeVar("Config")

# Set before Triton is imported, this makes every kernel run as Python on CPU tensors (tests only).
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TYPES[dtype]


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Operand type of a product: that of the tensor, so that it reaches the tensor cores.

    Below sm_80, where Triton has no tensor-core products, operands are float32; and so is bfloat16 in the
    interpreter, whose own arithmetic in it is wrong without a word. The tests there cover that path.
    """
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return product_dtype_on(10 * major + minor, tensor.dtype)
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


def for_heads(configs: dict[int, Config], head_size: int, dtype: torch.dtype) -> Config:
    """What a table, by head size rounded up to a power of two, has for heads whose products are in ``dtype``.

    Raises:
        ValueError: no configuration serves heads this wide.
    """
    width = max(16, next_power_of_2(head_size))
    if width not in configs:
        raise ValueError(f"heads: expected at most {max(configs)} features a head in {dtype}, got {head_size}")
    return configs[width]


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
