"""LaMemo's attention and layer, time and memory, against the literal form and against looking back alone.

A row has both: ``median`` and its like in milliseconds, ``peak_bytes`` and, where there is a backward pass, what is
kept for it, ``saved_bytes``. The memory is full, the layer post-norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.contenders.look_ahead import OPERATIONS, LookAheadShape
from bench.contenders.providers import REGISTRY, compare
from bench.measure.comparison import Limits
from bench.measure.contender import OURS
from bench.measure.gate import FORWARD, TRAINING
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report.terminal import memory_table, timed_table, where

# In the first one ours must be no worse than the literal form.
CPU_SHAPES = [
    LookAheadShape("256", 4, 256, 256, 512, 8, 64, 2048),
    LookAheadShape("E=32", 16, 128, 128, 32, 4, 8, 128),
    LookAheadShape("long memory", 1, 128, 1024, 512, 8, 64, 2048),
]
# The original's own, and one that its code is quadratic in.
GPU_SHAPES = [
    LookAheadShape("enwik8", 20, 512, 512, 512, 8, 64, 2048),
    LookAheadShape("wt103", 32, 150, 150, 410, 10, 41, 2100),
    LookAheadShape("long memory", 20, 512, 2048, 512, 8, 64, 2048),
]
QUICK_SHAPES = [LookAheadShape("quick", 2, 24, 40, 16, 2, 8, 64)]
LITERAL = "literal"


def add_arguments(add: Callable[..., Any]) -> None:
    add("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: both")


def cases(context: Context) -> list[Case]:
    limits = Limits(seconds=0.5, budget=0.2) if context.quick else Limits(seconds=20, budget=4)
    real = GPU_SHAPES if context.on_gpu else CPU_SHAPES
    shapes, found = QUICK_SHAPES if context.quick else real, []
    for shape in shapes:
        for operation in context.options["operations"]:
            # Compiling it takes minutes, so once: at the first shape.
            compiles = shape is shapes[0] and not context.quick
            names = [name for name in REGISTRY[operation] if compiles or name != "literal, compiled"]
            one = compare(context, operation, shape, names, (FORWARD, TRAINING), limits)
            found.append(Case(f"{operation}/{shape.name}", one.time_and_memory, one.check))
    return found


def ratios(rows: list[Row]) -> Iterator[str]:
    """The literal form's time and memory over ours, and whether the bar is met where it stands."""
    found = {(row["operation"], row["shape"]["name"], row["direction"], row["provider"]): row for row in rows}
    for (operation, name, direction, provider), row in found.items():
        own = found.get((operation, name, direction, OURS), {"gap": "absent"})
        if provider != LITERAL or "gap" in row or "gap" in own:
            continue
        said = {"time": row["ratio"], "peak": row["peak_bytes"] / own["peak_bytes"]}
        if own.get("saved_bytes"):
            said["kept"] = row["saved_bytes"] / own["saved_bytes"]
        held = [ratio for what, ratio in said.items() if what != "peak"]
        bar = f"; the bar is {'met' if min(held) >= 1 else 'missed'}" if name == CPU_SHAPES[0].name else ""
        yield f"{where(row)}: {', '.join(f'{what} {ratio:.3g}x' for what, ratio in said.items())}{bar}"


def show(rows: list[Row]) -> str:
    told = list(ratios(rows))
    head = ["The literal form over ours:"] if told else []
    return "\n\n".join([timed_table(rows), memory_table(rows), "\n".join([*head, *told])])
