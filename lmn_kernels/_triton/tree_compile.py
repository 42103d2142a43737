"""What the tree kernels are launched with beside a call's own sizes, and the list of what can be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import tree_kernels as kernels
from .common import CompileCase, pointer, product_dtype_on, triton_dtype
from .launch import LAUNCHES, Launch
from .tree_tiles import EQUAL, PAIRED, TABLE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Tiles of small levels where there are none of their own.
_NO_FEW = {"FEW": 0, "FEW_BM": 16, "FEW_BN": 16, "FEW_BK": 16}


def of_two_sums(launch: Launch) -> Launch:
    """A launch for tiles that keep two sums: gradients of a summarizer with a scale have columns half as wide."""
    return launch.with_blocks(BN=max(launch["BN"] // 2, 16))


def block_arguments(kernel: Any, launch: Launch) -> dict[str, int]:
    """A launch's sizes as the constant arguments of a kernel."""
    return {name: value for name, value in {**_NO_FEW, **launch.blocks}.items() if name in kernel.arg_names}


# What compiling can differ in: (name, groups of one bank, 1+k, scale, token, children).
_VARIANTS = (
    ("", True, 1, False, False, PAIRED),
    ("odd", True, 1, False, False, EQUAL),
    ("continued", True, 1, False, True, TABLE),
    ("mixed", False, 1, False, False, PAIRED),
    ("separable", True, 1, True, False, PAIRED),
    ("expander", True, 2, False, False, PAIRED),
)
_KERNELS = {
    "tree_level_fwd": kernels.tree_fwd_kernel,
    "tree_tail_fwd": kernels.tree_fwd_kernel,
    "tree_level_bwd": kernels.tree_bwd_kernel,
    "tree_tail_bwd": kernels.tree_bwd_kernel,
    "tree_block_fwd": kernels.tree_block_fwd_kernel,
    "tree_block_bwd": kernels.tree_block_bwd_kernel,
    "tree_bwd_weight": kernels.tree_bwd_kernel_weight,
}


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every kernel × launch × dtype for plain summarizers, and every other variant at E = 64.

    As a GPU of compute capability ``arch`` gets them.
    """
    for name, kernel in _KERNELS.items():
        for size in LAUNCHES.widths(name, torch.float32):
            for variant in _VARIANTS if size == 64 else _VARIANTS[:1]:
                for dtype in DTYPES:
                    case = _case(name, kernel, 1024 if size == 256 else size, variant, dtype, arch)
                    if case is not None:
                        yield case


def _case(
    launched: str, kernel: Any, size: int, variant: tuple[Any, ...], dtype: torch.dtype, arch: int
) -> CompileCase | None:
    name, alone, taps, scale, token, children = variant
    products = product_dtype_on(arch, dtype)
    constants: dict[str, Any] = {"E": size, "C": size if alone else 2 * size, "TAPS": taps, "HAS_SCALE": scale}
    constants |= {"HAS_TOKEN": token, "CHILDREN": children.value, "DOT": triton_dtype(products), "PRECISION": "ieee"}
    known = {key: value for key, value in constants.items() if key in kernel.arg_names}
    # A kernel without the argument that makes a variant has no such variant.
    if (scale and "HAS_SCALE" not in known) or (token and "HAS_TOKEN" not in known):
        return None
    launch = LAUNCHES.look_up(launched, size, products, arch)
    if scale and "p_total" in kernel.arg_names:
        launch = of_two_sums(launch)
    known |= block_arguments(kernel, launch)
    special = {"p_table": "*i64", "p_counter": "*i32", "p_partial": "*fp32"}
    signature = {
        argument: special.get(argument, pointer(dtype)) if argument.startswith("p_") else "i32"
        for argument in kernel.arg_names
        if argument not in known
    }
    label = f"{launched}_{name}" if name else launched
    return CompileCase(label, kernel, signature, known, launch.options(), dtype, True)
