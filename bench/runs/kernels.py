"""Tree, projections, attention and the whole layer, forward and forward+backward, against every other form and peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.contenders.problems import OPERATIONS
from bench.contenders.providers import REGISTRY
from bench.contenders.shapes import SHAPES, Shape
from bench.measure.comparison import Comparison, Limits
from bench.measure.gate import FORWARD, TRAINING
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report.terminal import timed_table

CPU_SHAPES = [SHAPES["P"], Shape("S", 1, 4096, 256, 4, 1), Shape("W", 1, 2048, 512, 8, 1)]
QUICK_SHAPES = [Shape("quick", 2, 256, 32, 4, 2)]


def add_arguments(add: Callable[..., Any]) -> None:
    add("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")


def shapes(context: Context) -> list[Shape]:
    if context.quick:
        return QUICK_SHAPES
    return list(SHAPES.values()) if context.device.type == "cuda" else CPU_SHAPES


def cases(context: Context) -> list[Case]:
    limits = Limits(seconds=0.5, budget=0.2) if context.quick else Limits(seconds=20, budget=4)
    found = []
    for shape in shapes(context):
        for operation in context.options["operations"]:
            # Compiling it takes longer than all the rest of a rehearsal.
            left_out = {"materialised, compiled"} if context.quick else set()
            names = [name for name in REGISTRY[operation] if name not in left_out]
            comparison = Comparison(
                operation, shape, context.dtype, context.device, names, (FORWARD, TRAINING),
                limits, context.quick, context.backend,
            )  # fmt: skip
            found.append(Case(f"{operation}/{shape.name}", comparison.time, comparison.check))
    return found


def show(rows: list[Row]) -> str:
    return timed_table(rows)
