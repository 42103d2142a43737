"""Streams under torch.compile: how many graphs they take, and that they agree with eager calls before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree

from bench.close import TOLERANCE, assert_close
from lmn_kernels import (
    ExpanderSummarizerLogarithmicMemory,
    LogarithmicMemory,
    LogarithmicMixing,
    LookAheadMemory,
    MemoryState,
)
from tests.support.stepping import CPP

VALUE = TOLERANCE[torch.float32][0]
ONE = torch.tensor([0])
CASES: dict[str, tuple[type[LogarithmicMixing], dict[str, Any]]] = {
    "mixing": (LogarithmicMixing, {}),
    "mixing with an expander": (LogarithmicMixing, {"expand": 1}),
    "block": (LogarithmicMemory, {}),
    "block with an expander": (ExpanderSummarizerLogarithmicMemory, {}),
}
backends = pytest.mark.parametrize("backend", ["reference", CPP])


def made(case: str, backend: str = "reference") -> LogarithmicMixing:
    kind, options = CASES[case]
    return kind(16, 2, 2, init="variance_preserving", step_backend=backend, **options)


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def prompt(layer: LogarithmicMixing, start: int, room: int) -> MemoryState:
    """Behind ``start`` tokens, with room."""
    state = layer.prefill(torch.randn(2, start, 16))[1] if start else layer.init_state(2)
    return state.with_room(room)


def in_calls(layer: LogarithmicMixing, x: Tensor, state: MemoryState, call: Callable[..., Any]) -> MemoryState:
    """``call(layer, x, state)`` for one piece of x after the other, each compared with its eager call."""
    expected = state
    for piece in x:
        y, state = call(piece, state)
        other, expected = layer(piece, state=expected, return_state=True)
        assert_close(f"y up to {expected.max_position}", y, other, VALUE)
        assert state.max_position == expected.max_position and state.levels == expected.levels
        assert_close("nodes", state.nodes, expected.nodes, VALUE)
    return state


@pytest.mark.parametrize(("case", "start"), [("block", 0), ("mixing", 37), ("mixing with an expander", 0)])
@torch.no_grad()
def test_chunks_of_one_length_take_two_graphs(case, start):
    layer, tokens = made(case), 2048 if case == "block" else 80
    run, counter = compiled(lambda x, state: layer(x, state=state, return_state=True))
    in_calls(layer, torch.randn(tokens // 16, 2, 16, 16), prompt(layer, start, 8000), run)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("case", "start"), [("mixing", 0), ("block with an expander", 37)])
@backends
@torch.no_grad()
def test_steps_take_two_graphs(case, start, backend):
    layer = made(case, backend)
    for function in (layer.step, lambda x, state: layer(x, state=state, return_state=True)):
        run, counter = compiled(function)
        in_calls(layer, torch.randn(40, 2, 1, 16), prompt(layer, start, 4000), run)
        assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("case", "start", "tokens", "dynamic"),
    [("mixing", 0, 1, False), ("block", 37, 1, None), ("block", 0, 3, False), ("mixing with an expander", 0, 1, None)],
)
@backends
@torch.no_grad()
def test_steps_into_a_pool_take_one_graph(case, start, backend, tokens, dynamic):
    """Whatever the position: the bound is not read, and a plan that eager calls make is no reason to compile anew."""
    layer = made(case, backend)
    pool = prompt(layer, start, 4000)
    expected = pool.clone()
    run, counter = compiled(lambda x: layer.step_(x, pool), dynamic=dynamic)
    for piece in torch.randn(20, 2, tokens, 16):
        before = layer.__dict__.get("_plan")
        y = run(piece)
        assert layer.__dict__.get("_plan") is before, "a plan was made or dropped"
        assert_close("y", y, layer.step_(piece, expected), VALUE)
        assert pool.max_position == expected.max_position
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", ["block", "mixing with an expander"])
@backends
@torch.no_grad()
def test_eager_and_compiled_calls_take_turns(case, backend):
    """From a state whose room grows once; and with a pool, whose room is known again where it is read."""
    layer, x = made(case, backend), torch.randn(2, 67, 16)
    whole, state, ys, place = layer(x), layer.init_state(2, max_position=32), [], 0
    step, _ = compiled(layer.step)
    chunk = torch.compile(lambda x, state: layer(x, state=state, return_state=True), backend="eager")
    pool = layer.init_state(2, max_position=67)
    advance = torch.compile(lambda x: layer.step_(x, pool), backend="eager")
    for number, length in enumerate((1, 1, 8, 1, 1, 8, 1, 1, 8, 1, 1, 8, 25, 1, 1)):
        piece = x[:, place : place + length]
        run = (layer.step if number % 2 else step) if length == 1 else chunk
        y, state = run(piece, state)
        ys.append(y)
        assert_close("pool", (advance(piece) if length == 1 and number % 3 else layer.step_(piece, pool)), y, VALUE)
        place += length
        assert state.max_position == pool.max_position == place
    assert place == 67 and state.levels == 6
    assert_close("y", torch.cat(ys, 1), whole, VALUE)
    _, later = layer(x[:, :3], state=pool, return_state=True)
    assert later.levels == pool.levels, "room was made that nobody needs"


@backends
@torch.no_grad()
def test_a_compiled_step_into_a_pool_without_room_is_an_error_or_not_a_number(backend):
    layer, x = made("block", backend), torch.randn(2, 4, 16)
    pool = layer.init_state(2, max_position=3)
    run, _ = compiled(layer.step_)
    assert_close("y", run(x[:, :2], pool), layer(x)[:, :2], VALUE)
    if backend == "cpp":
        with pytest.raises(RuntimeError, match="exhausted"):
            run(x[:, 2:], pool)
        assert pool.position.tolist() == [2, 2]
    else:
        y = run(x[:, 2:], pool)
        assert_close("with room", y[:, :1], layer(x)[:, 2:3], VALUE)
        assert y[:, 1].isnan().all() and pool.position.tolist() == [3, 3]


# Beyond the room: what advanced a state's tensors behind its back


def overtaken(layer: LogarithmicMixing, x: Tensor) -> MemoryState:
    """Room for 15 tokens, its first row at 14 and its second at 3, and of neither it has been told."""
    state = layer.init_state(2, max_position=15)
    again = _pytree.tree_map(lambda tensor: tensor, state)
    for row, count in ((0, 14), (1, 3)):
        layer.step_(x[row : row + 1, :count], again, torch.tensor([row]))
    return state


@pytest.mark.parametrize("case", ["block", "mixing with an expander"])
@torch.no_grad()
def test_a_chunk_beyond_the_room_is_not_a_number(case):
    layer, x = made(case), torch.randn(2, 20, 16)
    state = overtaken(layer, x)
    run, _ = compiled(lambda x, **given: layer(x, state=state, return_state=True, **given))
    pieces = torch.stack([x[0, 14:18], x[1, 3:7]])
    for lengths in (None, torch.tensor([4, 3])):
        y, after = run(pieces) if lengths is None else run(pieces, lengths=lengths)
        count = 4 if lengths is None else 3
        assert y[0].isnan().all() and after.nodes[0].isnan().all() and after.position.tolist() == [18, 3 + count]
        assert_close("the other row", y[1:, :count], layer(x[1:])[:, 3 : 3 + count], VALUE)
        assert after.nodes[1].isfinite().all()
        assert layer(torch.randn(2, 1, 16), state=after)[0].isnan().all(), "and nothing sound comes of it later"
    y, grown = layer(pieces, state=state, return_state=True)
    assert grown.levels == 4, "an eager call reads how far the rows are, and makes room"
    assert_close("eager", y[:1], layer(x[:1])[:, 14:18], VALUE)


@backends
@pytest.mark.parametrize("case", ["block", "mixing with an expander"])
@torch.no_grad()
def test_a_step_beyond_the_room_is_an_error_or_not_a_number(case, backend):
    layer, x = made(case, backend), torch.randn(2, 20, 16)
    state = overtaken(layer, x)
    state = layer.step(torch.stack([x[0, 14:15], x[1, 3:4]]), state)[1]
    state._set(_bound=2)  # it stands at 0, as far as it knows
    run, _ = compiled(layer.step)
    pieces = torch.stack([x[0, 15:16], x[1, 4:5]])
    if backend == "cpp":
        with pytest.raises(RuntimeError, match="exhausted: slot 0 is at position 15"):
            run(pieces, state)
    else:
        y, after = run(pieces, state)
        assert y[0].isnan().all() and after.nodes[0].isnan().all() and after.nodes[1].isfinite().all()
        assert_close("the other row", y[1:], layer(x[1:])[:, 4:5], VALUE)
    y, grown = layer.step(pieces, state)
    assert grown.levels == 4 and grown.position.tolist() == [16, 5]
    assert_close("eager", y[:1], layer(x[:1])[:, 15:16], VALUE)


def test_a_pool_off_a_cpu_may_be_as_far_as_its_room_behind_a_compiled_step(monkeypatch):
    """Where positions are not read, the bound must hold for them, and the graph counts for nobody."""
    layer = made("mixing")
    pool = layer.init_state(2, max_position=63)
    run, _ = compiled(layer.step_)
    run(torch.randn(2, 1, 16), pool)
    assert pool.max_position == 1
    monkeypatch.setattr("lmn_kernels.states.memory.concrete", lambda _: False)
    assert pool.max_position == pool.capacity == 63


@torch.no_grad()
def test_a_pool_of_called_modules_keeps_rows_without_room():
    layer, x = made("mixing"), torch.randn(2, 20, 16)
    pool = overtaken(layer, x)
    layer.sva.q = nn.Sequential(layer.sva.q)
    kept, pieces = pool.clone(), torch.stack([x[0, 14:16], x[1, 3:5]])
    with pytest.raises(RuntimeError, match="exhausted: expected positions of at most 15, got 16"):
        layer.step_(pieces, pool)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run, _ = compiled(lambda x, pool: layer.step_(x, pool))
        y = run(pieces, pool)
    assert y[0, 1].isnan().all() and pool.position.tolist() == [15, 5]
    assert_close(
        "with room", torch.cat([y[0, :1], y[1]]), torch.cat([layer(x[:1])[0, 14:15], layer(x[1:])[0, 3:5]]), VALUE
    )
    assert torch.equal(pool.token[0], x[0, 14]) and not torch.equal(pool.token, kept.token)


@pytest.mark.parametrize("attn_type", [3, 0])
@torch.no_grad()
def test_segments_of_one_length_take_no_more_graphs_once_the_memory_is_full(attn_type):
    model = LookAheadMemory(16, 2, 2, memory_length=12, attn_type=attn_type)
    run, counter = compiled(model)
    state = expected = None
    counts = []
    for segment in torch.randn(10, 2, 4, 16):
        y, state = run(segment, state)
        other, expected = model(segment, expected)
        assert_close("y", y, other, VALUE)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[4] <= 5
