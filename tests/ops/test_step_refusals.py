"""What the sequential form refuses: by name, with the right kind of error, and with nothing changed (R9, R10, R13)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close
from lmn_kernels import MemoryState, decode_, update_
from tests.support.stepping import BY_NAME, PARTS, assert_same_state, every_backend, extension, parts, started
from tests.support.variants import Variant

F32 = torch.float32


def step_(x, state, weights, *, slots=None, backend):
    """The method of a layer that has stepped before, and may remember what it found out then."""
    layer = layer_of(backend)
    with torch.no_grad():
        for _ in range(2):
            layer.step_(torch.randn(1, 1, 12), layer.init_state(1, max_position=1))
    return layer.step_(x, state, slots)


in_place = pytest.mark.parametrize("run", [update_, decode_], ids=lambda run: run.__name__)


def layer_of(backend: str):
    return BY_NAME["linear"].layer(F32, step_backend=backend)


def attempt(backend: str, run: Callable, change: dict) -> None:
    """Three rows into a pool of four, but for a change: it must raise, and pool, versions and bound stay."""
    layer = layer_of(backend)
    given = {"x": torch.randn(3, 2, 12), "state": started(layer, [6, 1, 4, 0], 2), "slots": torch.tensor([2, -1, 0])}
    given["weights"] = layer.step_weights()
    pool = given["state"]
    for name, value in change.items():
        given[name] = value(given[name]) if callable(value) else value
    watched = given["state"] if isinstance(given["state"], MemoryState) else pool
    before, versions = watched.clone(), [tensor._version for _, tensor in parts(watched)]
    bound = watched.max_position
    try:
        run(given["x"], given["state"], given["weights"], slots=given["slots"], backend=backend)
    finally:
        assert_same_state(watched, before)
        assert [tensor._version for _, tensor in parts(watched)] == versions and watched.max_position == bound


def part(**changes: Callable[[Tensor], Tensor]) -> Callable[[MemoryState], MemoryState]:
    """A change of a state's tensors."""
    return lambda state: state.replace(**{name: change(getattr(state, name)) for name, change in changes.items()})


def weight(index: int, change: Callable[[Tensor], Tensor]) -> Callable:
    """A change of one of the weights."""
    return lambda w: w._replace(tensors=(*w.tensors[:index], change(w.tensors[index]), *w.tensors[index + 1 :]))


def block(change: Callable[[tuple], tuple], **more) -> Callable:
    """The weights of a block whose norms and feed-forward do not fit."""
    weights = BY_NAME["block"].layer(F32).step_weights()
    return lambda _: weights._replace(block=change(weights.block), **more)


def other_layer(name: str, *sizes: int, **options) -> Callable:
    return lambda _: Variant(name, *sizes, options).layer(F32).step_weights()


IDS = "slots: expected dtype int32 or int64, got"
RANGE = r"slots: expected values in -1 .+ 3, got"
REFUSALS = {
    "a slot twice": ({"slots": torch.tensor([2, 0, 2])}, ValueError, "slots: expected each slot at most once"),
    "a slot twice of 32 bits": ({"slots": torch.tensor([1, 1, -1], dtype=torch.int32)}, ValueError, "slots: .* once"),
    "a slot beyond": ({"slots": torch.tensor([0, 4, 1])}, ValueError, RANGE),
    "a slot below": ({"slots": torch.tensor([0, -2, 1])}, ValueError, RANGE),
    "a slot of 2^32": ({"slots": torch.tensor([0, 2**32, 1])}, ValueError, RANGE),
    "a slot beyond without tokens": ({"x": torch.zeros(1, 0, 12), "slots": torch.tensor([4])}, ValueError, RANGE),
    "float slots": ({"slots": torch.zeros(3)}, TypeError, IDS),
    "short slots": ({"slots": torch.zeros(3, dtype=torch.int16)}, TypeError, IDS),
    "bool slots": ({"slots": torch.tensor([True, False, True])}, TypeError, IDS),
    "listed slots": ({"slots": [1, 0, 2]}, TypeError, "slots: expected a tensor, got list"),
    "too few slots": ({"slots": torch.tensor([1, 0])}, ValueError, r"slots: expected shape \[3\], got \[2\]"),
    "slots of two axes": ({"slots": torch.tensor([[1, 0, 2]])}, ValueError, r"slots: expected shape \[3\], got"),
    "slots elsewhere": ({"slots": torch.zeros(3, device="meta").long()}, ValueError, "slots: expected device cpu"),
    "rows without slots": ({"slots": None}, ValueError, "x: expected a row for each of 4 slots, got 3"),
    "x of two axes": ({"x": torch.randn(3, 12)}, ValueError, r"x: expected shape \[batch, tokens, embedding\]"),
    "x of another size": ({"x": torch.randn(3, 2, 6)}, ValueError, r"state.token: expected shape .*\[4, 6\], got"),
    "x no tensor": ({"x": [0.0]}, TypeError, "x: expected a tensor, got list"),
    "x of another dtype": ({"x": Tensor.bfloat16}, TypeError, r"(q.weight|weights\[0\]): expected dtype"),
    "no state": ({"state": None}, TypeError, "state: expected a MemoryState, got NoneType"),
    "short positions": ({"state": part(position=Tensor.int)}, TypeError, "state.position: expected dtype"),
    "two axes of positions": ({"state": part(position=lambda p: p[None])}, ValueError, "state.position: expected"),
    "fewer levels": ({"state": part(nodes=lambda n: n[:, 1:].clone())}, ValueError, "state.(nodes|q): expected shape"),
    "a narrow q": ({"state": part(q=lambda q: q[..., 1:].clone())}, ValueError, "state.q: expected shape"),
    "fewer tokens": ({"state": part(token=lambda t: t[1:])}, ValueError, "state.token: expected shape"),
    "another expander": ({"state": lambda s: s.replace(expand=1)}, ValueError, "state: expected one with expand=0"),
    "weights of another bank": ({"weights": other_layer("banks", 12, 3, 3)}, ValueError, "summarizer.weight: expected"),
    "weights of one bank": ({"weights": other_layer("bank", 12, 3, 1)}, ValueError, "summarizer.weight: expected"),
    "weights of other banks": (
        {"weights": other_layer("mixed", 12, 3, 3, summarizer="conv_mixed")},
        ValueError,
        "summarizer.weight: expected",
    ),
    "heads": ({"weights": lambda w: w._replace(heads=5)}, ValueError, "heads: expected a divisor of embedding=12"),
    "no heads": ({"weights": lambda w: w._replace(heads=0)}, ValueError, "heads: expected a divisor of embedding=12"),
    "a summarizer": ({"weights": lambda w: w._replace(summarizer="sum")}, ValueError, "summarizer: expected linear"),
    "too few weights": ({"weights": lambda w: w._replace(tensors=w.tensors[:9])}, ValueError, "weights: expected 10"),
    "a wide weight": ({"weights": weight(2, lambda w: torch.randn(12, 13))}, ValueError, "expected shape .*12, 12"),
    "a long bias": ({"weights": weight(5, lambda w: torch.randn(13))}, ValueError, r"shape .*\[12\], got \[13\]"),
    "a narrow summarizer": ({"weights": weight(8, lambda w: w[:, 1:])}, ValueError, "summarizer.weight: expected"),
    "a long summarizer bias": ({"weights": weight(9, lambda w: torch.randn(25))}, ValueError, "summarizer.bias: "),
    "a double weight": ({"weights": weight(9, Tensor.double)}, TypeError, "expected dtype"),
    "an expander": ({"weights": lambda w: w._replace(tensors=w.tensors + w.tensors[:2])}, ValueError, "expander"),
    "two parts of a block": ({"weights": block(lambda b: b[:2])}, ValueError, "block: expected 0, 1 or 6 tensors"),
    "a wide norm": ({"weights": block(lambda b: (torch.randn(13), *b[1:]))}, ValueError, "norm1.weight: expected"),
    "a narrow layer": ({"weights": block(lambda b: (*b[:2], b[2][:5], *b[3:]))}, ValueError, "fc1.bias: expected"),
    "an eps too few": ({"weights": block(lambda b: b, eps=(1e-6,))}, ValueError, "eps: expected 2 numbers, got 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
@in_place
@every_backend
@torch.no_grad()
def test_what_does_not_fit_is_refused_by_name(run, case, backend):
    change, kind, said = REFUSALS[case]
    with pytest.raises(kind, match=said):
        attempt(backend, run, change)


@pytest.mark.parametrize("case", [case for case, (change, *_) in REFUSALS.items() if "weights" not in change])
@every_backend
@torch.no_grad()
def test_a_layer_refuses_it_too(case, backend):
    change, kind, said = REFUSALS[case]
    said = said if "x" not in change or "slots" in change else "x: expected|x_t: expected|state.token: expected"
    with pytest.raises(kind, match=said):
        attempt(backend, step_, change)


@extension
@torch.no_grad()
def test_the_extension_writes_to_contiguous_states_alone(backend):
    for name in PARTS:
        spread = part(**{name: lambda t: torch.stack([t, t], -1)[..., 0]})
        with pytest.raises(ValueError, match=f"state.{name}: expected a contiguous tensor"):
            attempt(backend, decode_, {"state": spread})
    with pytest.raises(TypeError, match="state.v: expected dtype"):
        attempt(backend, decode_, {"state": part(v=Tensor.bfloat16)})


STEPS = {
    "two tokens": ({"x": torch.randn(2, 2, 12)}, ValueError, r"x_t: expected shape .*\[\*, 1, 12\], got \[2, 2, 12\]"),
    "no token": ({"x": torch.randn(2, 0, 12)}, ValueError, r"x_t: expected shape .*\[\*, 1, 12\], got \[2, 0, 12\]"),
    "two axes": ({"x": torch.randn(2, 12)}, ValueError, "x: expected shape"),
    "another size": ({"x": torch.randn(2, 1, 6)}, ValueError, "x: expected shape"),
    "another batch": ({"x": torch.randn(3, 1, 12)}, ValueError, r"state.position: expected shape .*\[3\], got \[2\]"),
    "another dtype": ({"x": torch.randn(2, 1, 12).bfloat16()}, TypeError, "x: expected dtype torch.float32"),
    "another device": ({"x": torch.randn(2, 1, 12, device="meta")}, ValueError, "x: expected device cpu"),
    "no tensor": ({"x": [0.0]}, TypeError, "x.*: expected a tensor, got list"),
    "no state": ({"state": lambda _: None}, TypeError, "state: expected a MemoryState, got NoneType"),
    "another expander": ({"state": lambda s: s.replace(expand=1)}, ValueError, "state: expected one with expand=0"),
    "one bank": (
        {"state": lambda s: s.replace(**{name: getattr(s, name)[:, :, :1].clone() for name in PARTS[2:]})},
        ValueError,
        "state.nodes: expected shape",
    ),
    "short positions": ({"state": part(position=Tensor.int)}, TypeError, "state.position: expected dtype"),
    "integer nodes": ({"state": part(nodes=Tensor.long)}, TypeError, "state.nodes: expected"),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_a_step_refuses_in_the_same_words(case, backend):
    change, kind, said = STEPS[case]
    layer = layer_of(backend)
    start = started(layer, [3, 4], 2)
    x, state = change.get("x", torch.randn(2, 1, 12)), change.get("state", lambda state: state)(start)
    before = start.clone()
    with pytest.raises(kind, match=said):
        layer.step(x, state)
    assert_same_state(start, before)


@pytest.mark.parametrize("tokens", [1, 2, 20])
@in_place
@every_backend
@torch.no_grad()
def test_an_exhausted_state_is_left_alone(run, tokens, backend):
    """One row of three has no room; neither it nor the others take a token. The last place there is, is taken."""
    full = part(position=lambda p: torch.tensor([2, 3, max(16 - tokens, 0), 0]))
    change = {"state": full, "x": torch.randn(3, tokens, 12), "slots": torch.tensor([0, 2, -1])}
    with pytest.raises(RuntimeError, match="state: exhausted"):
        attempt(backend, run, change)
    layer, count = layer_of(backend), min(tokens, 15)
    state = started(layer, [15 - count], count)
    run(torch.randn(1, count, 12), state, layer.step_weights(), backend=backend)
    assert state.position.item() == state.capacity == state.max_position == 15
    with pytest.raises(RuntimeError, match="state: exhausted"):
        run(torch.randn(1, 1, 12), state, layer.step_weights(), backend=backend)


@every_backend
@torch.no_grad()
def test_a_step_makes_room_until_positions_end(backend):
    layer, x = layer_of(backend), torch.randn(1, 1, 12)
    _, state = layer.step(x, started(layer, [15], 0))
    assert state.position.item() == state.max_position == 16 and state.capacity == 31
    last = 2**62 - 1
    state = layer.init_state(1).with_room(last).replace(position=torch.tensor([last - 1]), max_position=last - 1)
    _, state = layer.step(x, state)
    assert state.position.item() == last
    with pytest.raises(RuntimeError, match="exhausted"):
        layer.step(x, state)


@in_place
@every_backend
def test_gradients_that_would_be_lost_are_refused(run, backend):
    """The message names the way out."""
    frozen = {"weights": lambda w: w._replace(tensors=tuple(tensor.detach() for tensor in w.tensors))}
    wanted = [{}, frozen | {"x": torch.randn(3, 2, 12, requires_grad=True)}]
    wanted += [frozen | {"state": part(**{name: lambda t: t.clone().requires_grad_()})} for name in PARTS[1:]]
    for change in wanted:
        with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
            attempt(backend, run, change)
    for change, enabled in ((frozen, True), ({}, False)):
        with torch.set_grad_enabled(enabled), pytest.raises(AssertionError, match="position"):  # it was not refused
            attempt(backend, run, change)


@extension
def test_a_named_extension_does_not_record(backend):
    """Nor does its operation, of which copies take no gradient."""
    layer, x = layer_of(backend), torch.randn(1, 1, 12)
    with pytest.raises(RuntimeError, match="cannot serve step.*gradients are recorded"):
        layer.step(x, layer.init_state(1))
    layer.requires_grad_(False)
    state = started(layer, [3], 1)
    for name in PARTS[1:]:
        wanting = part(**{name: lambda t: t.clone().requires_grad_()})(state)
        with pytest.raises(RuntimeError, match="cannot serve step.*gradients are recorded"):
            layer.step(x, wanting)
        with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
            torch.ops.lmn_kernels.step.default(x, *wanting.slots(), *layer.step_weights())


@every_backend
@torch.no_grad()
def test_a_slot_without_room_hinders_no_other(backend):
    layer = BY_NAME["linear"].layer(torch.float32)
    state = layer.init_state(3, max_position=7)
    state.position[1] = state.capacity
    x = torch.randn(2, 4, 12)
    y = decode_(x, state, layer.step_weights(), slots=torch.tensor([2, 0]), backend=backend)
    assert_close("y", y, layer(x), TOLERANCE[torch.float32][0])
    with pytest.raises(RuntimeError, match="exhausted"):
        decode_(x, state, layer.step_weights(), slots=torch.tensor([2, 1]), backend=backend)


@torch.no_grad()
def test_a_state_that_the_extension_does_not_keep_is_the_references():
    layer = BY_NAME["linear"].layer(torch.float32)
    x = torch.randn(3, 4, 12)
    state, other = (layer.init_state(3, max_position=4, dtype=torch.float64) for _ in range(2))
    y = decode_(x, state, layer.step_weights())
    assert torch.equal(y, decode_(x, other, layer.step_weights(), backend="reference"))
    assert_same_state(state, other)


@torch.no_grad()
def test_rows_that_take_no_part_need_no_room():
    layer = BY_NAME["linear"].layer(torch.float32)
    state = layer.init_state(1, max_position=3)
    for _ in range(3):
        layer.step_(torch.randn(1, 2, 12), state, torch.tensor([-1]))
    assert state.max_position == 0 and state.capacity == 3
    assert layer.step(torch.randn(1, 1, 12), state)[1].levels == state.levels, "room was made that nobody needs"
