"""What the GPU check does with LaMemo: every kernel against float64, models over segments, and times."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients, error
from bench.contenders.look_ahead import OPERATIONS, LookAheadShape
from bench.contenders.providers import REGISTRY
from bench.measure.comparison import Comparison, Limits
from bench.measure.gate import FORWARD, TRAINING
from bench.runs.lamemo import GPU_SHAPES
from bench.runs.lamemo import QUICK_SHAPES as QUICK_TIMED
from lmn_kernels import LookAheadMemory
from python_ref import look_ahead as reference

from . import timings
from .configs import DTYPES, triton_or_skip
from .correctness import filled
from .stage import Report, Settings, case

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


def run_kernels(shape: LookAheadCase, given: Inputs, settings: Settings) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, kv, bias and table."""
    package = "python_ref" if settings.backend == "reference" else "lmn_kernels._triton"
    kernels = importlib.import_module(f"{package}.look_ahead")
    operands, before, grads = given
    out, lse = kernels.attend(*operands, *before, *shape.arguments)
    return [out, lse, *kernels.attend_backward(*grads, *operands, out, lse, before[2], *shape.arguments)]


def check_kernels(shape: LookAheadCase, dtype: torch.dtype, settings: Settings) -> Iterator[tuple[str, float]]:
    """Errors of result and gradients against float64; the same again to the bit, from poisoned memory as well."""
    given = operands, before, grads = inputs(shape, dtype, settings.torch_device)
    output, lse, start = before
    q, kv, bias, table, grad, grad_lse = (tensor.double() for tensor in (*operands, *grads))
    wide = [None if seed is None else seed.double() for seed in (output, lse)]
    expected, expected_lse = reference.attend(q, kv, bias, table, wide[0], wide[1], start, *shape.arguments)
    want = reference.attend_backward(
        grad, grad_lse, q, kv, bias, table, expected, expected_lse, start, *shape.arguments
    )

    got = run_kernels(shape, given, settings)
    values, gradients = TOLERANCE[dtype]
    for name, g, w in zip(("out", "lse"), got[:2], (expected, expected_lse), strict=True):
        assert_close(name, g.double(), w, values)
        yield name, error(g, w)
    names = ["q", "kv", "bias", "table"]
    assert_same_gradients(names, [g.double() for g in got[2:]], list(want), gradients)
    yield "gradients", max(error(g, w) for g, w in zip(got[2:], want, strict=True))
    for fill in [False] * RUNS + [True]:
        with filled(fill):
            again = run_kernels(shape, given, settings)
        assert all(torch.equal(a, g) for a, g in zip(again, got, strict=True)), f"differs, poison: {fill}"


def check_model(attn_type: int, dtype: torch.dtype, settings: Settings) -> Iterator[tuple[str, float]]:
    """Outputs, caches and gradients of a stack over segments of unequal lengths against the same in float64.

    Gradients in float32 alone: in 16 bits a feed-forward's ReLU lets others through than in float64.
    """
    device = settings.torch_device
    lengths, memory = ((5, 5, 2), 8) if settings.quick else ((64, 64, 30, 64), 130)
    size = 16 if settings.quick else 128
    models = [
        LookAheadMemory(
            size, 3, 4, memory_length=memory, attn_type=attn_type, backend=backend, dtype=kind, device=device
        )
        for kind, backend in ((dtype, settings.backend), (torch.float64, "reference"))
    ]
    models[1].load_state_dict(models[0].state_dict())
    states: list = [None, None]
    for number, length in enumerate(lengths):
        x, cotangent = (torch.randn(2, length, size, device=device).to(dtype) for _ in range(2))
        found = []
        for index, model in enumerate(models):
            given = x.detach().clone().to(torch.float64 if index else dtype).requires_grad_()
            y, states[index] = model(given, states[index])
            grads = torch.autograd.grad(y, [given, *model.parameters()], cotangent.to(y.dtype), materialize_grads=True)
            found.append([y.detach(), *states[index].outputs, *states[index].lse, *grads])
        cached = 1 + 2 * len(states[0].outputs)
        bar = 3 * TOLERANCE[dtype][0], 3 * TOLERANCE[dtype][1]
        for got, want in zip(found[0][:cached], found[1][:cached], strict=True):
            assert_close(f"segment {number}", got.double(), want, bar[0])
        if dtype == torch.float32:
            names = ["x", *dict(models[0].named_parameters())]
            assert_same_gradients(names, found[0][cached:], found[1][cached:], bar[1])
        yield f"segment {number}", max(error(g, w) for g, w in zip(found[0][:cached], found[1][:cached], strict=True))


def look_ahead(settings: Settings, report: Report) -> None:
    """Stage: LaMemo's kernels in every configuration, and its model over segments, against float64."""
    if settings.backend == "triton":
        triton_or_skip(settings)
    shapes = QUICK_SHAPES if settings.quick else SHAPES
    checks: list[tuple[str, Callable[[], Iterator[tuple[str, float]]]]] = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in shapes:
            if dtype != torch.float32 or shape.size <= 64:
                checks.append((f"{shape} {name}", functools.partial(check_kernels, shape, dtype, settings)))
        for attn_type in (3, 31, 32, 0):
            whole = functools.partial(check_model, attn_type, dtype, settings)
            checks.append((f"model of attn_type {attn_type} {name}", whole))
    for name, check in settings.mine(checks):
        with case(report, name) as row:
            torch.manual_seed(0)
            row["worst"], row["error"] = max(check(), key=lambda pair: pair[1])


def small_segments(settings: Settings) -> None:
    """What runs under compute-sanitizer: every kernel at every head size, forward and backward."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32) if shape.size <= 64 else (torch.bfloat16,):
            run_kernels(shape, inputs(shape, dtype, settings.torch_device), settings)


def time_look_ahead(settings: Settings, report: Report) -> None:
    """Stage: attention and layer of LaMemo against the literal form, with memory, and the share of the fused floor."""
    device = settings.torch_device

    def one(operation: str, shape: LookAheadShape) -> None:
        names = [name for name in REGISTRY[operation] if "compiled" not in name]
        limits = Limits(seconds=20, budget=settings.turn_seconds)
        ways = (FORWARD, TRAINING)
        comparison = Comparison(
            operation, shape, timings.DTYPE, device, names, ways, limits, settings.quick, settings.backend
        )
        comparison.check()
        for timed, held in zip(comparison.time(), comparison.memory(), strict=True):
            key = f"{operation}/{timed['direction']}/{timed['provider']}/{shape.name}"
            value = {"value": timed["median"], "unit": "ms"} if "median" in timed else {}
            report({"case": key, "key": key, **value, **held, **timed})

    for shape in QUICK_TIMED if settings.quick else GPU_SHAPES:
        for operation in OPERATIONS:
            timings.attempt(report, f"{operation} at {shape.name}", device, one, operation, shape)
