"""Global memory: the buffers of a launch far apart in one arena, each with the bytes handed in and no more."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .counts import Counts
from .emitter import Access
from .findings import Findings, Site
from .lanes import Lanes
from .shadow import NEVER, Shadow
from .shared import SIXTEEN, gathered, scattered, settle
from .values import U

BASE, GUARD = 1 << 40, 4096


@dataclass
class Storage:
    """Memory that tensors share.

    Attributes:
        data: its bytes, of which the arena has a copy while a launch runs.
        unset: bytes that nobody has written yet; None where all were.
        begin: where it is in the arena.
    """

    data: np.ndarray
    alignment: int = 0
    unset: np.ndarray | None = None
    begin: int = 0


@dataclass
class Argument:
    """A pointer: a storage, and the bytes of it that the tensor spans."""

    storage: Storage
    low: int
    high: int
    address: int = field(default=0, init=False)


class Arena:
    """What a launch reads and writes.

    Args:
        arguments: by the number of the parameter.
        written: parameters that some store is derived from; None where that is not known.
        unit: bytes of the shadow's unit.
        meets: whether CTAs wait for each other.
    """

    def __init__(
        self,
        arguments: dict[int, Argument],
        written: set[int] | None,
        unit: int,
        grid: int,
        meets: bool,
        findings: Findings,
        counts: Counts,
    ):
        self.arguments, self.unit, self.findings, self.counts = arguments, unit, findings, counts
        self.storages = list({id(one.storage): one.storage for one in arguments.values()}.values())
        end = GUARD
        for storage in self.storages:
            storage.begin = -(-end // 256) * 256 + storage.alignment
            end = storage.begin + len(storage.data) + GUARD
        self.bytes = np.full(-(-end // 256) * 256, 0xAB, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in U.items()} | {16: self.bytes.view(SIXTEEN)}
        for storage in self.storages:
            self.bytes[storage.begin : storage.begin + len(storage.data)] = storage.data
        for one in arguments.values():
            one.address = BASE + one.storage.begin + one.low
        stored = self.storages if written is None else [arguments[k].storage for k in written if k in arguments]
        self.stored = {id(one) for one in stored}
        self.unset = None
        if any(one.unset is not None for one in self.storages):
            self.unset = np.zeros(len(self.bytes), bool)
            for one in self.storages:
                if one.unset is not None:
                    self.unset[one.begin : one.begin + len(one.data)] = one.unset
        self._spans: dict[frozenset[int], list[tuple[int, int]]] = {}
        self._watched: dict[frozenset[int], bool] = {}
        self.shadow = Spread(len(self.bytes) // unit, unit, grid, meets, findings) if self.stored else None
        self.lanes: Lanes

    def give_back(self) -> None:
        """What was written goes to where the buffers came from."""
        for one in self.storages:
            if id(one) in self.stored:
                one.data[:] = self.bytes[one.begin : one.begin + len(one.data)]
                if one.unset is not None:
                    assert self.unset is not None
                    one.unset[:] = self.unset[one.begin : one.begin + len(one.data)]

    def _of(self, access: Access) -> frozenset[int]:
        known = access.derived & self.arguments.keys()
        return frozenset(known or self.arguments)

    def spans(self, derived: frozenset[int]) -> list[tuple[int, int]]:
        """The bytes that pointers derived from parameters may reach."""
        if derived not in self._spans:
            chosen = [self.arguments[k] for k in derived]
            self._spans[derived] = [(one.storage.begin + one.low, one.storage.begin + one.high) for one in chosen]
            self._watched[derived] = any(id(one.storage) in self.stored for one in chosen)
        return self._spans[derived]

    def place(
        self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Lanes of an access, where in the arena it begins, and whether anybody writes there."""
        at = np.flatnonzero(mask)
        start = address[at] + (offset - BASE)
        derived = self._of(access)
        spans, size = self.spans(derived), access.size
        if len(at):
            low, high = spans[0] if len(spans) == 1 else (0, 0)
            if start.min() < low or start.max() + size > high:
                inside = np.zeros(len(at), bool)
                for low, high in spans:
                    inside |= (start >= low) & (start + size <= high)
                if not inside.all():
                    example = self._near(int(start[~inside][0]), derived)
                    count = int(np.count_nonzero(~inside))
                    self.findings.note("bounds", f"{size} bytes of global memory", access.site, example, count)
                    at, start = at[inside], start[inside]
        if (start & (size - 1)).any():
            bad = (start & (size - 1)) != 0
            example = self._near(int(start[bad][0]), derived)
            self.findings.note("misaligned", f"{size} bytes of global memory", access.site, example, int(bad.sum()))
            at, start = at[~bad], start[~bad]
        return at, start, self._watched[derived]

    def _near(self, start: int, derived: frozenset[int]) -> str:
        for number in sorted(derived):
            one = self.arguments[number]
            begin, end = one.storage.begin + one.low, one.storage.begin + one.high
            if begin - GUARD // 2 <= start < end + GUARD // 2 or len(derived) == 1:
                return f"byte {start - begin} of {end - begin} of parameter {number}"
        return f"byte {start} of the arena"

    def units(self, start: np.ndarray, size: int) -> np.ndarray:
        return (start // self.unit)[:, None] + np.arange(max(size // self.unit, 1))

    def check_set(self, start: np.ndarray, at: np.ndarray, access: Access) -> None:
        if self.unset is not None and len(at):
            bad = self.unset[start[:, None] + np.arange(access.size)].any(1)
            if bad.any():
                example = self._near(int(start[bad][0]), self._of(access))
                what = "global memory that nobody wrote"
                self.findings.note("uninitialised", what, access.site, example, int(bad.sum()))

    def load(self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray) -> list[np.ndarray]:
        at, start, watched = self.place(access, address, offset, mask)
        if len(at):
            self.check_set(start, at, access)
            if watched and self.shadow is not None:
                self.shadow.read(self.units(start, access.size), at, self.lanes, access.site)
            self.counts.sectors(access, start, at, "read")
        return gathered(self.views, start, at, access, self.lanes.count)

    def store(
        self, access: Access, address: np.ndarray, offset: int, values: tuple[np.ndarray, ...], mask: np.ndarray
    ) -> None:
        at, start, watched = self.place(access, address, offset, mask)
        if not len(at):
            return
        if not watched or self.shadow is None:
            self.findings.note("bounds", "a store through a pointer that no store is derived from", access.site)
            return
        twice = self.shadow.write(self.units(start, access.size), at, self.lanes, access.site)
        self.counts.sectors(access, start, at, "written")
        differ = scattered(self.views, start, at, access, values, twice)
        self.shadow.changes += 1
        if self.unset is not None:
            self.unset[start[:, None] + np.arange(access.size)] = False
        settle(differ, twice, access, self.findings, self.counts, "global")


class Spread(Shadow):
    """A shadow of memory that all CTAs reach.

    Two CTAs are ordered by what one has acquired of the other, an epoch for each (`seen`), where they wait for each
    other; else by nothing.
    """

    def __init__(self, units: int, unit: int, grid: int, meets: bool, findings: Findings):
        super().__init__(units, "global", findings)
        self.unit = unit
        self.owner = np.full(units, NEVER, np.int32)
        self.seen = np.zeros((grid, grid), np.int32) if meets else None
        self.reader = np.full((units, grid if meets else 1), NEVER, np.int32)
        self.atomic = np.zeros(units, bool)
        self.changes = 0

    def read(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> None:
        me = lanes.of_cta[at][:, None]
        owner = self.owner[units]
        if owner.max() != NEVER:
            self._across(owner, self.epoch[units], units, at, lanes, site, "read after a write")
            own = (owner == me) & (self.epoch[units] >= lanes.epoch[at][:, None])
            if own.any():
                self._after_write(own, units, at, lanes, site, "read")
        self._plain(units, site)
        if self.seen is not None:
            self.reader[units, me] = lanes.epoch[at][:, None]
        else:
            last = self.reader[units, 0]
            self.reader[units, 0] = np.where((last == NEVER) | (last == me), me, _MANY)
            mixed = self.reader[units, 0] != me
            if mixed.any():
                self.reader[units[mixed], 0] = _MANY
        # Of a lane's own CTA alone: the others' epochs are of no account here.
        self.read_epoch[units] = lanes.epoch[at][:, None]
        self.reads.append(self._reading(units, at, lanes))

    def write(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> np.ndarray:
        me = lanes.of_cta[at][:, None]
        owner = self.owner[units]
        if owner.max() != NEVER:
            self._across(owner, self.epoch[units], units, at, lanes, site, "write after a write")
            own = (owner == me) & (self.epoch[units] >= lanes.epoch[at][:, None])
            if own.any():
                self._after_write(own, units, at, lanes, site, "write")
        self._plain(units, site)
        self._after_other_reads(units, at, lanes, site)
        self._after_reads(units, at, lanes, site)
        place = at.astype(np.int32)[:, None]
        self.owner[units] = me
        self.epoch[units] = lanes.epoch[at][:, None]
        self.writer[units] = place
        self.beat[units] = lanes.beat[at][:, None]
        others = self.owner[units] != me
        if others.any():
            self._note_across(others, self.owner[units], units, at, lanes, site, "write after a write")
        return ((self.writer[units] != place) & ~others).any(1)

    def _plain(self, units: np.ndarray, site: Site) -> None:
        if self.seen is not None and self.atomic[units].any():
            self.findings.note("race", "global access to what atomics use", site)

    def _across(
        self,
        owner: np.ndarray,
        epoch: np.ndarray,
        units: np.ndarray,
        at: np.ndarray,
        lanes: Lanes,
        site: Site,
        what: str,
    ) -> None:
        me = lanes.of_cta[at][:, None]
        alien = (owner != NEVER) & (owner != me)
        if alien.any() and self.seen is not None:
            alien &= epoch >= self.seen[np.broadcast_to(me, owner.shape), np.maximum(owner, 0)]
        if alien.any():
            self._note_across(alien, owner, units, at, lanes, site, what)

    def _note_across(
        self, bad: np.ndarray, owner: np.ndarray, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site, what: str
    ) -> None:
        row, column = (int(found[0]) for found in np.nonzero(bad))
        byte, ctas = int(units[row, column]) * self.unit, (int(lanes.of_cta[at[row]]), int(owner[row, column]))
        example = f"byte {byte} of the arena, CTAs {ctas[0]} and {ctas[1]}"
        self.findings.note("race", f"global {what} by another CTA", site, example, int(bad.any(1).sum()))

    def _after_other_reads(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> None:
        me = lanes.of_cta[at]
        if self.seen is None:
            reader = self.reader[units, 0]
            bad = (reader != NEVER) & (reader != me[:, None])
        else:
            late = self.reader[units] >= np.maximum(self.seen[me], 0)[:, None, :]
            late &= self.reader[units] != NEVER
            late[np.arange(len(me)), :, me] = False
            bad = late.any(2)
        if bad.any():
            example = f"CTA {int(me[bad.any(1)][0])}"
            self.findings.note("race", "global write after a read by another CTA", site, example, int(bad.any(1).sum()))


_MANY = -2
