"""LaMemo's kernels against float64 and themselves, and models of them over segments."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients, error
from lmn_kernels import LookAheadMemory
from python_ref import look_ahead as reference
from tests.support.allocations import filled
from tests.support.places import Place
from tests.support.served import Served

RUNS = 5


class LookAheadCase(NamedTuple):
    """Streams, T, M, W, heads, their size; whether the memory has its table, streams begin late, tokens ask alone."""

    batch: int
    tokens: int
    memory: int
    window: int
    heads: int
    size: int
    own_table: bool = False
    late: bool = False
    alone: bool = False

    @property
    def text(self) -> str:
        """Sizes, and what is not the plain case."""
        named = [name for name in ("own_table", "late", "alone") if getattr(self, name)]
        sizes = f"B={self.batch} T={self.tokens} M={self.memory} W={self.window} H={self.heads} D={self.size}"
        return " ".join([sizes, *named])

    @property
    def rows(self) -> int:
        """Of q: where the tokens are ``alone``, the memory does not ask."""
        return self.tokens + self.memory * (not self.alone)

    @property
    def arguments(self) -> tuple[int, int, int]:
        """``tokens, window, future_row``."""
        return self.tokens, self.window, self.own_table * (self.tokens + self.memory)


# Every head size that has a configuration, sizes that fill no tile among them.
SHAPES = [
    LookAheadCase(3, 150, 150, 150, 10, 41),
    LookAheadCase(2, 200, 333, 200, 4, 64, late=True),
    LookAheadCase(2, 64, 300, 64, 2, 16, own_table=True),
    LookAheadCase(2, 96, 200, 130, 2, 32, own_table=True, late=True),
    LookAheadCase(1, 77, 200, 77, 2, 128),
    LookAheadCase(4, 1, 257, 1, 2, 64),
    LookAheadCase(2, 130, 0, 130, 2, 64),
    LookAheadCase(2, 100, 170, 100, 2, 64, late=True, alone=True),
]
QUICK_SHAPES = [LookAheadCase(2, 6, 9, 6, 2, 5, own_table=True, late=True)]


Inputs = tuple[list[Tensor], tuple[Tensor | None, ...], tuple[Tensor, Tensor]]


def inputs(shape: LookAheadCase, dtype: torch.dtype, device: torch.device) -> Inputs:
    """q, kv, bias, table; the memory's earlier result and the streams' starts; gradients."""
    batch, memory, keys = shape.batch, shape.memory, shape.tokens + shape.memory
    table = keys + shape.own_table * (memory + 1)
    sizes = (batch, shape.rows), (batch, keys, 2), (4,), (table,), (batch, memory), (batch, shape.rows)
    made = [torch.randn(*size, shape.heads, shape.size, device=device).to(dtype) for size in sizes]
    lse, grad_lse = (torch.randn(batch, n, shape.heads, device=device) for n in (memory, shape.rows))
    seeds = (made[4], lse) if memory and not shape.alone else (None, None)
    start = torch.arange(batch, device=device) * memory // batch if shape.late else None
    return made[:4], (*seeds, start), (made[5], grad_lse)


def run_kernels(shape: LookAheadCase, given: Inputs, place: Place) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, kv, bias and table."""
    kernels = importlib.import_module(f"{place.package}.look_ahead")
    operands, before, grads = given
    out, lse = kernels.attend(*operands, *before, *shape.arguments)
    return [out, lse, *kernels.attend_backward(*grads, *operands, out, lse, before[2], *shape.arguments)]


def check_kernels(shape: LookAheadCase, dtype: torch.dtype, place: Place) -> Iterator[tuple[str, float]]:
    """Errors of result and gradients against float64; the same again to the bit, from poisoned memory as well."""
    given = operands, before, grads = inputs(shape, dtype, place.torch_device)
    output, lse, start = before
    q, kv, bias, table, grad, grad_lse = (tensor.double() for tensor in (*operands, *grads))
    wide = [None if seed is None else seed.double() for seed in (output, lse)]
    expected, expected_lse = reference.attend(q, kv, bias, table, wide[0], wide[1], start, *shape.arguments)
    want = reference.attend_backward(
        grad, grad_lse, q, kv, bias, table, expected, expected_lse, start, *shape.arguments
    )

    got = run_kernels(shape, given, place)
    values, gradients = TOLERANCE[dtype]
    for name, g, w in zip(("out", "lse"), got[:2], (expected, expected_lse), strict=True):
        assert_close(name, g.double(), w, values)
        yield name, error(g, w)
    names = ["q", "kv", "bias", "table"]
    assert_same_gradients(names, [g.double() for g in got[2:]], list(want), gradients)
    yield "gradients", max(error(g, w) for g, w in zip(got[2:], want, strict=True))
    for fill in [False] * RUNS + [True]:
        with filled(fill):
            again = run_kernels(shape, given, place)
        assert all(torch.equal(a, g) for a, g in zip(again, got, strict=True)), f"differs, poison: {fill}"


def check_model(attn_type: int, dtype: torch.dtype, place: Place) -> Iterator[tuple[str, float]]:
    """Outputs, caches and gradients of a stack over segments of unequal lengths against the same in float64.

    Gradients in float32 alone: in 16 bits a feed-forward's ReLU lets others through than in float64.
    """
    device = place.torch_device
    lengths, memory = ((5, 5, 2), 8) if place.quick else ((64, 64, 30, 64), 130)
    size = 16 if place.quick else 128
    models = [
        LookAheadMemory(
            size, 3, 4, memory_length=memory, attn_type=attn_type, backend=backend, dtype=kind, device=device
        )
        for kind, backend in ((dtype, place.backend), (torch.float64, "reference"))
    ]
    models[1].load_state_dict(models[0].state_dict())
    states: list = [None, None]
    served = Served()
    for number, length in enumerate(lengths):
        x, cotangent = (torch.randn(2, length, size, device=device).to(dtype) for _ in range(2))
        found = []
        for index, model in enumerate(models):
            given = x.detach().clone().to(torch.float64 if index else dtype).requires_grad_()
            with contextlib.nullcontext() if index else served:
                y, states[index] = model(given, states[index])
                leaves = [given, *model.parameters()]
                grads = torch.autograd.grad(y, leaves, cotangent.to(y.dtype), materialize_grads=True)
            found.append([y.detach(), *states[index].outputs, *states[index].lse, *grads])
        cached = 1 + 2 * len(states[0].outputs)
        bar = 3 * TOLERANCE[dtype][0], 3 * TOLERANCE[dtype][1]
        for got, want in zip(found[0][:cached], found[1][:cached], strict=True):
            assert_close(f"segment {number}", got.double(), want, bar[0])
        if dtype == torch.float32:
            names = ["x", *dict(models[0].named_parameters())]
            assert_same_gradients(names, found[0][cached:], found[1][cached:], bar[1])
        yield f"segment {number}", max(error(g, w) for g, w in zip(found[0][:cached], found[1][:cached], strict=True))
    served.check(place.backend, "look_ahead_attend", "look_ahead_attend_backward")
