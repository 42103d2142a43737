"""What the kernels do, counted while they run: ``python -m tests.emulated_ptx.counted --arch 80 90 --out FILE``.

A JSON file of rows, one for each kernel that a call launches: warp-instructions by kind, multiplications of the
tensor cores, those needed among them, 32-byte sectors of global memory, passes over the banks of shared memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.files import write_file
from lmn_kernels import Sequences
from lmn_kernels._triton import attention, look_ahead, tree
from python_ref.layout import Layout
from tests.support.operands import cast, merge_of

from . import driver

_CPU = torch.device("cpu")


class Shape(NamedTuple):
    """A call: sequences of equal length, features a head, heads, banks (of look-ahead: tokens and as many before)."""

    operation: str
    sequences: int
    length: int
    size: int
    heads: int = 1
    banks: int = 1
    dtype: torch.dtype = torch.bfloat16


def shapes(length: int) -> list[Shape]:
    """One call of each operation for every width of its kernels that models have."""
    found = [Shape("attend", 1, length, size, 2, 2) for size in (16, 32, 64, 128)]
    found += [Shape("build_tree", 1, length, size, 1, 2) for size in (64, 128, 256)]
    return found + [Shape("look_ahead_attend", 1, length // 2, size, 2) for size in (16, 32, 64)]


def calls(shape: Shape) -> Callable[[], Any]:
    """The forward and the backward of a call, on random tensors."""
    draw = partial(_draw, shape.dtype)
    tokens, width = shape.sequences * shape.length, shape.heads * shape.size
    if shape.operation == "look_ahead_attend":
        count, memory = shape.length, shape.length
        rows = (shape.sequences, count + memory)
        q, kv = draw(*rows, shape.heads, shape.size), draw(*rows, 2, shape.heads, shape.size)
        bias, table = draw(4, shape.heads, shape.size), draw(rows[1], shape.heads, shape.size)
        before, lse = draw(shape.sequences, memory, shape.heads, shape.size), torch.randn(1, memory, shape.heads)
        reach = None, count, count, 0

        def look() -> None:
            out, found = look_ahead.attend(q, kv, bias, table, before, lse, *reach)
            look_ahead.attend_backward(q, torch.randn_like(found), q, kv, bias, table, out, found, *reach)

        return look
    layout = Layout(Sequences.equal(shape.sequences, shape.length), 0, _CPU)
    if shape.operation == "attend":
        token, node = draw(tokens, 3 * width), draw(shape.banks, layout.rows, 2 * width)

        def attend() -> None:
            out, lse = attention.attend(token, node, shape.heads, layout)
            attention.attend_backward(token[:, :width], token, node, out, lse, shape.heads, layout)

        return attend
    merge, x = cast(merge_of("linear", shape.size, shape.banks, _CPU), shape.dtype), draw(tokens, shape.size)

    def build() -> None:
        nodes = tree.build_tree(x, merge, shape.banks, None, None, layout)
        tree.build_tree_backward(nodes, x, nodes, merge, None, layout)

    return build


def _draw(dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(size).to(dtype)


def rows(arch: int, wanted: list[Shape]) -> Iterator[dict[str, Any]]:
    """What each kernel of the calls does on an architecture, launch by launch."""
    for shape in wanted:
        call = calls(shape)
        with driver.running(arch) as device:
            device.count_memory, device.launched = True, []
            try:
                call()
                launched = device.launched
            finally:
                device.count_memory, device.launched = False, None
        for one in launched:
            counts = one.counts.as_json()
            needed, done = one.metadata.products_needed, one.metadata.products_done
            yield {
                "arch": arch,
                "kernel": one.program.kernel.name,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "call": {name: value for name, value in shape._asdict().items() if name != "dtype"},
                "programs": one.grid,
                "warps": one.metadata.num_warps,
                "shared_bytes": one.metadata.shared,
                **counts,
                "tensor_multiplications_needed": round(counts["tensor_multiplications"] * needed / done) if done else 0,
            }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], help="compute capabilities")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--only", default="", help="only operations whose name contains this")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = parser.parse_args(argv)
    driver.install()
    wanted = [shape for shape in shapes(options.length) if options.only in shape.operation]
    found = [row for arch in options.arch for row in rows(arch, wanted)]
    content = {"triton": triton.__version__, "torch": torch.__version__, "rows": found}
    write_file(options.out, json.dumps(content, indent=1).encode())
    print(f"{len(found)} launches counted: {options.out}")


if __name__ == "__main__":
    main()
