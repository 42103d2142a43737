"""The list of what can be compiled of the tree kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import tree_kernels as kernels
from .common import CompileCase, pointer, products_on
from .launch import LAUNCHES
from .tree import DTYPES, block_arguments, of_two_sums
from .tree_tiles import EQUAL, PAIRED, TABLE

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
    products = products_on(arch, dtype)
    constants: dict[str, Any] = {"E": size, "C": size if alone else 2 * size, "TAPS": taps, "HAS_SCALE": scale}
    constants |= {"HAS_TOKEN": token, "CHILDREN": children.value, **products.constants}
    known = {key: value for key, value in constants.items() if key in kernel.arg_names}
    # A kernel without the argument that makes a variant has no such variant.
    if (scale and "HAS_SCALE" not in known) or (token and "HAS_TOKEN" not in known):
        return None
    launch = LAUNCHES.look_up(launched, size, products.dtype, arch)
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
    return CompileCase(label, kernel, signature, known, launch.options, dtype, True)
