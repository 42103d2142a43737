"""Decoding on a GPU: the extension's step against float64, in a CUDA graph, and against attention over a KV cache.

What runs is the backend "cpp" by name, so that nothing else takes its place in silence. States are made up:
random nodes at positions that no run of tokens would reach here.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, decode_, update_
from lmn_kernels._backend import why_not
from python_ref.layout import level_count, stack_height
from tests.close import TOLERANCE, error

from . import timing
from .gpu_correctness import filled
from .gpu_shapes import cache_bytes, decode_bytes, decode_name
from .gpu_stage import Report, Row, Settings, Skipped, case
from .gpu_timings import DTYPE, SAME, attempt, backends, first_line
from .timing import Clock, Work, pair_ratio, spread, take_turns

# Where rows stand before their tokens: the ends of 31 and 32 bits, chains of many merges, and of none.
POSITIONS = (0, (1 << 31) - 1, (1 << 32) - 1, 6, 1000, (1 << 20) - 1, 1)
STATE = ("position", "token", "nodes", "q", "v")


@dataclass(frozen=True)
class Given:
    """A layer and how many rows it takes; ``feedforward`` makes it a block, with a width in units of E."""

    kind: str
    embedding: int
    heads: int
    bank: int
    expand: int | None = None
    feedforward: float | None = None
    rows: int = 7

    def layer(self, dtype: torch.dtype, settings: Settings) -> LogarithmicMixing:
        sizes = self.embedding, self.heads, self.bank
        options: dict[str, Any] = {"summarizer": self.kind, "init": "variance_preserving", "dtype": dtype}
        options |= {"backend": "reference", "step_backend": "cpp", "device": settings.torch_device}
        if self.feedforward is None:
            return LogarithmicMixing(*sizes, expand=self.expand, **options)
        return LogarithmicMemory(*sizes, feedforward_mult=self.feedforward, _expand=self.expand, **options)

    def __str__(self) -> str:
        parts = {"expand": self.expand, "feedforward": self.feedforward, "rows": self.rows}
        sizes = f"{self.kind} E={self.embedding} H={self.heads} m={self.bank}"
        return " ".join([sizes, *(f"{name}={value}" for name, value in parts.items() if value is not None)])


GIVEN = [
    Given("linear", 24, 1, 1),
    Given("linear", 33, 3, 3),
    Given("linear", 64, 4, 2, rows=70),  # more than a warp has lanes
    Given("conv", 24, 2, 2),
    Given("conv_mixed", 40, 2, 3),
    Given("depthwise_separable", 40, 4, 2),
    Given("linear", 24, 2, 2, expand=1),
    Given("conv", 24, 2, 2, expand=1),
    Given("conv_mixed", 24, 2, 2, expand=1),
    Given("depthwise_separable", 24, 2, 2, expand=1),
    Given("linear", 48, 4, 2, feedforward=0),
    Given("linear", 48, 4, 2, feedforward=4),
    Given("conv_mixed", 24, 2, 2, expand=1, feedforward=1.5),
    Given("linear", 320, 1, 2),  # heads of several chunks
    Given("linear", 512, 8, 1),
]


def cases(settings: Settings) -> list[tuple[Given, torch.dtype, torch.dtype]]:
    """Layer, dtype and that of the state."""
    half = [torch.bfloat16, torch.float16] if settings.device == "cuda" else [torch.bfloat16]
    dtypes = [(torch.float32, torch.float32)] + [(d, kept) for d in half for kept in (torch.float32, d)]
    given = [g for g in GIVEN if g.embedding <= 48] if settings.quick else GIVEN
    return [(g, *pair) for g in given for pair in dtypes]


def extension(settings: Settings) -> None:
    """Whether the extension is there.

    Raises:
        Skipped: not on this CPU.
        RuntimeError: not for this GPU, which is what these stages are for.
    """
    reason = why_not("cpp", "step", settings.torch_device, torch.float32)
    if reason is not None:
        raise Skipped(reason) if settings.device == "cpu" else RuntimeError(reason)


def made_up(layer: LogarithmicMixing, position: Tensor, dtype: torch.dtype, last: int) -> MemoryState:
    """A pool of random nodes at ``position [P]``, with room up to ``last``."""
    empty = layer.init_state(len(position), max_position=last, dtype=dtype)
    drawn = [torch.randn_like(getattr(empty, name)) for name in STATE[1:]]
    return MemoryState(position, *drawn, empty.expand, empty.levels, int(position.max()))


def same(what: str, got: MemoryState, expected: MemoryState, *outputs: Tensor) -> None:
    """States equal to the bit, and every two of the outputs."""
    for name in STATE:
        assert torch.equal(getattr(got, name), getattr(expected, name)), f"{what}: {name} differs"
    for one, other in zip(outputs[::2], outputs[1::2], strict=True):
        assert torch.equal(one, other), f"{what}: the output differs"


def renewed(before: Tensor, after: Tensor, state: MemoryState) -> Tensor:
    """``[P, R]``: whether a row of nodes is summarised again between two positions (section 3)."""
    levels = [i for i in range(1, state.levels + 1) for _ in range(stack_height(i, state.expand))]
    level = torch.tensor(levels, device=before.device)
    return before[:, None] >> level != after[:, None] >> level


class Trial:
    """A layer, a pool and tokens for some of its slots."""

    def __init__(self, given: Given, dtype: torch.dtype, kept: torch.dtype, settings: Settings, tokens: int = 3):
        device, rows = settings.torch_device, given.rows
        self.dtype, self.layer = dtype, given.layer(dtype, settings)
        self.weights = self.layer.step_weights()
        position = torch.tensor([POSITIONS[i % len(POSITIONS)] for i in range(rows + 2)], device=device)
        self.start = made_up(self.layer, position, kept, (1 << 32) + tokens)
        self.slots = torch.randperm(rows + 2)[:rows].to(device, torch.int32)
        self.slots[1] = -1
        self.x = torch.randn(rows, 2 * tokens, given.embedding, device=device).to(dtype)[:, ::2]

    def run(self, x: Tensor, fill: bool = True, slots: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        state = self.start.clone()
        with filled(fill):
            y = decode_(x, state, self.weights, slots=self.slots if slots is None else slots, backend="cpp")
        return y, state

    def check(self, runs: int) -> Row:
        """Errors against float64; everything else that a step promises, to the bit."""
        x, start = self.x, self.start
        exact = copy.deepcopy(self.layer).double().step_weights()
        expected = start.to(dtype=torch.float64).clone()
        want = decode_(x.double(), expected, exact, slots=self.slots, backend="reference")
        y, state = self.run(x)
        active = self.slots >= 0
        assert not y[~active].any(), "the output of a row without a slot is not exactly 0"
        assert torch.equal(state.position, expected.position), "positions differ"
        new = renewed(start.position, state.position, start)
        idle = state.position == start.position
        assert torch.equal(state.token[idle], start.token[idle]), "the token of a slot that had none has changed"
        row: Row = {"y": self.within("y", y[active], want[active])}
        row["token"] = self.within("token", state.token[~idle], expected.token[~idle])
        for name in STATE[2:]:
            got, old = getattr(state, name), getattr(start, name)
            row[name] = self.within(name, got[new], getattr(expected, name)[new])
            assert torch.equal(got[~new], old[~new]), f"{name} of a level that is not summarised again has changed"
        for number in range(runs):
            again = self.run(x, fill=number % 2 == 0)
            same(f"run {number + 2}", again[1], state, again[0], y)
        one = start.clone()
        ys = [decode_(part, one, self.weights, slots=self.slots, backend="cpp") for part in x.split(1, 1)]
        same("one token a call", one, state, torch.cat(ys, 1), y)
        one = start.clone()
        same("step_", one, state, self.layer.step_(x, one, self.slots), y) if False else None
        return row

    def within(self, name: str, got: Tensor, expected: Tensor) -> float:
        assert torch.isfinite(got).all(), f"{name}: not finite"
        found, bar = error(got, expected), TOLERANCE[self.dtype][0]
        assert found <= bar, f"{name}: error {found:.3g} is over {bar:.3g}"
        return found
