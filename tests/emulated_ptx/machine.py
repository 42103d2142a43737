"""Runs a kernel: batches of CTAs, the lowest block with a lane first; barriers, and lanes that wait in loops."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np

from .arena import Arena, Argument
from .atomics import Atomics
from .counts import Counts
from .findings import Fault, Findings, Refused, Site
from .flow import Flow
from .groups import Groups
from .lanes import Lanes
from .parser import WIDTH, Kernel, parse
from .shared import Copies, Shared
from .translation import translate
from .values import U

# Lanes that go together: few enough that a batch's memory stays in a cache.
BATCH = 4096
# Blocks after which a batch has surely gone astray.
FUEL = 2_000_000
_NOWHERE = np.iinfo(np.int32).max
_PITCH = 128


class Program:
    """A kernel, ready to run."""

    def __init__(self, text: str, name: str | None = None):
        kernels = parse(text)
        if name is None and len(kernels) != 1:
            raise Refused(f"name: expected one of {', '.join(kernels)}, got None")
        self.kernel: Kernel = kernels[name] if name is not None else next(iter(kernels.values()))

    @cached_property
    def flow(self) -> Flow:
        return Flow(self.kernel)

    @cached_property
    def blocks(self) -> list[Any]:
        return translate(self.kernel, self.flow)

    @cached_property
    def names(self) -> list[Counter[str]]:
        return [Counter(i.name for i in block) for block in self.kernel.blocks]

    @cached_property
    def written(self) -> set[int] | None:
        """Parameters that a store is derived from; None where one is derived from nothing known."""
        flow, found = self.flow, set()
        for instruction in self.kernel.instructions:
            parts = instruction.parts
            if parts[0] not in ("st", "atom", "red") or "global" not in parts:
                continue
            place = instruction.operands[1 if parts[0] == "atom" else 0]
            registers = [r.index for r in self.kernel.registers.values() if flow.bits(place) >> r.index & 1]
            derived = {k for index in registers for k in flow.derived.get(index, ())}
            if not derived:
                return None
            found |= derived
        return found

    @cached_property
    def meets(self) -> bool:
        """Whether CTAs tell each other something while they run."""
        return any(
            i.head in ("atom", "red") or (i.head in ("ld", "st") and {"acquire", "release", "relaxed"} & set(i.parts))
            for i in self.kernel.instructions
        )

    def unit(self, space: str) -> int:
        """The narrowest access to a state space, at most 4 bytes."""
        widths = [4]
        for i in self.kernel.instructions:
            if i.head in ("ld", "st", "atom", "red") and any(part.startswith(space) for part in i.parts[1:]):
                widths.append(WIDTH[i.parts[-1]])
            elif i.head in ("ldmatrix", "stmatrix", "wgmma"):
                widths.append(4)
        return min(widths)


def launch(
    program: Program,
    arguments: list[Argument | int | float],
    grid: int,
    threads: int | None = None,
    shared: int = 0,
    findings: Findings | None = None,
    counts: Counts | None = None,
    fuel: int = FUEL,
) -> Counts:
    """Runs a grid of one dimension.

    Args:
        arguments: by parameter: a pointer, an integer, or a float for a parameter of 4 bytes.
        threads: of a CTA, where the kernel does not say.
        shared: bytes of shared memory of a CTA, with those that the kernel declares.

    Raises:
        Refused: something of the kernel or the launch is not known.
        Fault: the launch would never end; the finding says why.
    """
    findings = findings if findings is not None else Findings()
    counts = counts if counts is not None else Counts(False)
    kernel = program.kernel
    size = kernel.threads or threads
    if size is None or size % 32:
        raise Refused(f"{kernel.name}: threads: expected a multiple of 32, got {size}")
    if len(arguments) != len(kernel.parameters):
        raise Refused(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(arguments)}")
    blocks = program.blocks
    pointers = {k: one for k, one in enumerate(arguments) if isinstance(one, Argument)}
    arena = Arena(pointers, program.written, program.unit("global"), grid, program.meets, findings, counts)
    values = [_bits(one, width) for one, (_, width) in zip(arguments, kernel.parameters, strict=True)]
    each = grid if program.meets else max(1, BATCH // size)
    with np.errstate(all="ignore"):
        for first in range(0, grid, each):
            lanes = Lanes(first, min(each, grid - first), size, grid, _pitch(shared))
            Machine(
                program, blocks, values, lanes, arena, max(shared, kernel.shared_bytes), findings, counts, fuel
            ).run()
    arena.give_back()
    return counts


def _pitch(shared: int) -> int:
    """Of the CTAs' shared memory: swizzles look at its lower bits alone."""
    return max(-(-shared // 1024) * 1024, 1024)


def _bits(value: Argument | int | float, width: int) -> bytes:
    if isinstance(value, float):
        return np.float32(value).tobytes() if width == 4 else np.float64(value).tobytes()
    number = value.address if isinstance(value, Argument) else int(value)
    return (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")


class Machine:
    """One batch; what the functions of blocks call."""

    def __init__(
        self, program: Program, blocks: list[Any], values: list[bytes], lanes: Lanes, arena: Arena, shared: int,
        findings: Findings, counts: Counts, fuel: int,
    ):  # fmt: skip
        self.program, self.blocks, self.values = program, blocks, values
        self.lanes, self.arena, self.findings, self.counts, self.fuel = lanes, arena, findings, counts, fuel
        arena.lanes = lanes
        if arena.shadow is not None:
            arena.shadow.reads.clear()
        proxies = any(i.head == "wgmma" for i in program.kernel.instructions)
        self.shared = Shared(lanes, shared, _pitch(shared), program.unit("shared"), proxies, findings, counts)
        self.copies = Copies(self.shared, arena, findings)
        self.groups = Groups(self.shared, findings)
        self.atomics = Atomics(lanes, arena)
        self.pc = np.zeros(lanes.count, np.int32)
        self.resume = np.zeros(lanes.count, np.int32)
        self.done, self.waiting, self.resting = (np.zeros(lanes.count, bool) for _ in range(3))
        self.gone = 0
        # Lanes of a register whose value comes of nothing that was written.
        self.unset: dict[int, np.ndarray] = {}
        self._parameters: dict[tuple[int, int, type], np.ndarray] = {}

    def run(self) -> None:
        registers = [
            np.zeros(self.lanes.count, np.bool_ if one.is_predicate else U[one.width])
            for one in self.program.kernel.registers.values()
        ]
        steps, changes = 0, -1
        while True:
            number = int(self.pc.min())
            if number == _NOWHERE:
                if not self.resting.any():
                    break
                changes = self._wake(changes)
                continue
            mask = self.pc == number
            there = int(np.count_nonzero(mask))
            self.blocks[number].run(self, registers, mask, there + self.gone == self.lanes.count)
            self.counts.block(number, self.program.names[number], int(self.lanes.warps(mask).sum()))
            steps += 1
            if steps > self.fuel:
                site = self.program.kernel.blocks[number][0].site
                self.findings.note("spin", f"no end after {self.fuel} blocks", site)
                raise Fault(f"{site}: no end after {self.fuel} blocks")
        if self.waiting.any():
            lane = int(np.flatnonzero(self.waiting)[0])
            site = self.program.kernel.blocks[int(self.resume[lane]) - 1][-1].site
            count = int(self.waiting.sum())
            self.findings.note("barrier", "threads wait that others never join", site, f"lane {lane}", count)
            raise Fault(f"{site}: {count} threads wait at a barrier that others never reach")
        self.copies.end()

    def _wake(self, changes: int) -> int:
        """Lets lanes look again that wait in a loop, if anything has changed since they last did."""
        now = 0 if self.arena.shadow is None else self.arena.shadow.changes
        if now == changes:
            lane = int(np.flatnonzero(self.resting)[0])
            site = self.program.kernel.blocks[int(self.resume[lane])][0].site
            count = int(self.resting.sum())
            self.findings.note("spin", "threads wait for what nobody will write", site, f"lane {lane}", count)
            raise Fault(f"{site}: {count} threads wait for what nobody will write")
        self.pc[self.resting] = self.resume[self.resting]
        self.resting[:] = False
        return now

    # What ends a block.

    def jump(self, mask: np.ndarray, full: bool, number: int) -> None:
        if full and not self.gone:
            self.pc.fill(number)
        else:
            self.pc[mask] = number

    def branch(self, mask: np.ndarray, taken: np.ndarray, number: int, following: int) -> None:
        self.pc[mask] = following
        self.pc[taken] = number

    def came_round(self, taken: np.ndarray, number: int, site: Site) -> None:
        """Lanes that have read what others write, and go back, rest until nobody else can go on."""
        if self.atomics.polled.any():
            resting = taken & self.atomics.polled
            self.resting |= resting
            self.resume[resting] = number
            self.pc[resting] = _NOWHERE
            self.atomics.polled[:] = False

    def leave(self, mask: np.ndarray, site: Site) -> None:
        self.done |= mask
        self.pc[mask] = _NOWHERE
        self.gone = int(np.count_nonzero(self.done))
        if self.waiting.any():
            self._release(site)

    def barrier(self, mask: np.ndarray, following: int, site: Site) -> None:
        self.waiting |= mask
        self.resume[mask] = following
        self.pc[mask] = _NOWHERE
        self._release(site)

    def _release(self, site: Site) -> None:
        size = self.lanes.size
        waiting = self.waiting.reshape(-1, size)
        complete = (self.waiting | self.done).reshape(-1, size).all(1) & waiting.any(1)
        if not complete.any():
            return
        if self.gone and (self.done.reshape(-1, size)[complete]).any():
            self.findings.note("barrier", "threads of the CTA have left before", site)
        for local in np.flatnonzero(complete):
            own = slice(local * size, (local + 1) * size)
            resume = self.resume[own][self.waiting[own]]
            if resume.min() != resume.max():
                self.findings.note("barrier", "threads of a CTA meet at different barriers", site)
            self.pc[own] = np.where(self.waiting[own], self.resume[own], self.pc[own])
            self.waiting[own] = False
            self.lanes.epoch[own] += 1
            self.atomics.at_barrier(int(local))
        self.shared.shadow.passed(self.lanes)
        if self.arena.shadow is not None:
            self.arena.shadow.passed(self.lanes)

    def warp_barrier(self, mask: np.ndarray, site: Site) -> None:
        warps = self.shared.whole_warps(mask, site)
        self.lanes.beat.reshape(-1, 32)[warps] += 1

    # What the lanes of a warp do together.

    def whole_warps(self, mask: np.ndarray, site: Site) -> None:
        self.shared.whole_warps(mask, site)

    def shuffle(
        self, value: np.ndarray, by: np.ndarray, clamp: np.ndarray, mode: str, mask: np.ndarray, site: Site
    ) -> tuple[np.ndarray, np.ndarray]:
        self.shared.whole_warps(mask, site)
        source, inside = self._source(by, clamp, mode)
        return value[source], inside

    def _source(self, by: np.ndarray, clamp: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """The lane that each gets its value from, and whether it is one of its part of the warp."""
        lane = self.lanes.lane_id.astype(np.int64)
        by, clamp = by.astype(np.int64) & 31, clamp.astype(np.int64)
        low = lane & (clamp >> 8) & 31
        high = low | (clamp & 31 & ~((clamp >> 8) & 31))
        if mode == "idx":
            source = low | (by & ~((clamp >> 8) & 31))
        else:
            source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by}[mode]
        inside = source >= high if mode == "up" else source <= high
        return self.lanes.index - lane + np.where(inside, source, lane), inside

    def vote(self, predicate: np.ndarray, mode: str, mask: np.ndarray, site: Site, whole: bool = True) -> np.ndarray:
        if whole:
            self.shared.whole_warps(mask, site)
        warps = (predicate & mask).reshape(-1, 32)
        if mode == "ballot":
            bits = (warps.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
            return np.repeat(bits, 32)
        every, some = warps.all(1), warps.any(1)
        return np.repeat({"all": every, "any": some, "uni": every | ~some}[mode], 32)

    def reduce(self, value: np.ndarray, operation: str, mask: np.ndarray, site: Site) -> np.ndarray:
        self.shared.whole_warps(mask, site)
        names = {
            "add": "add",
            "min": "minimum",
            "max": "maximum",
            "and": "bitwise_and",
            "or": "bitwise_or",
            "xor": "bitwise_xor",
        }
        return np.repeat(getattr(np, names[operation]).reduce(value.reshape(-1, 32), 1, dtype=value.dtype), 32)

    # What else blocks ask for.

    def parameter(self, number: int, offset: int, kind: type) -> np.ndarray:
        key = (number, offset, kind)
        if key not in self._parameters:
            size = np.dtype(kind).itemsize
            value = np.frombuffer(self.values[number][offset : offset + size], kind)
            self._parameters[key] = np.full(self.lanes.count, value[0])
        return self._parameters[key]

    def _unset(self, register: int) -> np.ndarray:
        found = self.unset.get(register)
        if found is None:
            never = bool(self.program.flow.checked >> register & 1)
            found = self.unset[register] = np.full(self.lanes.count, never)
        return found

    def check_set(self, registers: list[int], mask: np.ndarray, site: Site) -> None:
        """Use is made of registers: no lane's value may come of one that nobody wrote."""
        for register in registers:
            bad = mask & self._unset(register)
            if bad.any():
                example = f"{self.program.flow.names[register]} in lane {int(np.flatnonzero(bad)[0])}"
                self.findings.note("uninitialised", "a register that nobody wrote", site, example, int(bad.sum()))

    def follow(self, writes: list[int], reads: list[int], mask: np.ndarray, chosen: Any) -> None:
        """Registers are made of others, so that what is not set of those is not of them."""
        if chosen == "pair":
            bad = np.full(self.lanes.count, bool(reads))
            for register in reads:
                bad &= self._unset(register)
        elif chosen is not None and isinstance(chosen[1], list):
            one, other = (self._any_unset(part) for part in chosen[1:])
            bad = np.where(chosen[0], one, other)
        else:
            bad = self._any_unset(reads)
            if chosen is not None:
                by, clamp, mode = chosen
                bad = bad[self._source(by, clamp, mode)[0]]
        for register in writes:
            self.unset[register] = np.where(mask, bad, self._unset(register))

    def _any_unset(self, registers: list[int]) -> np.ndarray:
        found = np.zeros(self.lanes.count, bool)
        for register in registers:
            found |= self._unset(register)
        return found

    def note_in_flight(self, mask: np.ndarray, site: Site) -> None:
        self.findings.note("asynchronous", "a register of a product before its wait", site)
