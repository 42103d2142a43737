"""Small kernels written by hand, for tests of the executor itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .arena import Argument, Storage
from .counts import Counts
from .findings import Finding, Findings
from .machine import Program, launch

HEADER = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel({parameters}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<32>;
.reg .b32 %r<128>;
.reg .b64 %d<64>;
{body}
ret;
}}
"""


def program(body: str, pointers: int, threads: int = 32) -> Program:
    """A kernel with pointers as its parameters p0, p1, …, and ``memory`` shared."""
    parameters = ",".join(f"\n.param .u64 p{k}" for k in range(pointers))
    return Program(HEADER.format(parameters=parameters, threads=threads, body=body))


def run(
    body: str, *buffers: np.ndarray, grid: int = 1, threads: int = 32, shared: int = 4096, counts: Counts | None = None,
    unset: Sequence[int] = (), fuel: int = 10_000,
) -> list[Finding]:  # fmt: skip
    """Runs a kernel on buffers, which it changes; those of ``unset`` hold nothing yet."""
    findings = Findings()
    arguments: list[Argument | int | float] = []
    for number, buffer in enumerate(buffers):
        data = buffer.reshape(-1).view(np.uint8)
        nothing = np.ones(len(data), bool) if number in unset else None
        arguments.append(Argument(Storage(data, unset=nothing), 0, len(data)))
    try:
        launch(program(body, len(buffers), threads), arguments, grid, None, shared, findings, counts, fuel)
    except RuntimeError as fault:
        if not isinstance(fault, NotImplementedError):
            assert (found := findings.take()), fault
            return found
        raise
    return findings.take()


_MOVES = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def apply(instruction: str, operands: Sequence[np.ndarray], result: np.dtype | type) -> np.ndarray:
    """What an instruction makes of arrays of one value a lane, at most 32.

    ``instruction`` names its destination ``R`` and its operands ``A``, ``B``, … as registers of their widths.
    """
    size = max(len(one) for one in operands)
    assert size <= 32
    out = np.zeros(32, result)
    lines = ["mov.u32 %r100, %tid.x;", "ld.param.b64 %d40, [p0];"]
    names: dict[str, str] = {}
    for number, one in enumerate(operands):
        width = one.dtype.itemsize
        letter = {2: "%h", 4: "%r", 8: "%d"}[width]
        register = f"{letter}{number + 1}"
        names[chr(ord("A") + number)] = register
        lines += [
            f"ld.param.b64 %d{41 + number}, [p{number + 1}];",
            f"mad.wide.u32 %d{50 + number}, %r100, {width}, %d{41 + number};",
            f"ld.global.{_MOVES[width]} {register}, [%d{50 + number}];",
        ]
    width = out.dtype.itemsize
    destination = {2: "%h10", 4: "%r10", 8: "%d10"}[width]
    names["R"] = destination
    text = re.sub(r"\b([A-FR])\b", lambda m: names.get(m[1], m[1]), instruction)
    lines += [f"{part.strip()};" for part in text.split(";") if part.strip()]
    lines += [f"mad.wide.u32 %d60, %r100, {width}, %d40;", f"st.global.{_MOVES[width]} [%d60], {destination};"]
    buffers = [np.resize(one, 32).copy() for one in operands]
    found = run("\n".join(lines), out, *buffers)
    assert not found, found
    return out[:size]
