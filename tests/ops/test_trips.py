"""How far a call travels: at most half of the changes of file that it took before operations registered themselves."""

from __future__ import annotations

import pytest
import torch

from lmn_kernels import LogarithmicMemory, why_not
from tests.support.trips import Trip, trip


def trips(backend: str) -> tuple[Trip, Trip]:
    """Forward and backward of a block, over a length that it has not met before."""
    layer, results = LogarithmicMemory(32, 4, 2, backend=backend), []
    layer(torch.randn(2, 37, 32)).sum().backward()
    x = torch.randn(2, 41, 32)
    threads = torch.autograd.is_multithreading_enabled()
    torch.autograd.set_multithreading_enabled(False)
    try:
        return trip(lambda: results.append(layer(x))), trip(lambda: results[0].sum().backward())
    finally:
        torch.autograd.set_multithreading_enabled(threads)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.ext)])
def test_forward_and_backward(backend):
    if (reason := why_not(backend, "attend", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    forward, backward = trips(backend)
    assert forward.changes <= 89 // 2 and backward.changes <= 70 // 2
    assert forward.files >= 10 and backward.files >= 4, "a tracer that sees nothing"


def test_a_later_step_is_three_calls_and_the_extensions():
    layer, x = LogarithmicMemory(32, 4, 2, step_backend="auto"), torch.randn(2, 1, 32)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn(2, 5, 32))
        _, state = layer.step(x, state)
        later = trip(lambda: layer.step(x, state))
    if layer.__dict__["_plan"].in_place:  # where the extension is built
        assert later.calls <= 5 and later.files <= 3
    else:
        assert later.changes <= 15
