"""Accesses of global memory with an order, and what they say about the order of others.

A CTA knows of another up to an epoch (`Spread.seen`). A release hands on what its CTA knew at the last barrier; an
acquire takes effect for the CTA at its next one. Relaxed accesses do so together with a fence on their side.
"""

from __future__ import annotations

import numpy as np

from .arena import Arena, Spread
from .emitter import Access
from .lanes import Lanes
from .values import F, S, U


class Atomics:
    def __init__(self, lanes: Lanes, arena: Arena):
        self.lanes, self.arena = lanes, arena
        shape = lanes.in_batch, lanes.grid
        self.cells: dict[int, np.ndarray] = {}
        # By CTA of the batch: acquired but not yet at a barrier; read without order; known when it last fenced.
        self.acquired, self.observed, self.fenced = (np.zeros(shape, np.int32) for _ in range(3))
        # Lanes that have read so since they last went round a loop.
        self.polled = np.zeros(lanes.count, bool)

    @property
    def _shadow(self) -> Spread | None:
        shadow = self.arena.shadow
        return shadow if shadow is not None and shadow.seen is not None else None

    def _order(self, access: Access) -> tuple[bool, bool]:
        """Whether an access acquires and releases, among CTAs."""
        order, _, scope = access.order.partition(".")
        far = scope in ("gpu", "sys")
        return far and order in ("acquire", "acq_rel"), far and order in ("release", "acq_rel")

    def _begin(
        self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        at, start, _ = self.arena.place(access, address, offset, mask)
        self.arena.check_set(start, at, access)
        self.polled[at] = True
        if self._shadow is not None:
            self._shadow.atomic[self.arena.units(start, access.size)] = True
        return at, start

    def _after(self, access: Access, at: np.ndarray, start: np.ndarray, reads: bool, writes: bool) -> None:
        shadow = self._shadow
        if shadow is None:
            return
        acquires, releases = self._order(access)
        for lane, place in zip(at, start, strict=True):
            local, number = int(self.lanes.local[lane]), int(self.lanes.of_cta[lane])
            cell = self.cells.setdefault(int(place), np.zeros(self.lanes.grid, np.int32))
            if reads:
                into = self.acquired if acquires else self.observed
                np.maximum(into[local], cell, out=into[local])
            if writes:
                known = shadow.seen[number].copy() if releases else self.fenced[local]
                if releases:
                    known[number] = self.lanes.epoch[lane]
                np.maximum(cell, known, out=cell)

    def load(self, access: Access, address: np.ndarray, offset: int, mask: np.ndarray) -> np.ndarray:
        at, start = self._begin(access, address, offset, mask)
        found = np.zeros(self.lanes.count, U[access.width])
        found[at] = self.arena.views[access.width][start // access.width]
        self._after(access, at, start, True, False)
        return found

    def store(self, access: Access, address: np.ndarray, offset: int, value: np.ndarray, mask: np.ndarray) -> None:
        at, start = self._begin(access, address, offset, mask)
        view = self.arena.views[access.width]
        self._changed(view[start // access.width], value[at])
        view[start // access.width] = value[at]
        self._after(access, at, start, False, True)

    def _changed(self, old: np.ndarray, new: np.ndarray) -> None:
        if self.arena.shadow is not None and (old != new).any():
            self.arena.shadow.changes += 1

    def update(
        self,
        access: Access,
        address: np.ndarray,
        offset: int,
        values: tuple[np.ndarray, ...],
        operation: str,
        kind: str,
        mask: np.ndarray,
    ) -> np.ndarray:
        """One lane after the other; what each finds there."""
        at, start = self._begin(access, address, offset, mask)
        view = self.arena.views[access.width]
        found = np.zeros(self.lanes.count, U[access.width])
        table = {"s": S, "f": F}.get(kind[0], U)[access.width]
        for lane, place in zip(at, start // access.width, strict=True):
            old = found[lane] = view[place]
            given = [value[lane] for value in values]
            view[place] = new = _updated(operation, old, given, table)
            self._changed(np.atleast_1d(old), np.atleast_1d(new))
        self._after(access, at, start, True, True)
        return found

    def fence(self, mask: np.ndarray) -> None:
        shadow = self._shadow
        if shadow is None:
            return
        for local in np.unique(self.lanes.local[mask]):
            number = local + self.lanes.first
            np.maximum(self.acquired[local], self.observed[local], out=self.acquired[local])
            known = shadow.seen[number].copy()
            known[number] = self.lanes.epoch[local * self.lanes.size]
            np.maximum(self.fenced[local], known, out=self.fenced[local])

    def at_barrier(self, local: int) -> None:
        """What a CTA has acquired holds for all of its threads."""
        if self._shadow is not None:
            seen = self._shadow.seen[local + self.lanes.first]
            np.maximum(seen, self.acquired[local], out=seen)


def _updated(operation: str, old: np.generic, given: list[np.generic], kind: type) -> np.generic:
    a, b = old.view(kind), given[0].view(kind)
    if operation == "add":
        found = a + b
    elif operation in ("min", "max"):
        found = (min if operation == "min" else max)(a, b)
    elif operation in ("and", "or", "xor"):
        found = {"and": a & b, "or": a | b, "xor": a ^ b}[operation]
    elif operation == "exch":
        found = b
    elif operation == "cas":
        found = given[1].view(kind) if a == b else a
    else:
        found = kind(0) if a >= b else a + kind(1)
    return found.view(old.dtype)
