"""Products of warp groups (``wgmma``): operands in shared memory by descriptors, lent to them until their wait."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .findings import Findings, Refused, Site
from .matrices import rows, spread
from .shadow import NEVER
from .shared import Shared
from .values import from_bf16

# Bytes of a swizzled row by the layout field of a descriptor.
_SWIZZLE = {1: 128, 2: 64, 3: 32}
_SIZE = 128


class Groups:
    """The products of a batch, executed where they are issued; what they read is lent until their wait."""

    def __init__(self, shared: Shared, findings: Findings):
        self.shared, self.findings = shared, findings
        # By warp group: units of the products that are not committed, and of those of each group that is.
        self.open: dict[int, list[np.ndarray]] = defaultdict(list)
        self.closed: dict[int, list[list[np.ndarray]]] = defaultdict(list)

    def product(
        self,
        sums: tuple[np.ndarray, ...],
        left: np.ndarray | tuple[np.ndarray, ...],
        right: np.ndarray,
        keep: np.ndarray,
        transposed: tuple[int, int],
        kind: str,
        mask: np.ndarray,
        site: Site,
    ) -> list[np.ndarray]:
        there = mask.reshape(-1, _SIZE)
        groups = np.flatnonzero(there.any(1))
        if not there[groups].all():
            self.findings.note("divergence", "part of a warp group at what takes a whole one", site)
        columns = 2 * len(sums)
        b = self._operand(right, groups, columns, bool(transposed[1]), kind, site)
        if isinstance(left, tuple):
            fragments = [one.reshape(-1, _SIZE)[groups].ravel() for one in left]
            a = rows(*fragments, kind).reshape(len(groups), 64, 16)
        else:
            a = self._operand(left, groups, 64, bool(transposed[0]), kind, site)
        made = spread(np.matmul(a, b.transpose(0, 2, 1)))
        going_on = keep.reshape(-1, _SIZE)[groups].ravel()
        found = []
        for old, new in zip(sums, made, strict=True):
            whole = old.copy()
            held = whole.reshape(-1, _SIZE)[groups].ravel()
            whole.reshape(-1, _SIZE)[groups] = np.where(going_on, held + new, new).reshape(len(groups), _SIZE)
            found.append(whole)
        return found

    def _operand(
        self, descriptor: np.ndarray, groups: np.ndarray, size: int, transposed: bool, kind: str, site: Site
    ) -> np.ndarray:
        """``[groups, size, 16]`` float32; ``transposed``: rows lie side by side, not the 16 they are summed over."""
        shared, given = self.shared, descriptor.reshape(-1, _SIZE)[groups]
        if (given != given[:, :1]).any():
            self.findings.note("divergence", "descriptors of a warp group that differ", site)
        words = given[:, 0]
        layouts = np.unique(words >> np.uint64(62))
        if len(layouts) != 1 or int(layouts[0]) not in _SWIZZLE:
            raise Refused(f"{site}: a descriptor of layout {layouts}")
        wide = _SWIZZLE[int(layouts[0])]
        start, lead, stride = (
            (((words >> np.uint64(bit)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)[:, None, None]
            for bit in (0, 16, 32)
        )
        row, k = np.arange(size)[:, None], np.arange(16)[None, :]
        if transposed:
            across = wide // 2
            offset = row // across * lead + k // 8 * stride + k % 8 * wide + row % across * 2
        else:
            offset = row // 8 * stride + row % 8 * wide + k * 2
        place = start + offset
        place = place ^ (((place >> 7) & (wide // 16 - 1)) << 4)
        if place.min() < 0 or place.max() + 2 > shared.size:
            example = f"byte {int(place.max())} of {shared.size}"
            self.findings.note("bounds", "the operand of a product in shared memory", site, example)
            place = np.clip(place, 0, shared.size - 2)
        lanes = groups * _SIZE
        place = (place + shared.lanes.home[lanes][:, None, None]).reshape(len(groups), -1)
        self._look(place, lanes, site)
        words16 = shared.views[2][place // 2].reshape(len(groups), size, 16)
        return from_bf16(words16) if kind == "bf16" else words16.view(np.float16).astype(np.float32)

    def _look(self, place: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        shared = self.shared
        units = place // shared.unit
        if (shared.shadow.epoch[units] == NEVER).any():
            self.findings.note("uninitialised", "the operand of a product that nobody wrote", site)
        if shared.unfenced[units].any():
            self.findings.note("asynchronous", "the operand of a product without a fence after it was written", site)
        # The group reads as one thread of its own would.
        shared.shadow.read(units, lanes, shared.lanes, site)
        for group, own in zip(lanes // _SIZE, units, strict=True):
            self.open[int(group)].append(np.unique(own))
            shared.lent[self.open[int(group)][-1]] += 1

    def commit(self, mask: np.ndarray) -> None:
        for group in self._groups(mask):
            self.closed[group].append(self.open.pop(group, []))

    def wait(self, mask: np.ndarray, newest: int) -> None:
        """All but the ``newest`` committed groups of each warp group are done."""
        shared = self.shared
        for group in self._groups(mask):
            committed = self.closed[group]
            done = len(committed) - newest
            for units in (units for products in committed[: max(done, 0)] for units in products):
                shared.lent[units] -= 1
                shared.shadow.read_epoch[units] = shared.lanes.epoch[group * _SIZE]
            self.closed[group] = committed[max(done, 0) :]

    @staticmethod
    def _groups(mask: np.ndarray) -> list[int]:
        return np.flatnonzero(mask.reshape(-1, _SIZE).any(1)).tolist()
