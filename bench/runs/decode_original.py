"""A stream as the original is called, ``layer(x_t)`` and ``attention(sequential(x_t))``, against its own algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.close import error
from bench.contenders.streams import BitmaskStream
from bench.measure.journal import Row
from bench.measure.timing import pair_ratio, spread
from lmn_kernels import LogarithmicMemory
from lmn_kernels.backend.choice import why_not

EMBEDDING, HEADS, BANKS = 32, 4, (1, 2)
# Root mean square of the difference over that of what is expected.
TOLERANCE = 1e-5
REFERENCE, MEMORY = "ours, reference", "ours, attention(sequential)"
THEIRS, THEIR_MEMORY = "the original's algorithm", "the original's algorithm, attention(sequential)"
# How many times as long the original's algorithm takes: of ours with the extension, without it, and by memory tensors.
FACTS = (
    ("original_over_ours", THEIRS, "ours"),
    ("original_over_reference", THEIRS, REFERENCE),
    ("original_over_attention", THEIR_MEMORY, MEMORY),
)


@dataclass
class _Loop:
    token: Callable[[Tensor], Tensor]
    reset: Callable[[], Any]
    expected: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        self.reset()
        return torch.cat([self.token(x_t) for x_t in x.split(1, 1)], 1)


def _block(bank: int, **options: Any) -> LogarithmicMemory:
    torch.manual_seed(0)
    return LogarithmicMemory(EMBEDDING, HEADS, bank, False, init="variance_preserving", **options)


def _loops(x: Tensor, bank: int) -> dict[str, _Loop | str]:
    """Every contender, or why it cannot run; what is expected is the parallel form's, in float64."""
    exact = _block(bank, dtype=torch.float64, backend="reference")
    exact.load_state_dict(_block(bank).state_dict())
    exact.parallelize = True
    whole, mixed = exact(x.double()), exact.attention(exact.parallel(x.double()))
    layer, plain, faced, theirs = (_block(bank, step_backend=name) for name in ("auto", "reference", "auto", "auto"))
    bare = BitmaskStream(theirs)

    def forget() -> None:
        bare.position, bare.newest = 0, []

    reason = why_not("cpp", "step", x.device, x.dtype)
    return {
        "ours": reason or _Loop(layer, layer.reset, whole),
        REFERENCE: _Loop(plain, plain.reset, whole),
        THEIRS: _Loop(bare, forget, whole),
        MEMORY: _Loop(lambda x_t: faced.attention(faced.sequential(x_t)), faced.reset, mixed),
        THEIR_MEMORY: _Loop(lambda x_t: bare.attention(bare.memory(x_t)), forget, mixed),
    }


@torch.inference_mode()
def stream(bank: int, length: int, turns: int) -> list[Row]:
    """All contenders over one sequence from its first token, in turns; and how they compare."""
    torch.manual_seed(4)
    x = torch.randn(1, length, EMBEDDING)
    shape = {"batch": 1, "length": length, "embedding": EMBEDDING, "heads": HEADS, "bank": bank}
    head: Row = {"operation": "stream", "dtype": "float32", "shape": shape}
    rows: dict[str, Row] = {}
    able: dict[str, _Loop] = {}
    for name, loop in _loops(x, bank).items():
        rows[name] = {**head, "provider": name}
        if isinstance(loop, str):
            rows[name]["gap"] = loop
            continue
        wrong_by = error(loop(x), loop.expected)
        rows[name] |= {"error": float(f"{wrong_by:.3g}"), "tolerance": TOLERANCE}
        if wrong_by <= TOLERANCE:
            able[name] = loop
        else:
            rows[name]["gap"] = f"gate: error {wrong_by:.3g} is over {TOLERANCE:.3g}"
    taken: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(turns):
        for name, loop in able.items():
            start = time.perf_counter()
            loop(x)
            taken[name].append((time.perf_counter() - start) / length)
    for name, seconds in taken.items():
        rows[name] |= spread(seconds, "us").row()
        if name != "ours" and "ours" in taken:
            rows[name]["ratio"] = float(f"{pair_ratio(seconds, taken['ours']):.4g}")
    facts: list[Row] = []
    for fact, above, below in FACTS:
        row: Row = {**head, "provider": below, "fact": fact}
        if above in taken and below in taken:
            row["value"] = float(f"{pair_ratio(taken[above], taken[below]):.4g}")
        else:
            row["gap"] = str(rows[below].get("gap") or rows[above].get("gap"))
        facts.append(row)
    return [*rows.values(), *facts]
