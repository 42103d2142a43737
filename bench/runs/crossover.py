"""Rows of ever more tokens, always as many in all: from which length on a layer of ours beats one of attention.

The last row, ``crossover``, is the shortest length from which on ours beat every attention layer, null where the
longest rows lose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from bench.contenders.providers import compare
from bench.contenders.shapes import CROSSOVER, QUICK_CROSSOVER, Shape
from bench.measure.comparison import Limits
from bench.measure.contender import OURS
from bench.measure.gate import TRAINING
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report.terminal import timed_table

PROVIDERS = (OURS, "sdpa-flash", "sdpa-cudnn")
CPU_SHAPES = [Shape(str(1 << k), 1 << (13 - k), 1 << k, 64, 4, 1) for k in range(6, 14)]


def add_arguments(add: Callable[..., Any]) -> None:
    """None of its own."""


def cases(context: Context) -> list[Case]:
    shapes = QUICK_CROSSOVER if context.quick else CROSSOVER if context.on_gpu else CPU_SHAPES
    limits = Limits(0.5, 0.1, least=2) if context.quick else Limits(seconds=10, budget=1)
    found = []
    for shape in shapes:
        one = compare(context, "layer", shape, PROVIDERS, (TRAINING,), limits)
        found.append(Case(f"layer/{shape.name}", one.time, one.check))
    return [*found, Case("crossover", derive=crossover)]


def crossover(rows: Iterable[Row]) -> list[Row]:
    """The row that follows from all others."""
    ratios: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if "ratio" in row:
            ratios[row["shape"]["length"]].append(row["ratio"])
    found = None
    for length in sorted(ratios, reverse=True):
        if min(ratios[length]) < 1:
            break
        found = length
    return [{"provider": OURS, "operation": "layer", "direction": TRAINING, "crossover": found}]


def show(rows: list[Row]) -> str:
    timed, (last,) = rows[:-1], rows[-1:]
    told = "at no length" if last["crossover"] is None else f"from L = {last['crossover']:,} on"
    return f"{timed_table(timed)}\n\nOurs beats attention {told}."
