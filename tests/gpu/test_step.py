"""The extension's step in every kind and dtype, as a CUDA graph, and what would be seen were it wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.contenders.streams import made_up
from lmn_kernels import LogarithmicMixing, MemoryState, decode_
from lmn_kernels.backend.choice import why_not
from tests.gpu import step_trial
from tests.gpu.step_trial import GIVEN, STATE, Given, Trial, extension, renewed, same
from tests.support.places import GPU, REHEARSAL, Place, everywhere, short

F32 = torch.float32
SMALL = Given("linear", 24, 2, 2)
REASON = why_not("cpp", "step", torch.device("cpu"), F32)


def built(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the checks that needs the extension."""
    return pytest.mark.ext(pytest.mark.skipif(REASON is not None, reason=str(REASON))(test))


class StepCase(NamedTuple):
    given: Given
    dtype: torch.dtype
    kept: torch.dtype

    def __str__(self) -> str:
        return f"{self.given}, {short(self.dtype)}, state {short(self.kept)}"


def step_cases(place: Place) -> list[StepCase]:
    half = [torch.bfloat16, torch.float16] if place.device == "cuda" else [torch.bfloat16]
    dtypes = [(F32, F32), *((dtype, kept) for dtype in half for kept in (F32, dtype))]
    return [StepCase(given, *pair) for given in (GIVEN[:13] if place.quick else GIVEN) for pair in dtypes]


def at_goal_size(case: StepCase) -> bool:
    return case.given.embedding == 512 and case.dtype == case.kept and case.dtype != torch.float16


@everywhere(step_cases, first=at_goal_size)
@torch.no_grad()
def test_a_step_is_that_of_float64(place, case, record_property):
    extension(place, case.dtype)
    record_property("error", Trial(*case, place).check(3 if place.quick else 20))


@contextmanager
def no_waiting(place: Place) -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    if place.device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def beside(place: Place) -> Iterator[None]:
    """On a side stream, where what is captured later has to be warmed up."""
    if place.device != "cuda":
        yield
        return
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def replay_cases(place: Place) -> list[StepCase]:
    block, tall = Given("linear", 48, 4, 2, feedforward=4), Given("linear", 24, 2, 2, expand=1)
    found = [(Given("linear", 64, 4, 2), torch.bfloat16, torch.bfloat16), (tall, F32, F32)]
    return [StepCase(*case) for case in (*found, (block, torch.bfloat16, F32))]


@everywhere(replay_cases)
def test_a_captured_step_replayed_is_as_many_calls_on_another_pool(place, case):
    """To the bit (R17). Where there are no CUDA graphs, calls take the place of replays."""
    extension(place, case.dtype)
    replayed(*case, place)


def replayed(given: Given, dtype: torch.dtype, kept: torch.dtype, place: Place) -> None:
    """One layer's step, captured at one position and replayed at all others, over powers of two of every size."""
    device, rows, count = place.torch_device, given.rows, 64 if place.quick else 1000
    layer = given.layer(dtype, place)
    near = torch.tensor([0, 1 << 5, 1 << 10, 1 << 20, 1 << 31, 1 << 32, 1 << 16, 3, 1], device=device)
    pool = made_up(layer, (near - count // 2).clamp_min(0), (1 << 32) + count, kept)
    start, other = pool.snapshot(), pool.clone()
    xs = torch.randn(count, rows, 1, given.embedding, device=device).to(dtype)
    orders = [torch.randperm(rows, device=device) for _ in range(2)]
    # Slot 3 belongs to nobody, 7 and 8 are beyond the batch; which row has which slot changes halfway.
    orders = [order.masked_fill(order == 3, -1) for order in orders]
    ys, expected = torch.empty_like(xs), torch.empty_like(xs)
    x, slots, addresses = xs[0].clone(), orders[0].clone(), [getattr(pool, name).data_ptr() for name in STATE]

    def step() -> Tensor:
        return layer.step_(x, pool, slots)

    with beside(place):
        for _ in range(3):
            step()
    assert int((pool.position - start.position).max()) == 3, "the warm-up has not run"
    pool.restore(start)
    same("the pool that a snapshot was put back into", pool, start)
    if place.device == "cuda":
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
    with no_waiting(place):
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
    assert sum(after.bit_length() - before.bit_length() for before, after in passed) > 8, "too few powers of two"


@torch.no_grad()
def test_levels_are_renewed_by_the_bitmask_rule():
    layer = Given("linear", 8, 1, 1, expand=1).layer(F32, REHEARSAL)
    before = made_up(layer, torch.tensor([0, 1, 6, 7, (1 << 20) - 1, (1 << 31) - 1]), 1 << 31, F32)
    after = made_up(layer, before.position + 1, 1 << 31, F32)
    for row, n in zip(renewed(before, after), after.position.tolist(), strict=True):
        expected = [bool(((n - 1) ^ n) >> level & 1) for level in range(1, 32) for _ in range(1 + level)]
        assert row.tolist() == expected


def test_every_kind_and_dtype_is_checked():
    found = step_cases(GPU)
    kinds = {(given.kind, given.expand) for given, _, _ in found}
    assert kinds >= {(kind, k) for kind in ("linear", "conv", "conv_mixed", "depthwise_separable") for k in (None, 1)}
    half = [torch.bfloat16, torch.float16]
    pairs = {(F32, F32), *((d, d) for d in half), *((d, F32) for d in half)}
    assert {(dtype, kept) for _, dtype, kept in found} == pairs and len(found) == len(GIVEN) * len(pairs)
    assert {given.feedforward for given, _, _ in found} > {None, 0}
    assert set(step_cases(REHEARSAL)) < set(step_cases(Place("cpu", False)))


# The checks can fail


def wrong_output(y, state, x, slots):
    y[slots >= 0] *= 1.001


def wrong_idle_row(y, state, x, slots):
    y[slots < 0] = 1e-30


def wrong_position(y, state, x, slots):
    state.position[-1] += 1


def wrong_slot(y, state, x, slots):
    state.nodes[-1, 0] += 1e-3


def wrong_level(y, state, x, slots):
    state.v[4, -1] += 1e-3  # of position 1000: of no level that three tokens touch


def wrong_node(y, state, x, slots):
    state.nodes[3, 2] += 0.01  # of position 6: level 3, which the second token completes


def wrong_token(y, state, x, slots):
    state.token[0] += 1e-3


def wrong_run(y, state, x, slots):
    if x.shape[1] == 1:
        y[slots >= 0] += 1e-6


def wrong_by_chance(y, state, x, slots):
    y[slots >= 0] *= 1 + 1e-6 * torch.rand(())


def wrong_memory(y, state, x, slots):
    y[slots >= 0] += torch.isnan(torch.empty(())).float() * 1e-7


WRONG: dict[Callable[..., None], str] = {
    wrong_output: "y: error",
    wrong_idle_row: "not exactly 0",
    wrong_position: "position differs",
    wrong_slot: "nodes: changes where",
    wrong_level: "v: changes where",
    wrong_node: "nodes: error",
    wrong_token: "token: error",
    wrong_run: "one token a call: the output differs",
    wrong_by_chance: "run 2: the output differs",
    wrong_memory: "run 2: the output differs",
}


@built
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@torch.no_grad()
def test_the_check_sees_what_is_wrong(wrong, monkeypatch):
    def decoded(x, state, weights, *, slots=None, backend):
        y = decode_(x, state, weights, slots=slots, backend=backend)
        if backend == "cpp" and slots is not None:
            wrong(y, state, x, slots)
        return y

    trial = Trial(SMALL, F32, F32, REHEARSAL)
    trial.check(3)
    monkeypatch.setattr(step_trial, "decode_", decoded)
    with pytest.raises(AssertionError, match=WRONG[wrong]):
        trial.check(3)


@built
@torch.no_grad()
def test_the_check_sees_a_row_that_is_not_refused(monkeypatch):
    trial = Trial(SMALL, F32, F32, REHEARSAL)
    monkeypatch.setattr(step_trial, "decode_", lambda x, *rest, **named: x)
    with pytest.raises(AssertionError, match="was not refused"):
        trial.without_room()


@built
@torch.no_grad()
def test_the_check_asks_a_device_for_nan_in_the_row_without_room(monkeypatch):
    def decoded(x, state, weights, *, backend, first=float("nan")):
        """As on CUDA: only slot 1 takes part."""
        y = decode_(x, state, weights, slots=torch.tensor([-1, 1]), backend=backend)
        return y.index_fill(0, torch.tensor([0]), first)

    trial = Trial(SMALL, F32, F32, REHEARSAL)
    trial.refuses = False
    monkeypatch.setattr(step_trial, "decode_", decoded)
    trial.without_room()
    monkeypatch.setattr(step_trial, "decode_", lambda *given, **named: decoded(*given, **named, first=0.0))
    with pytest.raises(AssertionError, match="NaN is not what"):
        trial.without_room()


@built
def test_the_replay_sees_a_warm_up_that_counts(monkeypatch):
    monkeypatch.setattr(MemoryState, "restore", lambda self, snapshot: self)
    with pytest.raises(AssertionError, match="put back into: position differs"):
        replayed(SMALL, F32, F32, REHEARSAL)


@built
def test_the_replay_sees_what_a_host_remembers(monkeypatch):
    step, calls = LogarithmicMixing.step_, []

    def counting(self, x, state, slots):
        calls.append(1)
        return step(self, x, state, slots) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(LogarithmicMixing, "step_", counting)
    with pytest.raises(AssertionError, match="replays and calls: the output differs"):
        replayed(SMALL, F32, F32, REHEARSAL)


@built
@torch.no_grad()
def test_the_check_sees_steps_of_the_reference():
    trial = Trial(SMALL, F32, F32, REHEARSAL)
    trial.layer.step_backend = "reference"
    with pytest.raises(AssertionError, match="expected that cpp serves"):
        trial.check(3)


def test_without_the_extension_a_cpu_skips_and_a_gpu_fails(monkeypatch):
    monkeypatch.setattr(step_trial, "why_not", lambda *given: "the extension is not built")
    with pytest.raises(pytest.skip.Exception, match="not built"):
        extension(REHEARSAL)
    with pytest.raises(RuntimeError, match="not built"):
        extension(GPU)
