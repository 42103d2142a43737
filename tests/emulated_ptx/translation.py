"""A Python function of every basic block of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Each adds its instructions to the table of families.
from . import arithmetic, conversions, logic, synchronisation, tensor, transfers, warp  # noqa: F401
from .emitter import Emitter
from .flow import Flow
from .parser import Instruction, Kernel


@dataclass(frozen=True)
class Block:
    run: Callable[..., None]
    instructions: list[Instruction]


def translate(kernel: Kernel, flow: Flow) -> list[Block]:
    """The blocks of a kernel.

    Raises:
        Refused: of an instruction that is not known, with its line.
    """
    return [Block(Emitter(kernel, flow, number).function(), block) for number, block in enumerate(kernel.blocks)]
