"""What all launchers share: dtype and precision of products, and the device of a launch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import target

# TRITON_INTERPRET=1, set before Triton is imported, makes every kernel run as Python on CPU tensors (tests only).
INTERPRETED: bool = triton.knobs.runtime.interpret

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Products(NamedTuple):
    """How a kernel multiplies.

    Attributes:
        dtype: of the operands.
        constants: what a kernel takes of it, ``DOT`` and ``PRECISION``.
    """

    dtype: torch.dtype
    constants: dict[str, Any]


def products_of(tensor: torch.Tensor) -> Products:
    """The products of a tensor in its own dtype, so that they reach the tensor cores.

    Below sm_80, where Triton has no tensor-core products, operands are float32; and so is bfloat16 in the
    interpreter, whose own arithmetic in it is wrong without a word. The tests there cover that path.
    """
    if INTERPRETED:
        return _products(torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype)
    return products_on(target(tensor.device).arch, tensor.dtype)


def products_on(arch: int, dtype: torch.dtype) -> Products:
    """`products_of` on a GPU of compute capability ``arch`` (75, 80, …)."""
    return _products(torch.float32 if arch < 80 else dtype)


def _products(dtype: torch.dtype) -> Products:
    # Of float32 IEEE products, unless the user allows TF32 in matrix products.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return Products(dtype, {"DOT": _TYPES[dtype], "PRECISION": precision})


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """The tensor's device made current for a launch; nothing off CUDA (R11)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class CompileCase(NamedTuple):
    """One kernel in one configuration and dtype, as an offline compiler needs it.

    ``options`` are Triton's (num_warps, num_stages, maxnreg); ``default`` marks what a call gets unless a
    configuration is forced.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    dtype: torch.dtype
    default: bool


def pointer(dtype: torch.dtype) -> str:
    """A pointer's type in a compile signature."""
    return "*" + {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
