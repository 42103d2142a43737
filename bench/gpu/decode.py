"""The gate of the GPU check for decoding: the extension's step against float64, and in a CUDA graph.

What runs is the backend "cpp" by name: nothing takes its place in silence. States are made up, random nodes at
positions that no run of tokens would reach here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.close import TOLERANCE, error
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, decode_, update_
from lmn_kernels.backend.choice import why_not
from python_ref.layout import stack_height

from .correctness import filled
from .stage import Report, Row, Settings, Skipped, case

# Where rows stand before their tokens: no node yet, the ends of 31 and 32 bits, long chains of merges, short ones.
POSITIONS = (0, (1 << 31) - 1, (1 << 32) - 1, 6, 1000, (1 << 20) - 1, 1)
STATE = ("position", "token", "nodes", "q", "v")


@dataclass(frozen=True)
class Given:
    """A layer, and how many rows take part. ``feedforward``, a width in units of E, makes it a block."""

    kind: str
    embedding: int
    heads: int
    bank: int
    expand: int | None = None
    feedforward: float | None = None
    rows: int = 7

    def layer(self, dtype: torch.dtype, settings: Settings) -> LogarithmicMixing:
        """No bias of it is 0, and no norm's weight 1: what a kernel left out would not be missed."""
        layer = self._new(dtype, settings)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) / 4)
        return layer

    def _new(self, dtype: torch.dtype, settings: Settings) -> LogarithmicMixing:
        sizes = self.embedding, self.heads, self.bank
        options: dict[str, Any] = {"summarizer": self.kind, "init": "variance_preserving", "dtype": dtype}
        options |= {"backend": "reference", "step_backend": "cpp", "device": settings.torch_device}
        if self.feedforward is None:
            return LogarithmicMixing(*sizes, expand=self.expand, **options)
        return LogarithmicMemory(*sizes, feedforward_mult=self.feedforward, _expand=self.expand, **options)

    def __str__(self) -> str:
        more = {"expand": self.expand, "feedforward": self.feedforward, "rows": self.rows}
        sizes = f"{self.kind} E={self.embedding} H={self.heads} m={self.bank}"
        return " ".join([sizes, *(f"{name}={value}" for name, value in more.items() if value is not None)])


GIVEN = [
    Given("linear", 24, 1, 1),
    Given("linear", 33, 3, 3),
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
    Given("linear", 64, 4, 2, rows=70),  # more than a warp has lanes
    Given("linear", 320, 1, 2),  # heads of several chunks
    Given("linear", 512, 8, 1),
]


def cases(settings: Settings) -> list[tuple[Given, torch.dtype, torch.dtype]]:
    """Layer, its dtype, and that of the state."""
    half = [torch.bfloat16, torch.float16] if settings.device == "cuda" else [torch.bfloat16]
    dtypes = [(torch.float32, torch.float32), *((dtype, kept) for dtype in half for kept in (torch.float32, dtype))]
    return [(given, *pair) for given in (GIVEN[:13] if settings.quick else GIVEN) for pair in dtypes]


def extension(settings: Settings) -> None:
    """Whether the extension serves this device.

    Raises:
        Skipped: it is not built for this CPU.
        RuntimeError: it is not built for this GPU, which is what these stages are there to check.
    """
    reason = why_not("cpp", "step", settings.torch_device, torch.float32)
    if reason is not None:
        raise Skipped(reason) if settings.device == "cpu" else RuntimeError(reason)


def made_up(layer: LogarithmicMixing, position: Tensor, dtype: torch.dtype, last: int) -> MemoryState:
    """A pool of random nodes that stands at ``position [P]`` and has room up to ``last``."""
    empty = layer.init_state(len(position), max_position=last, dtype=dtype)
    drawn: dict[str, Any] = {name: torch.randn_like(getattr(empty, name)) for name in STATE[1:]}
    return replace(empty, position=position, max_position=last, **drawn)


def same(what: str, got: MemoryState, expected: MemoryState, *outputs: Tensor) -> None:
    """The states are equal to the bit, and so are both outputs, where there are any."""
    for name in STATE:
        assert torch.equal(getattr(got, name), getattr(expected, name)), f"{what}: {name} differs"
    assert not outputs or torch.equal(*outputs), f"{what}: the output differs"


def renewed(before: MemoryState, after: MemoryState) -> Tensor:
    """``[P, R]``: whether a row of nodes is summarised again on the way from one state to the other (section 3)."""
    levels = [i for i in range(1, before.levels + 1) for _ in range(stack_height(i, before.expand))]
    level = torch.tensor(levels, device=before.position.device)
    return before.position[:, None] >> level != after.position[:, None] >> level


class Trial:
    """A layer, a pool of slots, and ``tokens`` tokens a row for some of them."""

    def __init__(self, given: Given, dtype: torch.dtype, kept: torch.dtype, settings: Settings, tokens: int = 3):
        device, rows = settings.torch_device, given.rows
        self.dtype, self.kept, self.layer = dtype, kept, given.layer(dtype, settings)
        self.refuses = device.type == "cpu"
        self.weights = self.layer.step_weights()
        position = torch.tensor([POSITIONS[i % len(POSITIONS)] for i in range(rows + 2)], device=device)
        self.start = made_up(self.layer, position, kept, (1 << 32) + tokens)
        # The last two slots belong to nobody, and two rows to no slot.
        self.slots = torch.randperm(rows + 2).to(device, torch.int32)
        self.slots[self.slots >= rows] = -1
        # Tokens that do not lie side by side.
        self.x = torch.randn(rows + 2, 2 * tokens, given.embedding, device=device).to(dtype)[:, ::2]

    def run(self, slots: Tensor | None = None, fill: bool = True) -> tuple[MemoryState, Tensor]:
        state = self.start.clone()
        with filled(fill):
            y = decode_(self.x, state, self.weights, slots=self.slots if slots is None else slots, backend="cpp")
        return state, y

    def check(self, runs: int) -> Row:
        """Errors against float64; all else that a step promises holds to the bit."""
        start, before, clone = self.start, self.start.clone(), self.start.clone
        state, y = self.run()
        row = self.against_float64(state, y)
        for number in range(2, runs + 1):
            again, y_again = self.run(fill=number % 2 == 1)
            same(f"run {number}", again, state, y_again, y)
        again, y_again = self.run(torch.full_like(self.slots, -1))
        same("slot -1 everywhere", again, start, y_again, torch.zeros_like(y))
        one = clone()
        parts = [decode_(x, one, self.weights, slots=self.slots, backend="cpp") for x in self.x.split(1, 1)]
        same("one token a call", one, state, torch.cat(parts, 1), y)
        one = clone()
        update_(self.x, one, self.weights, slots=self.slots, backend="cpp")
        same("update_", one, state)
        one = clone()
        y_layer = self.layer.step_(self.x, one, self.slots)
        same("step_ of the layer", one, state, y_layer, y)
        x, one = torch.randn(len(start.position), 1, y.shape[2], device=y.device).to(self.dtype), clone()
        y_new, new = self.layer.step(x, start)
        y_one = decode_(x, one, self.weights, backend="cpp")
        same("step of the layer", new, one, y_new, y_one)
        same("the state that steps were given", start, before)
        self.without_room()
        return row

    def against_float64(self, state: MemoryState, y: Tensor) -> Row:
        start, active = self.start, self.slots >= 0
        expected = start.to(dtype=torch.float64).clone()
        exact = copy.deepcopy(self.layer).double().step_weights()
        want = decode_(self.x.double(), expected, exact, slots=self.slots, backend="reference")
        assert not y[~active].any(), "the output of a row without a slot is not exactly 0"
        assert torch.equal(state.position, expected.position), "position differs"
        moved, new = state.position != start.position, renewed(start, state)
        row: Row = {"y": self.within("y", y[active], want[active], self.dtype)}
        for name, changed in zip(STATE[1:], (moved, new, new, new), strict=True):
            got, old = getattr(state, name), getattr(start, name)
            row[name] = self.within(name, got[changed], getattr(expected, name)[changed], self.kept)
            assert torch.equal(got[~changed], old[~changed]), f"{name}: changes where no token has changed it"
        return row

    @staticmethod
    def within(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
        """The error, which the dtype that holds a value bounds: float32 memory of a half layer is float32 all over."""
        assert torch.isfinite(got).all(), f"{name}: not finite"
        found, bar = error(got, expected), TOLERANCE[dtype][0]
        assert found <= bar, f"{name}: error {found:.3g} is over {bar:.3g}"
        return found

    def without_room(self) -> None:
        """A row at the end of its room: refused on a CPU; on CUDA, where nobody reads positions, NaN for it alone."""
        pool = made_up(self.layer, torch.tensor([7, 3], device=self.x.device), self.kept, 7)
        before, x = pool.clone(), self.x[[0, 0], :1]
        try:
            y = decode_(x, pool, self.weights, backend="cpp")
        except RuntimeError as refusal:
            assert "exhausted" in str(refusal) and self.refuses, str(refusal)
            same("the pool of a refused call", pool, before)
            return
        assert not self.refuses, "a row without room was not refused"
        assert y[0].isnan().all() and y[1].isfinite().all(), "NaN is not what the row without room gets, and it alone"
        assert pool.position.tolist() == [7, 4], f"expected positions 7 and 4, got {pool.position.tolist()}"
        first = self.slots.new_zeros(1)
        same("the slot without room", pool.reorder(first), before.reorder(first))


@torch.no_grad()
def decode(settings: Settings, report: Report) -> None:
    """Stage: every linear summarizer and the block, in every dtype of layer and state."""
    extension(settings)
    for given, dtype, kept in settings.mine(cases(settings)):
        with case(report, f"{given}, {_short(dtype)}, state {_short(kept)}") as row:
            torch.manual_seed(0)
            row |= Trial(given, dtype, kept, settings).check(3 if settings.quick else 20)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def no_waiting(settings: Settings) -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    if settings.device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def beside(settings: Settings) -> Iterator[None]:
    """On a side stream, where what is captured later has to be warmed up."""
    if settings.device != "cuda":
        yield
        return
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def replay(settings: Settings, report: Report) -> None:
    """Stage: a step that is captured once and replayed 1,000 times equals as many calls on another pool (R17)."""
    extension(settings)
    block, tall = Given("linear", 48, 4, 2, feedforward=4), Given("linear", 24, 2, 2, expand=1)
    trials = [(Given("linear", 64, 4, 2), torch.bfloat16, torch.bfloat16), (tall, torch.float32, torch.float32)]
    for given, dtype, kept in [*trials, (block, torch.bfloat16, torch.float32)]:
        with case(report, f"{given}, {_short(dtype)}, state {_short(kept)}") as row:
            torch.manual_seed(0)
            row |= replayed(given, dtype, kept, settings)
    if settings.device != "cuda":
        report({"case": "capture", "skipped": "CUDA graphs need a CUDA device; calls took the place of replays"})


def replayed(given: Given, dtype: torch.dtype, kept: torch.dtype, settings: Settings) -> Row:
    """One layer's step, captured at one position and replayed at all others, over powers of two of every size."""
    device, rows, count = settings.torch_device, given.rows, 64 if settings.quick else 1000
    layer = given.layer(dtype, settings)
    near = torch.tensor([0, 1 << 5, 1 << 10, 1 << 20, 1 << 31, 1 << 32, 1 << 16, 3, 1], device=device)
    pool = made_up(layer, (near - count // 2).clamp_min(0), kept, (1 << 32) + count)
    start, other = pool.snapshot(), pool.clone()
    xs = torch.randn(count, rows, 1, given.embedding, device=device).to(dtype)
    orders = [torch.randperm(rows, device=device) for _ in range(2)]
    # Slot 3 belongs to nobody, 7 and 8 are beyond the batch; which row has which slot changes halfway.
    orders = [order.masked_fill(order == 3, -1) for order in orders]
    ys, expected = torch.empty_like(xs), torch.empty_like(xs)
    x, slots, addresses = xs[0].clone(), orders[0].clone(), [getattr(pool, name).data_ptr() for name in STATE]
    row: Row = {"replays": count}

    def step() -> Tensor:
        return layer.step_(x, pool, slots)

    with beside(settings):
        for _ in range(3):
            step()
    row["moved by warming up"] = int((pool.position - start.position).max())
    assert row["moved by warming up"] == 3, "the warm-up has not run"
    pool.restore(start)
    same("the pool that a snapshot was put back into", pool, start)
    if settings.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        torch.cuda.synchronize(device)
        same("the pool behind the capture", pool, start)

        def again() -> Tensor:
            graph.replay()
            return y
    else:
        again = step
    with no_waiting(settings):
        expected[0].copy_(layer.step_(xs[0], other, orders[0]))
        for t in range(count):
            x.copy_(xs[t])
            if t == count // 2:
                slots.copy_(orders[1])
            ys[t].copy_(again())
    for t in range(1, count):
        expected[t].copy_(layer.step_(xs[t], other, orders[t >= count // 2]))
    same("replays and calls", pool, other, ys, expected)
    assert addresses == [getattr(pool, name).data_ptr() for name in STATE], "the pool has moved"
    moved = pool.position - start.position
    assert moved.tolist() == [count * (slot < rows and slot != 3) for slot in range(len(near))], moved.tolist()
    assert torch.isfinite(ys).all(), "an output is not finite"
    passed = zip(start.position.tolist(), pool.position.tolist(), strict=True)
    row["powers of two passed"] = sum(after.bit_length() - before.bit_length() for before, after in passed)
    return row


@torch.no_grad()
def small_steps(settings: Settings) -> None:
    """Steps for compute-sanitizer: every way that a summarizer's weight lies, the expander, the block, many rows."""
    for given in (*GIVEN[1:6], GIVEN[11], GIVEN[12]):
        for dtype in (torch.bfloat16, torch.float32):
            trial = Trial(given, dtype, dtype, settings, tokens=2)
            decode_(trial.x, trial.start, trial.weights, slots=trial.slots, backend="cpp")
