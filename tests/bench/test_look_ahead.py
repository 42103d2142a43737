"""LaMemo's contenders: each agrees with an oracle that goes another way, and counts are what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.contenders import look_ahead
from bench.contenders import look_ahead_literal as literal
from bench.contenders.look_ahead import ATTENTION, LAYER, OPERATIONS, LookAheadProblem, LookAheadShape
from bench.contenders.providers import REGISTRY, compare
from bench.contenders.shapes import DIRECTIONS
from bench.measure import timing
from bench.measure.comparison import FORWARD, TRAINING, Comparison, Limits
from bench.measure.contender import OURS, Form
from bench.measure.gate import Expected, value_error
from bench.measure.runner import Ceilings, Context
from bench.runs.lamemo import GPU_SHAPES

CPU = torch.device("cpu")
# As long a memory as the segment, a longer one, a shorter one; embedding and heads of several sizes.
SHAPES = [
    LookAheadShape("alike", 2, 8, 8, 16, 2, 8, 24),
    LookAheadShape("longer", 2, 7, 24, 12, 3, 5, 20),
    LookAheadShape("shorter", 1, 20, 6, 16, 1, 16, 32),
]
SHAPE = SHAPES[1]
COMPILED = "literal, compiled"
LIMITS = Limits(seconds=60, budget=0, least=2)
HERE = Context(CPU, torch.float32, "reference", True, Path(), Path(), {})


def compared(operation: str, names: list[str], shape: LookAheadShape = SHAPE) -> Comparison:
    return compare(HERE, operation, shape, names, (FORWARD, TRAINING), LIMITS)


def problem(operation: str, shape: LookAheadShape = SHAPE, dtype: torch.dtype = torch.float32) -> LookAheadProblem:
    return LookAheadProblem(operation, shape, dtype, CPU, "reference")


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(Ceilings, "measure", lambda *_: Ceilings(1e10, 1e10))
    monkeypatch.setattr(timing, "release", lambda device: None)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_contender_is_right(operation: str, shape: LookAheadShape) -> None:
    one = compared(operation, [name for name in REGISTRY[operation] if name != COMPILED], shape)
    one.check()
    assert one.gaps == {} and len(one._errors) == 6
    assert all(0 < found < 1e-6 for found in one._errors.values())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_have_time_and_memory(operation: str) -> None:
    one = compared(operation, [OURS, "literal", "looks back alone"])
    one.check()
    shape = {
        "name": "longer", "batch": 2, "tokens": 7, "memory": 24, "embedding": 12, "heads": 3, "head_size": 5,
        "feedforward": 20,
    }  # fmt: skip
    for row, held in zip(one.time(), one.memory(), strict=True):
        assert all(row[name] == held[name] for name in ("provider", "operation", "direction", "shape"))
        assert row["shape"] == shape and 0 < row["median"] and row["error"] <= row["tolerance"]
        assert ("share" in row) == (row["provider"] != "looks back alone")
        assert ("ratio" in row) == (row["provider"] != OURS)
        assert held["peak_bytes"] > 0 and ("saved_bytes" in held) == (row["direction"] == TRAINING)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_compiled_form(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is one graph; a compiler of machine code would take a minute."""
    modes = []

    def compile_whole(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
        modes.append(mode)
        return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(look_ahead, "compile_whole", compile_whole)
    look_ahead._compiled.cache_clear()
    one = compared(operation, [COMPILED])
    one.check()
    look_ahead._compiled.cache_clear()
    assert one.gaps == {} and set(one._errors) == {(COMPILED, FORWARD), (COMPILED, TRAINING)} and modes == [None]


Change = Callable[[tuple[Any, ...]], tuple[Any, ...]]
CHANGES: dict[str, tuple[Change, str | None, str]] = {
    "value": (lambda y: (1.001 * y[0], *y[1:]), "gate: error", "gate: error"),
    "log-sum-exp": (lambda y: (*y[:-1], y[-1] + 1e-3), "gate: error", "gate: error"),
    "one position": (
        lambda y: (y[0] + 2e-4 * torch.eye(31)[5].view(31, *[1] * (y[0].dim() - 2)), *y[1:]),
        "gate: ", "gate: ",
    ),
    "not a number": (lambda y: (y[0] * torch.nan, *y[1:]), "gate: error nan", "gate: error nan"),
    "gradient": (lambda y: (y[0] + 0.01 * (y[0] - y[0].detach()), *y[1:]), None, "gate: "),
    "no gradient": (lambda y: tuple(part.detach() for part in y), None, "RuntimeError"),
    "part of it": (lambda y: (y[0][:, 1:], *y[1:]), "gate: expected shape", "gate: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_red_gate_yields_no_number(operation: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, (alter, forward, training) = REGISTRY[operation][OURS], CHANGES[change]

    def build(one: LookAheadProblem) -> Form:
        form = right.build(one)
        return Form(lambda: alter(form.call()), form.leaves)  # type: ignore[arg-type]

    monkeypatch.setitem(REGISTRY[operation], "made-up", replace(right, name="made-up", build=build))
    one = compared(operation, ["made-up"])
    one.check()
    for row, direction in zip([*one.time(), *one.memory()], (FORWARD, TRAINING) * 2, strict=True):
        expected = forward if direction == FORWARD else training
        assert row["direction"] == direction
        if expected is None:
            assert "gap" not in row
        else:
            assert row["gap"].startswith(expected), row
            assert not {"median", "ratio", "share", "peak_bytes", "saved_bytes"} & set(row)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", ["position", "mask", "merge"])
def test_a_fault_in_the_literal_form_is_found(operation: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, memory = literal._scores, literal._memory_rows

    def beside(q: Any, k: Any, table: Any, bias: Any) -> Any:
        return scores(q, k, table.roll(1, 1), bias)

    def unseen(q: Any, k: Any, v: Any, right: Any, bias: Any, output: Any, lse: Any) -> Any:
        # As if the segment's first token were not there for the newest row but one.
        out, total = memory(q, k, v, right, bias, output, lse)
        return torch.cat([out[:, :, :-2], out[:, :, -1:], out[:, :, -1:]], 2), total

    def forgetful(q: Any, k: Any, v: Any, right: Any, bias: Any, output: Any, lse: Any) -> Any:
        return memory(q, k, v, right, bias, output, torch.full_like(lse, -1e9))

    name, wrong = {
        "position": ("_scores", beside), "mask": ("_memory_rows", unseen), "merge": ("_memory_rows", forgetful)
    }[fault]  # fmt: skip
    monkeypatch.setattr(literal, name, wrong)
    one = compared(operation, [OURS, "literal"])
    one.check()
    assert {key[0] for key in one.gaps} == {"literal"} and len(one.gaps) == 2
    assert all(reason.startswith("gate: ") for reason in one.gaps.values())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [OURS, "literal", "looks back alone"])
def test_no_contender_is_its_own_oracle(operation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a form wrong in every dtype, its oracle would not be."""
    functions = {
        OURS: ("our_attention", "our_layer"),
        "literal": ("literal_attention", "literal_layer"),
        "looks back alone": ("attention_back", "layer_back"),
    }
    function = functions[name][operation == LAYER]
    right = getattr(look_ahead, function)
    monkeypatch.setattr(look_ahead, function, lambda one: (1.01 * right(one)[0], *right(one)[1:]))
    monkeypatch.setitem(REGISTRY, operation, look_ahead.registry()[operation])
    one = compared(operation, [name])
    one.check()
    assert len(one.gaps) == 2 and all(reason.startswith("gate: ") for reason in one.gaps.values())


def test_the_log_sum_exp_stays_wide() -> None:
    one, provider = problem(ATTENTION, dtype=torch.bfloat16), REGISTRY[ATTENTION][OURS]
    form = provider.build(one)
    assert value_error(provider, form, one, Expected()) < 0.01
    narrow = Form(lambda: tuple(y.bfloat16() for y in form.call()), form.leaves)
    with pytest.raises(AssertionError, match=r"expected a result in torch.float32, got torch.bfloat16"):
        value_error(provider, narrow, one, Expected())


def test_a_backend_that_cannot_serve_is_named() -> None:
    one = problem(LAYER)
    one.backend = "triton"
    providers = REGISTRY[LAYER]
    assert "need a CUDA device" in str(providers[OURS].missing(one))
    assert "need a CUDA device" in str(providers["looks back alone"].missing(one))
    assert providers["literal"].missing(one) is None


# Counts


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens, memory", [(64, 64), (128, 128), (128, 512)])
def test_flops_are_those_that_torch_counts(tokens: int, memory: int) -> None:
    shape = LookAheadShape("", 1, tokens, memory, 24, 2, 8, 40)
    batch, inner, keys, window = shape.batch, shape.inner, shape.keys, min(tokens, memory)
    # Of the literal form (section 9).
    core = 6 * batch * inner * tokens * keys + 2 * batch * inner * memory * (2 * window + memory)
    projections = 8 * batch * keys * 24 * inner + 2 * (keys + memory) * 24 * inner
    feedforward = 4 * batch * keys * 24 * 40
    assert counted(lambda: look_ahead.literal_attention(problem(ATTENTION, shape))) == (
        core + counted(lambda: problem(ATTENTION, shape))
    )
    one = problem(LAYER, shape)
    assert counted(lambda: look_ahead.literal_layer(one)) == core + projections + feedforward
    # Our floors leave out the second table of distances, and in the core what no row sees.
    ours = {stage: shape.flops(stage) for stage in ("project", "attend", "out", "feedforward")}
    assert ours["project"] + ours["out"] == projections - 2 * memory * 24 * inner
    assert ours["feedforward"] == feedforward and ours["attend"] < core
    assert all(shape.flops(stage, "backward") == 2 * found for stage, found in ours.items())


@pytest.mark.parametrize("tokens, memory", [*itertools.product((1, 2, 5), (1, 2, 5, 11))])
def test_pairs_are_those_of_the_masks(tokens: int, memory: int) -> None:
    behind = sum(1 for i in range(memory, memory + tokens) for _ in range(i + 1))
    ahead = sum(1 for i in range(memory) for _ in range(max(i + 1, memory - tokens + 1), memory + 1))
    assert LookAheadShape("", 1, tokens, memory, 8, 1, 8, 8).pairs == behind + ahead


def test_counts_of_the_definition() -> None:
    """The table of section 9, whose projections have the distances ahead twice."""
    for shape, core, projections, feedforward in zip(
        GPU_SHAPES, (32.2, 3.6, 129), (43.8, 13.1, 110), (85.9, 33.1, 215), strict=True
    ):
        twice = 2 * shape.memory * shape.embedding * shape.inner
        found = shape.flops("attend"), shape.flops("project") + shape.flops("out") + twice, shape.flops("feedforward")
        assert found == pytest.approx((1e9 * core, 1e9 * projections, 1e9 * feedforward), rel=0.015)
    # q, k, v, out, what the memory begins with, r and the log-sum-exps.
    assert [round(shape.moved_bytes("attend", "forward", 2) / 1e6) for shape in GPU_SHAPES] == [96, 36, 257]


def test_bytes_are_those_of_the_tensors() -> None:
    """Forward once, backward once more with the gradients; what the memory begins with is not read again."""
    one = problem(ATTENTION)
    given = [one.q, one.kv, one.bias, one.table]
    out, lse = look_ahead.our_attention(one)
    size = sum(tensor.nbytes for tensor in given)
    shape = one.shape
    assert shape.moved_bytes("attend", "forward", 4) == (
        size + one.output.nbytes + one.lse.nbytes + out.nbytes + lse.nbytes
    )
    assert shape.moved_bytes("attend", "backward", 4) == 2 * size + 2 * out.nbytes + lse.nbytes
    whole = problem(LAYER)
    weights = sum(weight.nbytes for weight in whole.weights.values())
    stages = ("project", "out", "feedforward")
    # A stage reads what the one before made; the feed-forward and the projection end with the norm's x.
    x, heads = whole.x.nbytes, one.q.nbytes
    between = 3 * heads + one.table.nbytes
    expected = x + whole.distances.nbytes + between + (x + heads) + x + x + x + weights
    assert sum(shape.moved_bytes(stage, "forward", 4) for stage in stages) == expected


def test_a_floor_is_the_longer_of_both_in_every_stage() -> None:
    ways = DIRECTIONS
    compute = sum(SHAPE.flops("attend", way) for way in ways)
    move = sum(SHAPE.moved_bytes("attend", way, 4) for way in ways)
    assert SHAPE.least_ms(ATTENTION, ways, 1.0, 1e30, 4) == pytest.approx(1e3 * compute)
    assert SHAPE.least_ms(ATTENTION, ways, 1e30, 1.0, 4) == pytest.approx(1e3 * move)
    layer = sum(SHAPE.flops(stage) for stage in ("project", "attend", "out", "feedforward"))
    assert SHAPE.least_ms(LAYER, ("forward",), 1.0, 1e30, 4) == pytest.approx(1e3 * layer)
