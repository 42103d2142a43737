"""What holds on every way to an instruction: registers alive, perhaps not written, derived from a pointer, in flight.

Sets of registers are integers, a bit each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_

from .parser import Instruction, Kernel

# What has no destination, so that its first operand is read like the others.
_NO_DESTINATION = {
    "st", "bra", "ret", "exit", "bar", "barrier", "cp", "fence", "membar", "stmatrix", "red", "mbarrier", "trap",
}  # fmt: skip
# What makes something of a value beside another one: here it must have been written.
USES = {"ld", "ldu", "st", "atom", "red", "bra", "cp", "ldmatrix", "stmatrix", "mma", "wgmma", "vote", "redux"}
_Groups = tuple[int, ...]
_MOST = 8


@dataclass(frozen=True)
class Touched:
    """Registers that an instruction reads and writes."""

    reads: int
    writes: int


class Flow:
    """The analyses of one kernel."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.touched = [[self._touched(instruction) for instruction in block] for block in kernel.blocks]
        self.following = [self._following(number, block) for number, block in enumerate(kernel.blocks)]

        self.names = list(kernel.registers)

    def bits(self, operand: str) -> int:
        found = 0
        for name in re.findall(r"[%\w$@]+", operand):
            register = self.kernel.registers.get(name)
            found |= 0 if register is None else 1 << register.index
        return found

    def _touched(self, instruction: Instruction) -> Touched:
        operands = instruction.operands
        if instruction.name.startswith("wgmma.mma"):
            # One that begins a sum does not read what the sum held.
            begins = operands[3] in ("0", "false")
            reads = 0
            for part in operands[1:] if begins else operands:
                reads |= self.bits(part)
            return Touched(reads, self.bits(operands[0]))
        first = 0 if instruction.head in _NO_DESTINATION or instruction.head == "wgmma" else 1
        reads = 0
        for part in operands[first:]:
            reads |= self.bits(part)
        if instruction.guard is not None:
            reads |= self.bits(instruction.guard.lstrip("!"))
        return Touched(reads, self.bits(operands[0]) if first and operands else 0)

    def _following(self, number: int, block: list[Instruction]) -> list[int]:
        last = block[-1] if block else None
        found = []
        if last is not None and last.head == "bra":
            found.append(self.kernel.labels[last.operands[0]])
        goes_on = last is None or last.guard is not None or last.head not in ("bra", "ret", "exit")
        return found + ([number + 1] if goes_on and number + 1 < len(self.kernel.blocks) else [])

    def _before(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.kernel.blocks]
        for number, following in enumerate(self.following):
            for one in following:
                found[one].append(number)
        return found

    @cached_property
    def alive(self) -> list[int]:
        """Registers that are read after a block, by block; one under a guard keeps what it held."""
        uses, kills = [], []
        for block, touched in zip(self.kernel.blocks, self.touched, strict=True):
            use = kill = 0
            for instruction, one in zip(block, touched, strict=True):
                kept = one.writes if instruction.guard is not None else 0
                use |= (one.reads | kept) & ~kill
                kill |= one.writes & ~kept
            uses.append(use)
            kills.append(kill)
        before, after = self._before(), [0] * len(uses)
        pending = list(range(len(uses)))
        while pending:
            number = pending.pop()
            entering = uses[number] | (after[number] & ~kills[number])
            for one in before[number]:
                if entering & ~after[one]:
                    after[one] |= entering
                    pending.append(one)
        return after

    @cached_property
    def unwritten(self) -> list[int]:
        """Registers that on some way to a block nobody has written, by block."""
        kills = []
        for block, touched in zip(self.kernel.blocks, self.touched, strict=True):
            kill = 0
            for instruction, one in zip(block, touched, strict=True):
                kill |= one.writes if instruction.guard is None else 0
            kills.append(kill)
        entering = [0] * len(kills)
        entering[0] = (1 << len(self.kernel.registers)) - 1
        pending = [0]
        seen = {0}
        while pending:
            number = pending.pop()
            leaving = entering[number] & ~kills[number]
            for one in self.following[number]:
                if leaving & ~entering[one] or one not in seen:
                    seen.add(one)
                    entering[one] |= leaving
                    pending.append(one)
        return entering

    @cached_property
    def checked(self) -> int:
        """Registers that some instruction may read before they are written."""
        found = 0
        for block, touched, unwritten in zip(self.kernel.blocks, self.touched, self.unwritten, strict=True):
            for instruction, one in zip(block, touched, strict=True):
                found |= one.reads & unwritten
                unwritten &= ~(one.writes if instruction.guard is None else 0)
        return found

    @cached_property
    def suspect(self) -> int:
        """Registers whose value may come of one that nobody wrote."""
        found, before = self.checked, -1
        while found != before:
            before = found
            for block, touched in zip(self.kernel.blocks, self.touched, strict=True):
                for instruction, one in zip(block, touched, strict=True):
                    if one.reads & found and instruction.head not in USES:
                        found |= one.writes
        return found

    @cached_property
    def derived(self) -> dict[int, frozenset[int]]:
        """By the index of a register the parameters that its value is derived from, loads aside."""
        places = {name: number for number, (name, _) in enumerate(self.kernel.parameters)}
        found: dict[int, int] = {}
        changed = True
        while changed:
            changed = False
            for block, touched in zip(self.kernel.blocks, self.touched, strict=True):
                for instruction, one in zip(block, touched, strict=True):
                    if instruction.head == "ld":
                        name = instruction.operands[1].strip("[] ").split("+")[0]
                        source = 1 << places[name] if name in places else 0
                    elif instruction.head in ("setp", "atom", "shfl", "ldmatrix"):
                        source = 0
                    else:
                        source = 0
                        for index in indices(one.reads):
                            source |= found.get(index, 0)
                    for index in indices(one.writes) if source else ():
                        if source & ~found.get(index, 0):
                            found[index] = found.get(index, 0) | source
                            changed = True
        return {index: frozenset(indices(source)) for index, source in found.items()}

    @cached_property
    def in_flight(self) -> list[_Groups]:
        """Accumulators of ``wgmma`` that a block begins with before their wait, newest group first."""
        entering: list[_Groups] = [()] * len(self.kernel.blocks)
        pending, seen = [0], {0}
        while pending:
            number = pending.pop()
            groups = entering[number]
            for instruction, one in zip(self.kernel.blocks[number], self.touched[number], strict=True):
                groups = after_group(groups, instruction, one)
            for following in self.following[number]:
                joined = _joined(entering[following], groups)
                if joined != entering[following] or following not in seen:
                    seen.add(following)
                    entering[following] = joined
                    pending.append(following)
        return entering


def after_group(groups: _Groups, instruction: Instruction, touched: Touched) -> _Groups:
    """Groups in flight after an instruction; the first is the one that is not committed."""
    if instruction.head != "wgmma":
        return groups
    what = instruction.parts[1]
    opened, *closed = groups or (0,)
    if what == "mma_async":
        return (opened | touched.writes, *closed)
    if what == "commit_group":
        # Older ones of a loop that never waits are one.
        older = reduce(or_, closed[_MOST - 1 :], 0)
        return (0, opened, *closed[: _MOST - 1], *([older] if len(closed) >= _MOST else []))
    if what == "wait_group":
        kept = closed[: int(instruction.operands[0])]
        return (opened, *kept) if opened or kept else ()
    return groups


def _joined(one: _Groups, other: _Groups) -> _Groups:
    size = max(len(one), len(other))
    padded = [groups + (0,) * (size - len(groups)) for groups in (one, other)]
    return tuple(a | b for a, b in zip(*padded, strict=True))


def indices(bits: int) -> list[int]:
    """The members of a set."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
