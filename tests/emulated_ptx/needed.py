"""What the products of a kernel need of the tensor cores, what their layout makes of it, and what the PTX says."""

from __future__ import annotations

import re
from math import prod

from .matrices import SHAPES
from .parser import Kernel

_PRODUCT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot) .*?<(\d+)x(\d+)x\w+[,>].* \* \S*?<(\d+)x(\d+)x.* -> tensor<[^#]*(#\w+)>"
)
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)")


def multiplications(ttgir: str) -> tuple[int, int]:
    """Of a CTA in all products on the tensor cores, each once: needed, and done in their layouts.

    Where warps cover more rows or columns than a product has, some do again what others do.
    """
    layouts = {m[1]: tuple(map(int, m.groups()[1:])) for m in map(_LAYOUT.match, ttgir.splitlines()) if m}
    needed = done = 0
    for found in filter(None, map(_PRODUCT.search, ttgir.splitlines())):
        rows, depth, other, columns = map(int, found.groups()[:4])
        assert depth == other, found[0]
        if found[5] in layouts:
            down, across, high, wide = layouts[found[5]]
            needed += rows * depth * columns
            done += prod((max(rows, down * high), depth, max(columns, across * wide)))
    return needed, done


def executed(kernel: Kernel) -> int:
    """Multiplications of a CTA's tensor instructions, each once."""
    assert kernel.threads is not None
    found = 0
    for instruction in kernel.instructions:
        parts = instruction.parts
        if parts[0] == "mma":
            found += SHAPES[parts[3], parts[7]].operations * (kernel.threads // 32)
        elif parts[:2] == ("wgmma", "mma_async"):
            found += 64 * int(parts[4].removeprefix("m64n").removesuffix("k16")) * 16 * (kernel.threads // 128)
    return found
