"""The extension's step against float64 and against itself.

What runs is the backend "cpp" by name, and the trial asserts that it served. States are made up, random nodes at
positions that no run of tokens would reach here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, error
from bench.contenders.streams import made_up
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, decode_, update_
from lmn_kernels.backend.choice import why_not
from python_ref.layout import stack_height
from tests.support.allocations import filled
from tests.support.places import Place
from tests.support.served import Served

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

    def layer(self, dtype: torch.dtype, place: Place) -> LogarithmicMixing:
        """No bias of it is 0, and no norm's weight 1: what a kernel left out would not be missed."""
        layer = self._new(dtype, place)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) / 4)
        return layer

    def _new(self, dtype: torch.dtype, place: Place) -> LogarithmicMixing:
        sizes = self.embedding, self.heads, self.bank
        options: dict[str, Any] = {"summarizer": self.kind, "init": "variance_preserving", "dtype": dtype}
        options |= {"backend": "reference", "step_backend": "cpp", "device": place.torch_device}
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


def extension(place: Place, dtype: torch.dtype = torch.float32) -> None:
    """Skip where the extension does not serve a CPU; on a GPU it is what the tests are there to check.

    Raises:
        RuntimeError: it does not serve this GPU.
    """
    reason = why_not("cpp", "step", place.torch_device, dtype)
    if reason is not None:
        if place.device == "cpu":
            pytest.skip(reason)
        raise RuntimeError(reason)


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

    def __init__(self, given: Given, dtype: torch.dtype, kept: torch.dtype, place: Place, tokens: int = 3):
        device, rows = place.torch_device, given.rows
        self.dtype, self.kept, self.layer = dtype, kept, given.layer(dtype, place)
        self.refuses = device.type == "cpu"
        self.weights = self.layer.step_weights()
        position = torch.tensor([POSITIONS[i % len(POSITIONS)] for i in range(rows + 2)], device=device)
        self.start = made_up(self.layer, position, (1 << 32) + tokens, kept)
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

    def check(self, runs: int) -> float:
        """The largest error against float64; all else that a step promises holds to the bit.

        Raises:
            AssertionError: something is wrong, or another backend served.
        """
        start, before, clone = self.start, self.start.clone(), self.start.clone
        with Served() as served:
            state, y = self.run()
            self.layer.step_(self.x, clone(), self.slots)
            self.layer.step(self.x[: len(start.position), :1], start)
        served.check("cpp", "decode_", "step")
        largest = self.against_float64(state, y)
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
        return largest

    def against_float64(self, state: MemoryState, y: Tensor) -> float:
        start, active = self.start, self.slots >= 0
        expected = start.to(dtype=torch.float64).clone()
        exact = copy.deepcopy(self.layer).double().step_weights()
        want = decode_(self.x.double(), expected, exact, slots=self.slots, backend="reference")
        assert not y[~active].any(), "the output of a row without a slot is not exactly 0"
        assert torch.equal(state.position, expected.position), "position differs"
        moved, new = state.position != start.position, renewed(start, state)
        errors = [self.within("y", y[active], want[active], self.dtype)]
        for name, changed in zip(STATE[1:], (moved, new, new, new), strict=True):
            got, old = getattr(state, name), getattr(start, name)
            errors.append(self.within(name, got[changed], getattr(expected, name)[changed], self.kept))
            assert torch.equal(got[~changed], old[~changed]), f"{name}: changes where no token has changed it"
        return max(errors)

    @staticmethod
    def within(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
        """The error, which the dtype that holds a value bounds: float32 memory of a half layer is float32 all over."""
        assert torch.isfinite(got).all(), f"{name}: not finite"
        found, bar = error(got, expected), TOLERANCE[dtype][0]
        assert found <= bar, f"{name}: error {found:.3g} is over {bar:.3g}"
        return found

    def without_room(self) -> None:
        """A row at the end of its room: refused on a CPU; on CUDA, where nobody reads positions, NaN for it alone."""
        pool = made_up(self.layer, torch.tensor([7, 3], device=self.x.device), 7, self.kept)
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
