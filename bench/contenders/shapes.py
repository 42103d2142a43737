"""Shapes, FLOP and byte counts of section 3 of the performance notes, and the goals of section 6.

T = B·L tokens, U = T·E·2 bytes: one bf16 activation. A layer has four stages: the tree, the projections of
tokens and nodes, the attention, the output projection. Weights are counted, too: read once, and read and
written again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STAGES = ("tree", "project", "attend", "out")
DIRECTIONS = ("forward", "backward")
# Of an operation that is compared.
_STAGES_OF = {"tree": ("tree",), "projections": ("project",), "attention": ("attend",), "layer": STAGES}


@dataclass(frozen=True)
class Size:
    """A batch of rows of so many tokens; kinds of layers add sizes of their own."""

    name: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def row(self) -> dict[str, Any]:
        """As rows of results have it."""
        return asdict(self)

    def least_ms(self, operation: str, ways: Sequence[str], rate: float, bandwidth: float, itemsize: int) -> float:
        """Roofline of an operation in the directions ``ways``, every stage at its own."""
        raise NotImplementedError(f"{type(self).__name__} must define least_ms()")


@dataclass(frozen=True)
class Shape(Size):
    """A batch and a layer: (B, L, E, H, m)."""

    embedding: int
    heads: int
    bank: int

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

# Goal 9: one layer at E = 512 over growing L. Goal 3: 32768 tokens at E = 1024, cut into ever longer rows.
SCALING = [Shape(str(1 << k), 1, 1 << k, 512, 8, 1) for k in range(13, 21)]
CROSSOVER = [Shape(str(1 << k), 1 << (15 - k), 1 << k, 1024, 16, 1) for k in range(9, 15)]
QUICK_SCALING = [Shape(str(1 << k), 1, 1 << k, 8, 2, 1) for k in range(5, 8)]
QUICK_CROSSOVER = [Shape(str(1 << k), 1 << (6 - k), 1 << k, 16, 2, 1) for k in range(4, 6)]


def flops(shape: Shape, stage: str, direction: str = "forward") -> float:
    """Floating-point operations of a stage (section 3: 4m, 6+4m, and 2 times E² a token; attention apart)."""
    squares = shape.tokens * shape.embedding**2
    backward = direction == "backward"
    if stage == "attend":
        return (10 if backward else 4) * shape.embedding * shape.mean_slots * shape.tokens
    forward = {"tree": 4 * shape.bank, "project": 6 + 4 * shape.bank, "out": 2}[stage] * squares
    return 2.0 * forward if backward else float(forward)


def moved_bytes(shape: Shape, stage: str, direction: str = "forward", itemsize: int = 2) -> int:
    """Fewest bytes of a stage (section 3), of that many an element: activations in U, and the weights."""
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


def staged_floor_ms(shape: Shape, rate: float, bandwidth: float) -> float:
    """Forward and backward, every stage at its own roofline (section 3, table d)."""
    return sum(floor_ms(shape, stage, way, rate, bandwidth) for stage in STAGES for way in DIRECTIONS)


def naive_peak_bytes(shape: Shape) -> float:
    """Peak of the materialising form, forward and backward: 5.9·S·U (section 3, activation memory)."""
    return 5.9 * shape.slots * shape.unit


def our_peak_bytes(shape: Shape) -> float:
    """Peak of the fused form with everything saved: (10 + 5m)·U (section 3, activation memory)."""
    return (10 + 5 * shape.bank) * shape.unit


def decode_bytes(batch: int, embedding: int, length: int, bank: int = 1) -> int:
    """Bytes of a token of each row at position ``length``: weights and cached nodes (section 4)."""
    slots = 1 + bank * (length.bit_length() - 1)
    return (4 + 2 * bank) * embedding**2 * 2 + batch * embedding * 2 * (2 * (slots - 1) + 7)


def cache_bytes(batch: int, embedding: int, length: int) -> int:
    """Bytes of the keys and values that attention over ``length`` tokens reads for a token of each row (section 4)."""
    return 4 * batch * embedding * length


def decode_name(batch: int, embedding: int, length: int | str) -> str:
    """How rows of decode timings end."""
    return f"B={batch} E={embedding} n={length}"


def log_slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x."""
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread


Measured = Mapping[str, float]
"""Values of rows by their key: ms, bytes, or, for the ceilings, bytes and FLOPs a second."""


@dataclass(frozen=True)
class Goal:
    """One bar of section 6.

    Attributes:
        number: of the goal there.
        what: what is measured.
        low, high: the bar: at least, at most, or both.
        limit: what the notes hold to be possible.
        measure: the value, or None where a measurement that it needs is missing.
    """

    number: int
    what: str
    low: float | None
    high: float | None
    limit: str
    measure: Callable[[Measured, Mapping[str, Shape]], float | None]

    @property
    def bar(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}"

    def met(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _key(key: str, scale: float = 1.0) -> Callable[[Measured, Mapping[str, Shape]], float | None]:
    return lambda measured, _: measured[key] * scale if key in measured else None


def _over(slow: str, fast: str) -> Callable[[Measured, Mapping[str, Shape]], float | None]:
    return lambda measured, _: measured[slow] / measured[fast] if slow in measured and fast in measured else None


def _copy_share(name: str, direction: str) -> Callable[[Measured, Mapping[str, Shape]], float | None]:
    def measure(measured: Measured, shapes: Mapping[str, Shape]) -> float | None:
        key = f"kernel/attend {direction}/{name}"
        if key not in measured or "copy" not in measured:
            return None
        return moved_bytes(shapes[name], "attend", direction) / (1e-3 * measured[key]) / measured["copy"]

    return measure


def _floor_share(name: str) -> Callable[[Measured, Mapping[str, Shape]], float | None]:
    def measure(measured: Measured, shapes: Mapping[str, Shape]) -> float | None:
        key = f"training/ours/{name}"
        if key not in measured or "copy" not in measured or "product" not in measured:
            return None
        return staged_floor_ms(shapes[name], measured["product"], measured["copy"]) / measured[key]

    return measure


def _slope(measured: Measured, _: Mapping[str, Shape]) -> float | None:
    points = [(float(k.split("/")[-1]), v) for k, v in measured.items() if k.startswith("scaling/ours/")]
    return log_slope(points) if len(points) > 2 else None


def _crossover(measured: Measured, _: Mapping[str, Shape]) -> float | None:
    """Shortest rows from which on ours beat every attention layer; infinite where the longest ones lose."""
    lengths = sorted({int(key.split("/")[-1]) for key in measured if key.startswith("crossover/")}, reverse=True)
    found = math.inf if lengths else None
    for length in lengths:
        ours = measured.get(f"crossover/ours/{length}")
        others = [v for k, v in measured.items() if k.startswith("crossover/") and k.endswith(f"/{length}")]
        if ours is None or len(others) < 2 or ours > min(others):
            break
        found = float(length)
    return found


def _runs(key: str) -> Callable[[Measured, Mapping[str, Shape]], float | None]:
    return lambda measured, _: 1.0 if key in measured else None


def _decode_goals() -> list[Goal]:
    bars = [(1, 32, 4, "4.7"), (1, 128, 12, "16"), (1, 1024, 80, "118"), (32, 32, 80, "111"), (32, 128, 300, "438")]
    found = [
        Goal(8, f"KV cache / ours, a token, B={batch}, n={k}k", bar, None, limit,
             _key(f"ratio/decode/{decode_name(batch, 1024, k << 10)}"))
        for batch, k, bar, limit in bars
    ]  # fmt: skip
    far, tail = (f"ratio/decode/{what}/{decode_name(1, 1024, n)}" for what, n in (("far", 1 << 20), ("p99", 1 << 17)))
    found.append(Goal(8, "a token at n=1M / at n=1k, B=1", None, 1.2, "1", _key(far)))
    return [*found, Goal(8, "99th percentile / median of a token, B=1", None, 3, "-", _key(tail))]


GOALS = [
    Goal(1, "naive / ours, training at C", 10, None, "10.5", _key("ratio/training/naive/C")),
    Goal(1, "naive / ours, training at D", 14, None, "15.6", _key("ratio/training/naive/D")),
    Goal(1, "M runs, where naive needs 132 GB", 1, None, "1", _runs("training/ours/M")),
    Goal(2, "compiled naive / ours, training at C", 5, None, "7, weak", _key("ratio/training/compiled/C")),
    Goal(3, "flash layer / ours, training at C", 7, None, "10.6", _key("ratio/training/flash/C")),
    Goal(3, "cuDNN layer / ours, training at C", 4.5, None, "7.0", _key("ratio/training/cudnn/C")),
    Goal(3, "flash layer / ours, training at D", 20, None, "28", _key("ratio/training/flash/D")),
    Goal(3, "cuDNN layer / ours, training at D", 13, None, "18", _key("ratio/training/cudnn/D")),
    Goal(3, "crossover with attention, L at 32k tokens", None, 4096, "-", _crossover),
    Goal(4, "GLA layer / ours, training at C", 1.25, None, "1.7", _key("ratio/training/gla/C")),
    Goal(4, "simple GLA layer / ours, training at C", 1.1, None, "1.5", _key("ratio/training/simple-gla/C")),
    Goal(4, "GDN layer / ours, training at C", 1.5, None, "2.3", _key("ratio/training/gated-delta-rule/C")),
    Goal(4, "log-linear layer / ours, training at C", 3, None, "unknown", _key("ratio/training/log-linear/C")),
    Goal(5, "attend forward at C, share of copy", 0.85, None, "1", _copy_share("C", "forward")),
    Goal(5, "attend forward at D, share of copy", 0.85, None, "1", _copy_share("D", "forward")),
    Goal(5, "attend backward at C, share of copy", 0.75, None, "1", _copy_share("C", "backward")),
    Goal(5, "attend backward at D, share of copy", 0.75, None, "1", _copy_share("D", "backward")),
    Goal(6, "one product / tree forward at C", 0.85, None, "0.87", _over("kernel/product/C", "kernel/tree forward/C")),
    Goal(6, "one product / tree forward at D", 0.93, None, "0.97", _over("kernel/product/D", "kernel/tree forward/D")),
    Goal(7, "peak memory, naive / ours at C", 6, None, "6.4", _over("memory/naive/C", "memory/ours/C")),
    Goal(7, "peak memory, naive / ours at D", 9, None, "10", _over("memory/naive/D", "memory/ours/D")),
    Goal(7, "peak memory at M, GB", None, 20, "16", _key("memory/ours/M", 1e-9)),
    Goal(7, "peak memory, naive / lean at C", 12, None, "14", _over("memory/naive/C", "memory/lean/C")),
    Goal(7, "peak memory, naive / lean at D", 18, None, "22", _over("memory/naive/D", "memory/lean/D")),
    Goal(7, "peak memory at M, lean, GB", None, 10, "7.5", _key("memory/lean/M", 1e-9)),
    Goal(7, "lean / ours, training at C", None, 1.25, "1.21", _key("ratio/training/lean/C")),
    Goal(7, "lean / ours, training at D", None, 1.25, "1.19", _key("ratio/training/lean/D")),
    *_decode_goals(),
    Goal(9, "slope of log time over log L", 0.95, 1.03, "1", _slope),
    Goal(9, "staged floor / ours, training at C", 0.75, None, "1", _floor_share("C")),
    Goal(9, "staged floor / ours, training at D", 0.75, None, "1", _floor_share("D")),
    Goal(9, "staged floor / ours, training at M", 0.75, None, "1", _floor_share("M")),
    Goal(10, "naive / ours, training at P, both graphs", 8, None, "14 to 17", _key("ratio/graph/naive/P")),
    Goal(10, "naive / ours, training at P, both eager", 7, None, "14", _key("ratio/eager/naive/P")),
]
# What section 6 asks for beyond this list, and why it is not on it.
NOT_MEASURED = "goal 3 at M (attention takes 10 s a pass), goal 8 against fla, goal 10's step on a CPU"
