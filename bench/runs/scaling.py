"""Time of a layer over length, from 128 to 1,048,576 tokens, and the slope of its logarithm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from bench.contenders.providers import compare
from bench.contenders.shapes import Shape
from bench.extras import numpy
from bench.measure.comparison import Comparison, Limits
from bench.measure.contender import OURS
from bench.measure.gate import FORWARD, TRAINING
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report import chapters

# Of compiled forms every length is a compilation of its own; they are in `kernels`.
PROVIDERS = (
    "ours", "materialised", "node-level", "sdpa-flash", "sdpa-cudnn", "sdpa-math",
    "gla", "simple-gla", "gated-delta-rule", "log-linear", "GRU", "LSTM",
)  # fmt: skip
SHORTEST, LONGEST, QUICK_LONGEST = 7, 20, 10
# Below, fixed costs dominate; a slope says nothing there.
FROM_LENGTH = 1 << 13


def add_arguments(add: Callable[..., Any]) -> None:
    add("--longest", type=int, help="the largest length, a power of two (default: 1048576, or 1024 with --quick)")


def lengths(context: Context, longest: int = LONGEST) -> list[int]:
    """Powers of two up to what was asked for."""
    top = context.options.get("longest") or (1 << (QUICK_LONGEST if context.quick else longest))
    return [1 << power for power in range(SHORTEST, top.bit_length())]


def base_shape(context: Context) -> Shape:
    """A layer of the device's size; its length is to be replaced."""
    return Shape("", 1, 1, 512, 8, 1) if context.on_gpu and not context.quick else Shape("", 1, 1, 64, 4, 1)


def comparison(context: Context, length: int, names: tuple[str, ...], limits: Limits) -> Comparison:
    shape = replace(base_shape(context), name=str(length), length=length)
    return compare(context, "layer", shape, names, (FORWARD, TRAINING), limits)


def cases(context: Context) -> list[Case]:
    limits = Limits(0.5, 0.1, least=2) if context.quick else Limits(6, 1.0, least=3)
    found = []
    if context.on_gpu:
        # Ours alone says how it scales in a fraction of the time.
        for length in lengths(context):
            if length >= FROM_LENGTH or context.quick:
                one = comparison(context, length, (OURS,), limits)
                found.append(Case(f"ours/{length}", one.time, one.check))
        found.append(Case("slopes of ours", derive=slopes))
    for length in lengths(context):
        one = comparison(context, length, PROVIDERS, limits)
        found.append(Case(f"layer/{length}", one.time, one.check))
    return [*found, Case("slopes", derive=slopes)]


def slopes(rows: Iterable[Row]) -> list[Row]:
    """The slope of log time over log length of every provider and direction, from 8192 tokens on."""
    points: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if "median" in row:
            points[row["provider"], row["direction"]][row["shape"]["length"]] = row["median"]
    found: list[Row] = []
    longest = max((length for times in points.values() for length in times), default=0)
    # A short rehearsal has none of the lengths that a slope should be of.
    start = FROM_LENGTH if longest >= 4 * FROM_LENGTH else 0
    for (provider, direction), times in points.items():
        used = {length: time for length, time in sorted(times.items()) if length >= start}
        if len(used) < 3:
            # Short ones have no say: what fixed costs make of them is no slope.
            found.append({"provider": provider, "operation": "layer", "direction": direction, "slope": None})
            continue
        slope = numpy.polyfit([math.log(n) for n in used], [math.log(t) for t in used.values()], 1)[0]
        head = {"provider": provider, "operation": "layer", "direction": direction}
        found.append({**head, "slope": round(float(slope), 3), "from_length": min(used), "to_length": max(used)})
    return found


show = chapters.scaling
