"""The paper's Figure 10: memory of its network and of attention over length, parallel and sequential (E=32, 1 head)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.measure.comparison import Comparison
from bench.measure.footprint import tensor_bytes
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report import chapters
from lmn_kernels import LogarithmicMixing

from . import paper_fig9 as fig9


def add_arguments(add: Callable[..., Any]) -> None:
    """None of its own."""


def state_rows(context: Context, length: int) -> list[Row]:
    """What a stream keeps behind ``length`` tokens: our state, and the keys and values of attention."""
    shape = fig9.SHAPE
    layer = LogarithmicMixing(
        shape.embedding, shape.heads, shape.bank, backend=context.backend, dtype=context.dtype, device=context.device
    )
    x = torch.zeros(1, length, shape.embedding, dtype=context.dtype, device=context.device)
    with torch.no_grad():
        _, state = layer.prefill(x)
        keys_values = layer.sva.k(x), layer.sva.v(x)
    held = {"ours": tensor_bytes(vars(state)), "attention, cached": tensor_bytes(keys_values)}
    return [
        {
            "provider": name, "operation": "layer", "mode": "sequential", "unit": "bytes", "peak_bytes": count,
            "dtype": str(context.dtype).removeprefix("torch."),
            "shape": fig9.of_length(length).row(),
        }
        for name, count in held.items()
    ]  # fmt: skip


def cases(context: Context) -> list[Case]:
    found = []
    for length in fig9.lengths(context):
        one = fig9.parallel(context, length)

        def measure(one: Comparison = one) -> list[Row]:
            return [fig9.in_parallel(row) for row in one.memory()]

        found.append(Case(f"parallel/{length}", measure, one.check))
    for length in fig9.lengths(context):
        found.append(Case(f"sequential/{length}", partial(state_rows, context, length)))
    return found


show = chapters.memory
