"""Tile sizes of the tree kernels by embedding size, and the list of what can be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import tree_kernels as kernels
from .common import CompileCase, next_power_of_2, pointer, product_dtype_on, triton_dtype
from .tree_tiles import EQUAL, PAIRED, TABLE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Groups of at most so many features are built in blocks.
BLOCK_FEATURES = 128


class Tiling(NamedTuple):
    """How a kernel runs for a range of E: a tile's rows, columns and depth of a step of its product.

    Attributes:
        few: levels of at most so many rows take the tiles ``few_rows × few_cols``; 0 for none.
        span: log2 of the nodes below a program's block, and ``levels``: how many it builds above them.
        registers: what a thread may use; None leaves it to the assembler, which for some tilings spills a
            few bytes to make room for one more program.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    few: int = 0
    few_rows: int = 16
    few_cols: int = 16
    few_depth: int = 16
    span: int = 0
    levels: int = 0
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """How to compile, as Triton takes it."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found if self.registers is None else found | {"maxnreg": self.registers}


# By E: up to 16, 32, 64, 128, beyond. Half precision first, then float32, whose IEEE products run
# outside the tensor cores. All fit 99 KB of shared memory, and 64 KB on sm_75, which does not pipeline.
_LEVEL = {
    16: (Tiling(128, 16, 16, 4, 2), Tiling(64, 16, 16, 4, 2)),
    32: (Tiling(128, 32, 32, 4, 2), Tiling(64, 32, 16, 4, 2)),
    64: (Tiling(128, 64, 64, 8, 2), Tiling(32, 64, 16, 4, 2, registers=224)),
    128: (Tiling(128, 128, 64, 8, 3), Tiling(32, 64, 16, 4, 2)),
    256: (Tiling(128, 128, 64, 8, 3), Tiling(32, 64, 16, 4, 2)),
}
_TAIL = {
    16: (Tiling(64, 16, 16, 4, 2, 64, 16, 16, 16), Tiling(32, 16, 16, 4, 2, 64, 16, 16, 16)),
    32: (Tiling(64, 32, 32, 4, 2, 64, 16, 32, 32), Tiling(32, 32, 16, 8, 2, 64, 16, 32, 16)),
    64: (
        Tiling(64, 64, 64, 4, 2, 128, 16, 32, 64, registers=255),
        Tiling(32, 32, 16, 8, 2, 64, 16, 32, 16, registers=192),
    ),
    128: (Tiling(64, 64, 64, 4, 3, 128, 16, 32, 128), Tiling(32, 32, 32, 4, 2, 64, 16, 32, 32)),
    256: (Tiling(64, 64, 64, 4, 4, 128, 16, 32, 128), Tiling(32, 32, 32, 4, 2, 64, 16, 32, 32)),
}
_BLOCK = {
    16: (Tiling(32, 16, 16, 2, 2, span=6, levels=6), Tiling(32, 16, 16, 2, 2, span=6, levels=6, registers=128)),
    32: (Tiling(32, 32, 32, 2, 2, span=6, levels=6), Tiling(32, 32, 16, 4, 2, span=6, levels=6, registers=128)),
    64: (
        Tiling(32, 64, 64, 4, 2, span=6, levels=6, registers=192),
        Tiling(32, 64, 16, 8, 2, span=6, levels=6, registers=192),
    ),
    128: (Tiling(64, 128, 64, 8, 2, span=7, levels=4), Tiling(32, 64, 16, 8, 2, span=6, levels=4)),
}
_WEIGHT = {
    16: (Tiling(16, 16, 128, 2, 2), Tiling(16, 16, 64, 4, 2)),
    32: (Tiling(32, 32, 128, 4, 2), Tiling(32, 32, 32, 4, 2)),
    64: (Tiling(64, 64, 64, 4, 3, registers=192), Tiling(64, 64, 16, 8, 2)),
    128: (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 16, 8, 2)),
    256: (Tiling(128, 128, 64, 8, 3), Tiling(64, 64, 16, 8, 2)),
}

_TABLES = {"level": _LEVEL, "tail": _TAIL, "block": _BLOCK, "weight": _WEIGHT}

# Elements of a bank's level beyond which it gets a launch of its own: 1024 rows at E = 1024, and never
# more than two tiles for each of 132 multiprocessors. Reasoned, not measured.
TAIL_ELEMENTS = 1 << 20


def config(kind: str, size: int, dtype: torch.dtype, sums: int = 1) -> Tiling:
    """The tiling of a kind of launch at E = ``size``.

    Args:
        kind: ``"level"`` or ``"tail"`` of `tree_fwd_kernel` and `tree_bwd_kernel`, ``"block"`` of the block
            kernels, ``"weight"`` of `tree_bwd_kernel_weight`.
        sums: sums that a tile keeps: two for the gradients of a summarizer with a scale.
    """
    table = _TABLES[kind]
    tiling = table[min(max(next_power_of_2(size), 16), max(table))][dtype == torch.float32]
    return tiling._replace(cols=max(tiling.cols // sums, 16))


def tiling_arguments(kernel: Any, tiling: Tiling) -> dict[str, int]:
    """A tiling as the constant arguments of a kernel."""
    given = {"BM": tiling.rows, "BN": tiling.cols, "BK": tiling.depth, "SPAN": tiling.span, "FEW": tiling.few}
    given |= {"FEW_BM": tiling.few_rows, "FEW_BN": tiling.few_cols, "FEW_BK": tiling.few_depth}
    return {name: value for name, value in given.items() if name in kernel.arg_names}


# What compiling can differ in: (name, groups of one bank, 1+k, scale, token, children).
_VARIANTS = (
    ("", True, 1, False, False, PAIRED),
    ("odd", True, 1, False, False, EQUAL),
    ("continued", True, 1, False, True, TABLE),
    ("mixed", False, 1, False, False, PAIRED),
    ("separable", True, 1, True, False, PAIRED),
    ("expander", True, 2, False, False, PAIRED),
)
_LAUNCHES = (
    ("level", kernels.tree_fwd_kernel),
    ("tail", kernels.tree_fwd_kernel),
    ("level", kernels.tree_bwd_kernel),
    ("tail", kernels.tree_bwd_kernel),
    ("block", kernels.tree_block_fwd_kernel),
    ("block", kernels.tree_block_bwd_kernel),
    ("weight", kernels.tree_bwd_kernel_weight),
)


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every kernel × configuration × dtype for plain summarizers, and every other variant at E = 64.

    As a GPU of compute capability ``arch`` gets them.
    """
    for kind, kernel in _LAUNCHES:
        for size in _TABLES[kind]:
            for variant in _VARIANTS if size == 64 else _VARIANTS[:1]:
                for dtype in DTYPES:
                    case = _case(kind, kernel, 1024 if size == 256 else size, variant, dtype, arch)
                    if case is not None:
                        yield case


def _case(
    kind: str, kernel: Any, size: int, variant: tuple[Any, ...], dtype: torch.dtype, arch: int
) -> CompileCase | None:
    name, alone, taps, scale, token, children = variant
    products = product_dtype_on(arch, dtype)
    constants: dict[str, Any] = {"E": size, "C": size if alone else 2 * size, "TAPS": taps, "HAS_SCALE": scale}
    constants |= {"HAS_TOKEN": token, "CHILDREN": children.value, "DOT": triton_dtype(products), "PRECISION": "ieee"}
    known = {key: value for key, value in constants.items() if key in kernel.arg_names}
    # A kernel without the argument that makes a variant has no such variant.
    if (scale and "HAS_SCALE" not in known) or (token and "HAS_TOKEN" not in known):
        return None
    tiling = config(kind, size, products, sums=2 if scale and "p_total" in kernel.arg_names else 1)
    known |= tiling_arguments(kernel, tiling)
    special = {"p_table": "*i64", "p_counter": "*i32", "p_partial": "*fp32"}
    signature = {
        argument: special.get(argument, pointer(dtype)) if argument.startswith("p_") else "i32"
        for argument in kernel.arg_names
        if argument not in known
    }
    label = "_".join(part for part in (kernel.__name__, kind, name) if part)
    return CompileCase(label, kernel, signature, known, tiling.options(), dtype, True)


def configs() -> dict[str, list[Tiling]]:
    """Every configuration of every kind of launch."""
    return {kind: [tiling for pair in table.values() for tiling in pair] for kind, table in _TABLES.items()}
