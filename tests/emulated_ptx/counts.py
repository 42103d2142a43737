"""What a launch did: warp-instructions by kind, sectors, bank conflicts, work of the tensor cores."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from .emitter import Access

SECTOR, BANKS = 32, 32


class Counts:
    """Of one launch.

    Args:
        memory: whether sectors and bank conflicts are counted, which takes time.

    Attributes:
        blocks: that some thread came to.
    """

    def __init__(self, memory: bool):
        self.memory = memory
        self.instructions: Counter[str] = Counter()
        self.blocks: set[int] = set()
        self.operations = 0
        self.tensor_instructions = 0
        self.found: Counter[str] = Counter()

    def block(self, number: int, names: Counter[str], warps: int) -> None:
        self.blocks.add(number)
        for name, number in names.items():
            self.instructions[name] += number * warps

    def tensor(self, operations: int, mask: np.ndarray, each: int) -> None:
        """A product of so many multiplications by every ``each`` lanes of a mask."""
        number = int(mask.reshape(-1, each).any(1).sum())
        self.tensor_instructions += number
        self.operations += number * operations

    def sectors(self, access: Access, start: np.ndarray, at: np.ndarray, what: str) -> None:
        """32-byte sectors that each warp's access touches, and the bytes it asked for."""
        if not self.memory or not len(at):
            return
        warp = at.astype(np.int64) >> 5
        keys = np.concatenate([(warp << 44) | (start // SECTOR), (warp << 44) | ((start + access.size - 1) // SECTOR)])
        self.found[f"global sectors {what}"] += len(np.unique(keys))
        self.found[f"global bytes {what}"] += len(at) * access.size
        self.found[f"global requests {what}"] += len(np.unique(warp))

    def banks(self, access: Access, start: np.ndarray, at: np.ndarray) -> None:
        """Passes over the banks; a quarter of a warp goes together with 16 bytes a lane, a half with 8."""
        if not self.memory or not len(at):
            return
        together = {16: 8, 8: 16}.get(access.size, 32)
        words = max(access.size // 4, 1)
        group = np.repeat(at // together, words)
        word = ((start >> 2)[:, None] + np.arange(words)).ravel()
        key = np.unique((group << 24) | word)
        bank, passes = np.unique(((key >> 24) << 5) | (key & (BANKS - 1)), return_counts=True)
        owner = bank >> 5
        first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        self.found["shared passes"] += int(np.maximum.reduceat(passes, first).sum())
        self.found["shared requests"] += len(first)

    def redundant(self, access: Access, lanes: int) -> None:
        self.found["stores of the same value to the same place"] += lanes

    def as_json(self) -> dict[str, Any]:
        return {
            "warp_instructions": sum(self.instructions.values()),
            "by_kind": dict(sorted(self.instructions.items())),
            "tensor_instructions": self.tensor_instructions,
            "tensor_multiplications": self.operations,
            **{name.replace(" ", "_"): number for name, number in sorted(self.found.items())},
        }
