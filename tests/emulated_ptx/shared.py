"""Shared memory of the CTAs of a batch, side by side; and asynchronous copies to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counts import Counts
from .emitter import Access
from .findings import Findings, Site
from .lanes import Lanes
from .shadow import NEVER, PENDING, Shadow
from .values import U

SIXTEEN = np.dtype(np.complex128)


def gathered(
    views: dict[int, np.ndarray], start: np.ndarray, at: np.ndarray, access: Access, count: int
) -> list[np.ndarray]:
    """The words of an access as arrays of one value a lane; lanes that are not ``at`` it get zeros."""
    width, words, size = access.width, access.count, access.size
    if size in views and words > 1:
        found = views[size][start // size].view(U[width]).reshape(-1, words).T
    else:
        found = views[width][(start // width)[None, :] + np.arange(words)[:, None]]
    if len(at) == count:
        return list(np.ascontiguousarray(found))
    whole = np.zeros((words, count), U[width])
    whole[:, at] = found
    return list(whole)


def scattered(
    views: dict[int, np.ndarray],
    start: np.ndarray,
    at: np.ndarray,
    access: Access,
    values: Sequence[np.ndarray],
    twice: np.ndarray,
) -> np.ndarray:
    """Writes one value a lane of each word; which lanes ``at`` it find another's where some wrote a place ``twice``."""
    differ = np.zeros(len(at), bool)
    view, index = views[access.width], start // access.width
    for k, value in enumerate(values):
        view[index + k] = value[at]
        if twice.any():
            differ |= view[index + k] != value[at]
    return differ


class Shared:
    """The bytes, and what was done to them.

    Args:
        size: bytes of a CTA.
        unit: bytes of the shadow's unit, the narrowest access.
        proxies: whether the tensor cores read it by descriptors.
    """

    def __init__(
        self, lanes: Lanes, size: int, pitch: int, unit: int, proxies: bool, findings: Findings, counts: Counts
    ):
        self.lanes, self.size, self.unit, self.proxies = lanes, size, unit, proxies
        self.findings, self.counts = findings, counts
        self.bytes = np.full(pitch * lanes.in_batch, 0xCD, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in U.items()} | {16: self.bytes.view(SIXTEEN)}
        self.shadow = Shadow(len(self.bytes) // unit, "shared", findings)
        # Written by the lanes' own way of access, and not yet fenced for the tensor cores'.
        self.unfenced = np.zeros(len(self.bytes) // unit, bool)
        self.recent: list[tuple[np.ndarray, np.ndarray]] = []
        # Operands of products that nobody has waited for.
        self.lent = np.zeros(len(self.bytes) // unit, np.int16)

    def units(self, start: np.ndarray, size: int) -> np.ndarray:
        return (start // self.unit)[:, None] + np.arange(max(size // self.unit, 1))

    def place(
        self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lanes of an access, and where it begins; without those that are out of bounds or misaligned."""
        at = np.flatnonzero(mask)
        start = address[at] + offset if offset else address[at]
        size = access.size
        if len(at) and (start.min() < 0 or start.max() + size > self.size):
            bad = (start < 0) | (start + size > self.size)
            example = f"byte {int(start[bad][0])} of {self.size}"
            self.findings.note("bounds", f"{size} bytes of shared memory", access.site, example, int(bad.sum()))
            at, start = at[~bad], start[~bad]
        if (start & (size - 1)).any():
            bad = (start & (size - 1)) != 0
            example = f"byte {int(start[bad][0])}"
            self.findings.note("misaligned", f"{size} bytes of shared memory", access.site, example, int(bad.sum()))
            at, start = at[~bad], start[~bad]
        return at, start + self.lanes.home[at]

    def _look(self, units: np.ndarray, at: np.ndarray, site: Site) -> None:
        if (self.shadow.epoch[units] == NEVER).any():
            bad = self.shadow.epoch[units] == NEVER
            lane = int(at[bad.any(1)][0])
            self.findings.note(
                "uninitialised", "shared memory that nobody wrote", site, f"lane {lane}", int(bad.any(1).sum())
            )
        self.shadow.read(units, at, self.lanes, site)

    def _touch(self, units: np.ndarray, at: np.ndarray, site: Site) -> np.ndarray:
        if self.proxies and self.lent[units].any():
            self.findings.note("asynchronous", "write to the operand of a product before its wait", site)
        twice = self.shadow.write(units, at, self.lanes, site)
        if self.proxies:
            self.unfenced[units] = True
            self.recent.append((units, at))
        return twice

    def load(self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray) -> list[np.ndarray]:
        at, start = self.place(access, address, offset, mask)
        if len(at):
            self._look(self.units(start, access.size), at, access.site)
            self.counts.banks(access, start - self.lanes.home[at], at)
        return gathered(self.views, start, at, access, self.lanes.count)

    def store(
        self, access: Access, address: np.ndarray, offset: int, values: tuple[np.ndarray, ...], mask: np.ndarray
    ) -> None:
        at, start = self.place(access, address, offset, mask)
        if not len(at):
            return
        twice = self._touch(self.units(start, access.size), at, access.site)
        self.counts.banks(access, start - self.lanes.home[at], at)
        differ = scattered(self.views, start, at, access, values, twice)
        settle(differ, twice, access, self.findings, self.counts, "shared")

    def load_matrices(
        self, access: Access, address: np.ndarray, offset: int, count: int, transposed: bool, mask: np.ndarray
    ) -> list[np.ndarray]:
        """``ldmatrix``: rows of 16 bytes at the addresses of the first 8 · count lanes of each warp."""
        lanes = self.lanes.count
        at, start, warps = self._rows(access, address, offset, count, mask)
        found = np.zeros((count, lanes), np.uint32)
        if len(at) and len(at) == len(warps) * 8 * count:
            self._look(self.units(start, 16), at, access.site)
            self.counts.banks(access, start - self.lanes.home[at], at)
            rows = self.views[16][start // 16].view(np.uint16).reshape(len(warps), count, 8, 8)
            if transposed:
                rows = rows.transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), count, 32)
            found.reshape(count, -1, 32)[:, warps] = words.transpose(1, 0, 2)
        return list(found)

    def store_matrices(
        self,
        access: Access,
        address: np.ndarray,
        offset: int,
        values: tuple[np.ndarray, ...],
        transposed: bool,
        mask: np.ndarray,
    ) -> None:
        count = len(values)
        at, start, warps = self._rows(access, address, offset, count, mask)
        if not len(at) or len(at) != len(warps) * 8 * count:
            return
        self._touch(self.units(start, 16), at, access.site)
        self.counts.banks(access, start - self.lanes.home[at], at)
        words = np.stack([value.reshape(-1, 32)[warps] for value in values], 1)
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        self.views[16][start // 16] = np.ascontiguousarray(rows).reshape(-1, 8).view(SIXTEEN)[:, 0]

    def _rows(
        self, access: Access, address: np.ndarray, offset: int, count: int, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        warps = np.flatnonzero(self.whole_warps(mask, access.site))
        giving = np.zeros(self.lanes.count, bool)
        giving.reshape(-1, 32)[warps, : 8 * count] = True
        return *self.place(access, address, offset, giving), warps

    def whole_warps(self, mask: np.ndarray, site: Site) -> np.ndarray:
        """The warps of a mask, each of which is there with all its lanes."""
        there = mask.reshape(-1, 32)
        warps = there.any(1)
        if not there[warps].all():
            self.findings.note("divergence", "part of a warp at what takes a whole one", site)
        return warps

    def fence(self, mask: np.ndarray) -> None:
        """What lanes have written is visible to the tensor cores' own way of access."""
        left = []
        for units, at in self.recent:
            done = mask[at]
            self.unfenced[units[done]] = False
            if not done.all():
                left.append((units[~done], at[~done]))
        self.recent = left


def settle(
    differ: np.ndarray, twice: np.ndarray, access: Access, findings: Findings, counts: Counts, where: str
) -> None:
    """Of lanes of one instruction that wrote the same place: a finding where they wrote different values."""
    if differ.any():
        what = f"{where} stores of one instruction to one address, of different values"
        findings.note("race", what, access.site, count=int(differ.sum()))
    elif twice.any():
        counts.redundant(access, int(twice.sum()))


class Copies:
    """``cp.async``: issued to groups of each lane, written when it waits for them and not before."""

    def __init__(self, shared: Shared, arena: object, findings: Findings):
        self.shared, self.arena, self.findings = shared, arena, findings
        self.group = np.zeros(shared.lanes.count, np.int32)
        self.queue: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Site]] = []

    def issue(
        self,
        here: Access,
        to: np.ndarray,
        to_offset: int,
        there: Access,
        source: np.ndarray,
        offset: int,
        taken: np.ndarray | None,
        mask: np.ndarray,
        site: Site,
    ) -> None:
        shared, size = self.shared, here.size
        at, start = shared.place(here, to, to_offset, mask)
        if not len(at):
            return
        reading = np.zeros(len(mask), bool)
        reading[at] = True
        if taken is not None:
            if not np.isin(taken[at], (0, size)).all():
                self.findings.note("asynchronous", "a copy of part of its size, whose bounds are not known", site)
            reading &= taken > 0
        words = np.stack(self.arena.load(there, source, offset, reading), 1)
        data = np.ascontiguousarray(words[at]).view(np.uint8).reshape(len(at), size)
        units = shared.units(start, size)
        shared._touch(units, at, site)
        shared.shadow.epoch[units] = PENDING
        shared.counts.banks(here, start - shared.lanes.home[at], at)
        self.queue.append((at, start, data, self.group[at], site))

    def commit(self, mask: np.ndarray) -> None:
        self.group[mask] += 1

    def wait(self, mask: np.ndarray, newest: int, uncommitted: bool = False) -> None:
        """All but the ``newest`` groups of each lane are written."""
        left = []
        shared = self.shared
        for at, start, data, group, site in self.queue:
            done = mask[at] & (uncommitted | (group < self.group[at] - newest))
            if done.any():
                lanes, begin, size = at[done], start[done], data.shape[1]
                shared.bytes[begin[:, None] + np.arange(size)] = data[done]
                units = shared.units(begin, size)
                shared.shadow.epoch[units] = shared.lanes.epoch[lanes][:, None]
                shared.shadow.writer[units] = lanes[:, None]
                shared.shadow.beat[units] = shared.lanes.beat[lanes][:, None]
            if not done.all():
                left.append((at[~done], start[~done], data[~done], group[~done], site))
        self.queue = left

    def end(self) -> None:
        for at, _, _, _, site in self.queue:
            self.findings.note("asynchronous", "a copy that nobody waits for", site, count=len(at))
