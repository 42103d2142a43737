"""The threads of a batch of CTAs as lanes of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np


class Lanes:
    """Who each lane is, and how far its CTA and warp have come.

    Attributes:
        count: of lanes; ``size`` of them are a CTA, ``first`` is the first CTA of the batch and ``grid`` how many are.
        local: of a lane the place of its CTA in the batch; ``home`` where the CTA's shared memory begins.
        number: of a lane among all threads of the launch.
        epoch: barriers that a lane's CTA has passed; ``beat`` those of its warp.
    """

    def __init__(self, first: int, ctas: int, size: int, grid: int, pitch: int):
        self.first, self.size, self.grid, self.in_batch = first, size, grid, ctas
        self.count = count = ctas * size
        place = np.arange(count, dtype=np.int64)
        self.index = place
        self.local = place // size
        self.home = self.local * pitch
        self.number = (place + first * size).astype(np.int32)
        self.of_cta = (self.local + first).astype(np.int32)
        self.tid = (place % size).astype(np.uint32)
        self.cta = (self.local + first).astype(np.uint32)
        self.lane_id = self.tid & np.uint32(31)
        self.warp_id = self.tid >> np.uint32(5)
        self.warp = (self.number >> 5).astype(np.int32)
        self.threads, self.ctas = np.full(count, size, np.uint32), np.full(count, grid, np.uint32)
        self.zero, self.one = np.zeros(count, np.uint32), np.ones(count, np.uint32)
        self.epoch, self.beat = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self._full: dict[tuple[Any, Any], np.ndarray] = {}

    def full(self, value: Any) -> np.ndarray:
        """One value a lane; never written to."""
        key = (value.dtype, value.tobytes())
        found = self._full.get(key)
        if found is None:
            found = self._full[key] = np.full(self.count, value)
        return found

    def warps(self, mask: np.ndarray) -> np.ndarray:
        return mask.reshape(-1, 32).any(1)
