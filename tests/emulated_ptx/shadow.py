"""Who touched what: for each unit of memory the last write, and who read it since its CTA's last barrier.

Within a CTA two accesses are ordered by the thread itself, a barrier of the CTA, or one of the warp. Epochs of
different CTAs say nothing about each other; of those `Spread` keeps count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .findings import Findings, Site
from .lanes import Lanes

NEVER, PENDING = -1, 1 << 30


@dataclass
class _Read:
    units: np.ndarray
    lanes: np.ndarray
    epoch: np.ndarray
    beat: np.ndarray


class Shadow:
    """Of the CTAs' own memory, or of what a launch writes.

    Args:
        units: of memory.
        where: "shared" or "global", for findings.
    """

    def __init__(self, units: int, where: str, findings: Findings):
        self.where, self.findings = where, findings
        self.epoch = np.full(units, NEVER, np.int32)
        self.writer, self.beat = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.read_epoch = np.full(units, NEVER, np.int32)
        self.reads: list[_Read] = []

    def passed(self, lanes: Lanes) -> None:
        """A barrier was passed: reads before it are of no account to the CTA any more."""
        if len(self.reads) > 32:
            self.reads = [one for one in self.reads if (one.epoch == lanes.epoch[one.lanes]).any()]

    def read(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> None:
        """Lanes ``at`` read ``units [lanes, k]``."""
        epoch = lanes.epoch[at]
        last = self.epoch[units]
        if last.max(initial=NEVER) >= epoch.min(initial=PENDING):
            self._after_write(last >= epoch[:, None], units, at, lanes, site, "read")
        self.read_epoch[units] = epoch[:, None]
        self.reads.append(self._reading(units, at, lanes))

    @staticmethod
    def _reading(units: np.ndarray, at: np.ndarray, lanes: Lanes) -> _Read:
        return _Read(units, at, lanes.epoch[at], lanes.beat[at])

    def write(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> np.ndarray:
        """Lanes ``at`` write; those of which another lane has written the same at the same time."""
        epoch = lanes.epoch[at][:, None]
        recent = self.epoch[units] >= epoch
        if recent.any():
            self._after_write(recent, units, at, lanes, site, "write")
        self._after_reads(units, at, lanes, site)
        me = at.astype(np.int32)[:, None]
        self.epoch[units] = epoch
        self.writer[units] = me
        self.beat[units] = lanes.beat[at][:, None]
        return (self.writer[units] != me).any(1)

    def _after_write(
        self, recent: np.ndarray, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site, what: str
    ) -> None:
        rows, columns = np.nonzero(recent)
        unit, lane = units[rows, columns], at[rows]
        pending = self.epoch[unit] == PENDING
        if pending.any():
            example = f"unit {int(unit[pending][0])} of lane {int(lane[pending][0])}"
            self.findings.note("asynchronous", f"{what} of what a copy still writes", site, example, int(pending.sum()))
        writer = self.writer[unit]
        ordered = (writer == lane) | pending
        ordered |= (lanes.warp[writer] == lanes.warp[lane]) & (self.beat[unit] < lanes.beat[lane])
        self._note(~ordered, f"{what} after a write by another thread", unit, lane, writer, site)

    def _after_reads(self, units: np.ndarray, at: np.ndarray, lanes: Lanes, site: Site) -> None:
        recent = self.read_epoch[units] == lanes.epoch[at][:, None]
        if not recent.any():
            return
        rows, columns = np.nonzero(recent)
        writer = np.full(len(self.epoch), -1, np.int32)
        writer[units[rows, columns]] = at[rows]
        for one in self.reads:
            by = writer[one.units]
            reader = one.lanes[:, None]
            hit = (by >= 0) & (by != reader) & (one.epoch == lanes.epoch[one.lanes])[:, None]
            if not hit.any():
                continue
            where, column = np.nonzero(hit)
            lane, before = by[where, column], one.lanes[where]
            ordered = (lanes.warp[lane] == lanes.warp[before]) & (one.beat[where] < lanes.beat[lane])
            ordered |= lanes.local[lane] != lanes.local[before]
            self._note(~ordered, "write after a read by another thread", one.units[where, column], lane, before, site)

    def _note(
        self, bad: np.ndarray, what: str, unit: np.ndarray, lane: np.ndarray, other: np.ndarray, site: Site
    ) -> None:
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            example = f"unit {int(unit[k])}, lanes {int(lane[k])} and {int(other[k])} of the batch"
            self.findings.note("race", f"{self.where} {what}, nothing between", site, example, int(bad.sum()))
