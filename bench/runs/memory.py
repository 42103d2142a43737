"""Peak memory of a layer over length, forward and forward+backward, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.measure.comparison import Limits
from bench.measure.runner import Case, Context
from bench.report import chapters

from . import scaling

# Not the GRU: on a CPU it is millions of small operations, whose record takes gigabytes.
PROVIDERS = tuple(name for name in scaling.PROVIDERS if name != "GRU")
# Above, a CPU takes minutes a length, and nothing new is seen.
LONGEST_ON_CPU = 17


def add_arguments(add: Callable[..., Any]) -> None:
    add("--longest", type=int, help="the largest length, a power of two (default: 131072 on a CPU)")


def cases(context: Context) -> list[Case]:
    limits = Limits(0.5, 0) if context.quick else Limits(15, 0)
    longest = LONGEST_ON_CPU if context.device.type == "cpu" else scaling.LONGEST
    found = []
    for length in scaling.lengths(context, longest):
        one = scaling.comparison(context, length, PROVIDERS, limits)
        found.append(Case(f"layer/{length}", one.memory, one.check))
    return found


show = chapters.memory
