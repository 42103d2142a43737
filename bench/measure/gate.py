"""Whether a form of an operation is right: its result and its gradients against the provider's oracle in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_same_gradients, error

from .contender import BaseProblem, Form, Outputs, Provider
from .timing import Work

FORWARD, BACKWARD, TRAINING = "forward", "backward", "training"

# A layer's stages each round; what is one operation gets one allowance.
STAGES_OF_ROUNDING = {"layer": 3, "look-ahead layer": 3}
# One position may be worse than all together, by no more than this; a wrong one is off by about its own size.
WORST_POSITION = 4
# Of longer sequences so many positions are compared, and of a loop over tokens the first ones.
POSITIONS, FIRST = 64, 1 << 10
# Elements of x from which on 16 bits are compared with float32: float64 would not fit beside them.
LARGE = 1 << 28


def tolerance(operation: str, dtype: torch.dtype, direction: str) -> float:
    """Relative to the root mean square of what is expected."""
    return STAGES_OF_ROUNDING.get(operation, 1) * TOLERANCE[dtype][direction != FORWARD]


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def real(problem: BaseProblem, provider: Provider, outputs: Outputs) -> tuple[Tensor, ...]:
    """What of a result means something."""
    if provider.nodes:
        return tuple(y[:, : provider.nodes(problem)] for y in as_tuple(outputs))
    return as_tuple(outputs)


def differentiable(outputs: Outputs) -> tuple[Tensor, ...]:
    """What of a result goes on to a loss; the rest is kept for what comes later."""
    return tuple(y for y in as_tuple(outputs) if y.requires_grad)


def cotangents(outputs: Outputs, problem: BaseProblem, provider: Provider) -> list[Tensor]:
    """Random, the same for equal shapes, and zero where a result means nothing."""
    made = []
    for y in differentiable(outputs):
        generator = torch.Generator(y.device).manual_seed(1)
        cotangent = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
        if provider.nodes:
            cotangent[:, provider.nodes(problem) :] = 0
        made.append(cotangent)
    return made


def direction_work(form: Form, direction: str, problem: BaseProblem, provider: Provider) -> Work:
    """What is timed: the call without a graph, its backward pass, or both."""
    if direction == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return form.call()

        return forward
    leaves = list(form.leaves.values())
    # Made at the first call, whose result tells the shape: it is the warm-up's.
    kept: list[Tensor] = []
    called: list[tuple[Tensor, ...]] = []

    def backward() -> object:
        outputs = called[0] if called else differentiable(form.call())
        if not kept:
            kept.extend(cotangents(outputs, problem, provider))
        if direction == BACKWARD and not called:
            called.append(outputs)
        return torch.autograd.grad(outputs, leaves, kept, retain_graph=direction == BACKWARD)

    return backward


class Expected:
    """What oracles say of a problem, made once for all contenders that share one."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, int], Outputs] = {}

    def __call__(self, provider: Provider, problem: BaseProblem, positions: Tensor | None) -> Outputs:
        key = provider.oracle, problem.shape.length
        if key not in self._known:
            with torch.no_grad():
                wide = problem.dtype.itemsize == 2 and problem.shape.elements >= LARGE
                exact = problem.exact(torch.float32 if wide else torch.float64)
                self._known[key] = provider.oracle(exact, positions)
        return self._known[key]


def checked_positions(provider: Provider, problem: BaseProblem) -> Tensor | None:
    """Which positions of a long sequence are compared; None for all."""
    length = problem.shape.length
    if not provider.by_position or length <= FIRST:
        return None
    last = FIRST if provider.token_by_token else length
    chosen = torch.linspace(0, last - 1, POSITIONS, dtype=torch.float64)
    return chosen.long().unique().to(problem.device)


def value_error(provider: Provider, form: Form, problem: BaseProblem, expected: Expected) -> float:
    """The error of a result.

    Raises:
        AssertionError: it is wrong.
    """
    positions = checked_positions(provider, problem)
    wanted = real(problem, provider, expected(provider, problem, positions))
    with torch.no_grad():
        got = real(problem, provider, form.call())
    if positions is not None:
        got = tuple(y[:, positions] for y in got)
    return _values(problem, got, wanted)


def _values(problem: BaseProblem, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    limit, worst = tolerance(problem.operation, problem.dtype, FORWARD), 0.0
    for index, (y, z) in enumerate(zip(got, wanted, strict=True)):
        dtype = problem.result_dtype(index)
        assert y.dtype == dtype, f"expected a result in {dtype}, got {y.dtype}"
        assert y.shape == z.shape, f"expected shape {tuple(z.shape)}, got {tuple(y.shape)}"
        found = error(y, z)
        # Not "over": a NaN is not over anything.
        assert found <= limit, f"error {found:.3g} is over {limit:.3g}"
        size = z.double().square().mean().sqrt()
        one = ((y.double() - z.double()).square().mean(-1).sqrt().max() / size).item() if y.numel() else 0.0
        assert one <= WORST_POSITION * limit, f"one position: error {one:.3g} is over {WORST_POSITION * limit:.3g}"
        worst = max(worst, found)
    return worst


def gradient_error(provider: Provider, form: Form, problem: BaseProblem) -> float:
    """The largest error of a gradient; the result that it belongs to is compared, too.

    Raises:
        AssertionError: one is wrong.
    """
    outputs = form.call()
    up = cotangents(outputs, problem, provider)
    got = torch.autograd.grad(differentiable(outputs), list(form.leaves.values()), up)
    twin = problem.exact()
    leaves = provider.build(twin).leaves
    right = provider.oracle(twin, None)
    _values(problem, real(problem, provider, outputs), real(problem, provider, right))
    expected = torch.autograd.grad(
        differentiable(right), list(leaves.values()), [cotangent.double() for cotangent in up], materialize_grads=True
    )
    names, limit = list(form.leaves), tolerance(problem.operation, problem.dtype, TRAINING)
    assert_same_gradients(names, list(got), list(expected), limit)
    sizes = [e.square().mean().sqrt().item() for e in expected]
    return max(error(g, e) for g, e, size in zip(got, expected, sizes, strict=True) if size > 1e-12 * max(sizes))
