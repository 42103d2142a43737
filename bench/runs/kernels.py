"""Tree, projections, attention and the whole layer, forward and forward+backward, against every other form and peer.

On a GPU contenders come in groups, each beside ours in a case of its own (``layer/C/attention``), the most telling ones
first; the parts of a layer are timed forward and backward, and a layer's rows have its memory besides. Shapes whose
launches cost more than their work are timed as calls in a row and as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.contenders import linear_attention
from bench.contenders.problems import OPERATIONS
from bench.contenders.providers import REGISTRY, compare
from bench.contenders.shapes import QUICK_SHAPES as REHEARSED
from bench.contenders.shapes import SHAPES, Shape
from bench.measure.comparison import EAGER, GRAPH, Limits
from bench.measure.contender import OURS
from bench.measure.gate import BACKWARD, FORWARD, TRAINING
from bench.measure.runner import Case, Context
from bench.report import chapters

CPU_SHAPES = [SHAPES["P"], Shape("S", 1, 4096, 256, 4, 1), Shape("W", 1, 2048, 512, 8, 1)]
QUICK_SHAPES = [Shape("quick", 2, 256, 32, 4, 2)]
# By importance: goals are of the first two, and what is small is timed as graphs.
GPU_ORDER = ("C", "D", "P", "A", "M")
SMALL = ("P", "A")
GROUPS = ("main", "attention", "linear", "compiled", "forms", "recurrent")
MAIN = ("ours, reference", "ours, lean", "materialised", "one product")
# Compiling takes longer than all the rest of a rehearsal, and than most of a run.
COMPILED = ("materialised, compiled", "materialised, autotuned")


def add_arguments(add: Callable[..., Any]) -> None:
    add("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")


def shapes(context: Context) -> list[Shape]:
    if context.on_gpu:
        named = REHEARSED if context.quick else SHAPES
        return [named[name] for name in GPU_ORDER]
    return QUICK_SHAPES if context.quick else CPU_SHAPES


def group_of(name: str) -> str:
    """Which of `GROUPS` a provider is in."""
    if name.startswith("sdpa-"):
        return "attention"
    if name in linear_attention.KINDS:
        return "linear"
    if name in ("GRU", "LSTM"):
        return "recurrent"
    if name in (*COMPILED, "FlexAttention"):
        return "compiled"
    return "main" if name in MAIN else "forms"


def cases(context: Context) -> list[Case]:
    operations = context.options["operations"]
    if context.on_gpu:
        return list(_gpu_cases(context, operations))
    limits = Limits(seconds=0.5, budget=0.2) if context.quick else Limits(seconds=20, budget=4)
    left_out = COMPILED if context.quick else ()
    found = []
    for shape in shapes(context):
        for operation in operations:
            names = [name for name in REGISTRY[operation] if name not in left_out]
            one = compare(context, operation, shape, names, (FORWARD, TRAINING), limits)
            found.append(Case(f"{operation}/{shape.name}", one.time, one.check))
    return found


def _gpu_cases(context: Context, operations: list[str]) -> Iterator[Case]:
    limits = Limits(seconds=0.5, budget=0, least=2) if context.quick else Limits(seconds=2, budget=1)
    for group in GROUPS:
        for shape in shapes(context):
            for operation in operations:
                names = [name for name in REGISTRY[operation] if name != OURS and group_of(name) == group]
                if context.quick:
                    names = [name for name in names if group != "compiled"]
                if not names and group != GROUPS[0]:
                    continue
                # In a graph the backward pass cannot be apart from the forward that it belongs to.
                parts = operation != "layer" and shape.name not in SMALL
                ways = (FORWARD, BACKWARD) if parts else (FORWARD, TRAINING)
                for mode in (EAGER, GRAPH) if shape.name in SMALL else (None,):
                    one = compare(context, operation, shape, [OURS, *names], ways, limits, mode)
                    measure = one.time_and_memory if operation == "layer" and mode != GRAPH else one.time
                    case = f"{operation}/{shape.name}/{group}"
                    yield Case(f"{case}/{mode}" if mode else case, measure, one.check)


show = chapters.kernels
