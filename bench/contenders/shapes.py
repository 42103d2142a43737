"""Shapes, FLOP and byte counts of docs/costs.md.

T = B·L tokens, U = T·E·2 bytes: one bf16 activation. A layer has four stages: the tree, the projections of
tokens and nodes, the attention, the output projection. Weights are counted, too: read once, and read and
written again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure.contender import Size

DIRECTIONS = ("forward", "backward")
STAGES = ("tree", "project", "attend", "out")
# Of an operation that is compared.
_STAGES_OF = {
    "tree": ("tree",),
    "projections": ("project",),
    "attention": ("attend",),
    "output": ("out",),
    "layer": STAGES,
}


@dataclass(frozen=True)
class Shape(Size):
    """A batch and a layer: (B, L, E, H, m)."""

    embedding: int
    heads: int
    bank: int

    @property
    def elements(self) -> int:
        return self.tokens * self.embedding

    @property
    def unit(self) -> int:
        """U, the bytes of one bf16 activation."""
        return 2 * self.tokens * self.embedding

    @property
    def slots(self) -> int:
        """S = 1 + m·⌊log2 L⌋, the slots of the last position."""
        return 1 + self.bank * (self.length.bit_length() - 1)

    @property
    def mean_slots(self) -> float:
        """S̄ = 1 + m·mean of ⌊log2 n⌋ over n = 1 … L, by its closed form."""
        top = self.length.bit_length() - 1
        levels = (self.length + 1) * top - 2 ** (top + 1) + 2
        return 1 + self.bank * levels / self.length

    def least_ms(self, operation: str, ways: Sequence[str], rate: float, bandwidth: float, itemsize: int) -> float:
        stages = [(stage, way) for stage in _STAGES_OF[operation] for way in ways]
        return sum(floor_ms(self, stage, way, rate, bandwidth, itemsize) for stage, way in stages)

    def __str__(self) -> str:
        sizes = (self.batch, self.length, self.embedding, self.heads, self.bank)
        return f"{self.name} {sizes}"


def _shapes(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


SHAPES = _shapes(
    Shape("P", 16, 512, 32, 4, 2),
    Shape("A", 8, 2048, 512, 8, 1),
    Shape("C", 1, 32768, 1024, 16, 1),
    Shape("D", 1, 131072, 1024, 16, 2),
    Shape("M", 1, 1048576, 512, 8, 1),
)
# Under the same names, so that a rehearsal walks every path in seconds.
QUICK_SHAPES = _shapes(
    Shape("P", 2, 16, 8, 2, 2),
    Shape("A", 2, 32, 16, 2, 1),
    Shape("C", 1, 32, 16, 2, 1),
    Shape("D", 1, 64, 16, 2, 2),
    Shape("M", 1, 128, 8, 2, 1),
)

# Goal 3: 32768 tokens at E = 1024, cut into ever longer rows.
CROSSOVER = [Shape(str(1 << k), 1 << (15 - k), 1 << k, 1024, 16, 1) for k in range(9, 15)]
QUICK_CROSSOVER = [Shape(str(1 << k), 1 << (6 - k), 1 << k, 16, 2, 1) for k in range(4, 6)]


def flops(shape: Shape, stage: str, direction: str = "forward") -> float:
    """Floating-point operations of a stage (4m, 6+4m, and 2 times E² a token; attention apart)."""
    squares = shape.tokens * shape.embedding**2
    backward = direction == "backward"
    if stage == "attend":
        return (10 if backward else 4) * shape.embedding * shape.mean_slots * shape.tokens
    forward = {"tree": 4 * shape.bank, "project": 6 + 4 * shape.bank, "out": 2}[stage] * squares
    return 2.0 * forward if backward else float(forward)


def moved_bytes(shape: Shape, stage: str, direction: str = "forward", itemsize: int = 2) -> int:
    """Fewest bytes of a stage, of that many an element: activations in U, and the weights."""
    m, unit = shape.bank, shape.unit * itemsize // 2
    weights = {"tree": 2 * m, "project": 3, "attend": 0, "out": 1}[stage] * itemsize * shape.embedding**2
    if direction == "forward":
        units = {"tree": 1 + 2 * m, "project": 4 + 3 * m, "attend": 4 + 2 * m, "out": 2}[stage]
        return units * unit + weights
    units = {"tree": 3 + 5 * m, "project": 8 + 6 * m, "attend": 8 + 4 * m, "out": 4}[stage]
    # Read, and its gradient written: as the weight for the projections, in four bytes for the others.
    return units * unit + (2 if stage == "project" or itemsize >= 4 else 3) * weights


def floor_ms(shape: Shape, stage: str, direction: str, rate: float, bandwidth: float, itemsize: int = 2) -> float:
    """Roofline of a stage: FLOPs over ``rate`` or bytes over ``bandwidth``, whichever takes longer."""
    compute = flops(shape, stage, direction) / rate
    return 1e3 * max(compute, moved_bytes(shape, stage, direction, itemsize) / bandwidth)


def naive_peak_bytes(shape: Shape) -> float:
    """Peak of the materialising form, forward and backward: 5.9·S·U."""
    return 5.9 * shape.slots * shape.unit


def decode_bytes(batch: int, embedding: int, length: int, bank: int = 1) -> int:
    """Bytes of a token of each row at position ``length``: weights and cached nodes."""
    slots = 1 + bank * (length.bit_length() - 1)
    return (4 + 2 * bank) * embedding**2 * 2 + batch * embedding * 2 * (2 * (slots - 1) + 7)


def cache_bytes(batch: int, embedding: int, length: int) -> int:
    """Bytes of the keys and values that attention over ``length`` tokens reads for a token of each row."""
    return 4 * batch * embedding * length
