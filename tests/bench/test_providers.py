"""Contenders: each agrees with an oracle of its own before it gives a number, or is a named gap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from bench.close import TOLERANCE, assert_close
from bench.contenders import flex, linear_attention, node_level, providers, recurrent
from bench.contenders.problems import OPERATIONS, Problem
from bench.contenders.providers import REGISTRY, compare
from bench.contenders.shapes import Shape, moved_bytes
from bench.measure import comparison
from bench.measure.comparison import EAGER, GRAPH, Comparison, Limits
from bench.measure.contender import OURS, Form
from bench.measure.footprint import peak_bytes, saved_bytes
from bench.measure.gate import BACKWARD, FORWARD, TRAINING, direction_work
from bench.measure.runner import Context
from bench.runs import kernels

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 45, 16, 2, 2)
COMPILED = ("materialised, compiled", "FlexAttention")
LIMITS = Limits(seconds=60, budget=0, least=2)
HERE = Context(CPU, torch.float32, "reference", True, Path(), Path(), {})


def compared(operation: str, names, shape: Shape = SHAPE, limits: Limits = LIMITS, **more) -> Comparison:
    return compare(HERE, operation, shape, names, (FORWARD, TRAINING), limits, **more)


@pytest.fixture(autouse=True)
def _cheap():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_contender_is_right_or_a_named_gap(operation):
    one = compared(operation, [name for name in REGISTRY[operation] if name not in COMPILED])
    one.check()
    rows = one.time()
    assert len(rows) == 2 * len(one.providers)
    for row in rows:
        elsewhere = row["provider"] in {"sdpa-cudnn", "materialised, autotuned", *linear_attention.KINDS}
        assert ("gap" in row) == elsewhere, row
        if elsewhere:
            assert "GPU" in row["gap"] or "not installed" in row["gap"]
            assert not {"median", "ratio", "share", "error"} & set(row)
        else:
            assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["error"] <= row["tolerance"]
            assert row["copy_gbs"] > 0 and row["matrix_gflops"] > 0
            assert ("ratio" in row) == (row["provider"] != OURS)
    assert {row["shape"]["length"] for row in rows} == {45}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_contenders(name):
    one = compared("layer", [OURS, name])
    one.check()
    rows = {(row["provider"], row["direction"]): row for row in one.time()}
    assert "median" in rows[name, FORWARD]
    if name == "FlexAttention":
        assert "backward on a CPU" in rows[name, TRAINING]["gap"]
    else:
        assert "median" in rows[name, TRAINING]


@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 1, 1), (2, 127, 8, 2, 1), (3, 128, 8, 1, 2), (1, 129, 8, 2, 3), (2, 300, 8, 1, 1)]
)
def test_the_hand_made_block_mask(shape, monkeypatch):
    """FlexAttention uncompiled, at lengths around its block."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    problem = Problem("attention", Shape("", *shape), torch.float32, CPU, "reference")
    provider = REGISTRY["attention"]["FlexAttention"]
    with torch.no_grad():
        got = provider.build(problem).call()
        assert_close("out", got, provider.oracle(problem.exact(), None), TOLERANCE[torch.float32][0])


def test_the_block_mask_leaves_out_what_no_position_reads():
    problem = Problem("attention", Shape("", 1, 4096, 8, 1, 1), torch.float32, CPU, "reference")
    mask = flex.slots(problem).mask
    # Two blocks of tokens and low nodes, one on either edge, and one for each of the high levels at most.
    assert int(mask.kv_num_blocks.max()) <= 4 + 12 and mask.kv_num_blocks.shape[-1] == 32


def wrong_value(problem: Problem) -> Form:
    return Form(lambda: providers.our_layer(problem) * 1.001, problem.leaves())


def not_a_number(problem: Problem) -> Form:
    return Form(lambda: providers.our_layer(problem) * torch.nan, problem.leaves())


def one_wrong_position(problem: Problem) -> Form:
    def call():
        y = providers.our_layer(problem)
        # Too little for all positions together to show it.
        return y + 8e-6 * torch.nn.functional.one_hot(torch.tensor(7), 45)[:, None]

    return Form(call, problem.leaves())


def shifted(problem: Problem) -> Form:
    """Right in every gradient."""
    return Form(lambda: providers.our_layer(problem) + 1, problem.leaves())


def wrong_gradient(problem: Problem) -> Form:
    def call():
        y = providers.our_layer(problem)
        return y + 0.01 * (problem.x - problem.x.detach())

    return Form(call, problem.leaves())


def raising(problem: Problem) -> Form:
    raise RuntimeError("no kernel\nmore lines")


@pytest.mark.parametrize("build, forward, training", [
    (wrong_value, "gate: error", "gate: error"),
    (not_a_number, "gate: error nan", "gate: error nan"),
    (one_wrong_position, "gate: one position", "gate: one position"),
    (shifted, "gate: error", "gate: error"),
    (wrong_gradient, None, "gate: x: error"),
    (raising, "RuntimeError: no kernel", "RuntimeError: no kernel"),
])  # fmt: skip
def test_a_red_gate_yields_no_number(build, forward, training, monkeypatch):
    right = REGISTRY["layer"][OURS]
    monkeypatch.setitem(REGISTRY["layer"], "made-up", replace(right, name="made-up", build=build))
    one = compared("layer", [OURS, "made-up"])
    one.check()
    timed = {(row["provider"], row["direction"]): row for row in one.time()}
    held = {(row["provider"], row["direction"]): row for row in one.memory()}
    for direction, expected in ((FORWARD, forward), (TRAINING, training)):
        for rows, number in ((timed, "median"), (held, "peak_bytes")):
            row = rows["made-up", direction]
            if expected is None:
                assert number in row
            else:
                assert row["gap"].startswith(expected) and number not in row and "ratio" not in row
            assert number in rows[OURS, direction]


def test_a_fault_of_ours_is_no_gap(monkeypatch):
    monkeypatch.setitem(REGISTRY["layer"], OURS, replace(REGISTRY["layer"][OURS], build=raising))
    with pytest.raises(RuntimeError, match="no kernel"):
        compared("layer", [OURS]).check()


def test_a_peer_that_fails_at_full_size_is_a_gap(monkeypatch):
    """Checks of long shapes are of shorter ones: what fails later must not end the run."""
    right = REGISTRY["layer"][OURS]

    def build(problem: Problem) -> Form:
        if problem.shape.length > 16 and problem.x.dtype == torch.float32:
            return Form(lambda: 1 / 0 if torch.is_grad_enabled() else providers.our_layer(problem), problem.leaves())
        return right.build(problem)

    monkeypatch.setitem(REGISTRY["layer"], "made-up", replace(right, name="made-up", build=build))
    monkeypatch.setattr(comparison, "CHECKED_TOKENS", 32)
    monkeypatch.setattr(comparison, "CUT", 16)
    monkeypatch.setattr(Comparison, "_too_slow", lambda self, provider, direction: None)
    one = compared("layer", [OURS, "made-up"])
    one.check()
    rows = {(row["provider"], row["direction"]): row for row in one.time()}
    assert "median" in rows["made-up", FORWARD] and rows[OURS, TRAINING]["checked_length"] == 16
    assert rows["made-up", TRAINING]["gap"].startswith("ZeroDivisionError")
    held = {(row["provider"], row["direction"]): row for row in compared_again(one).memory()}
    assert held["made-up", TRAINING]["gap"].startswith("ZeroDivisionError")


def compared_again(one: Comparison) -> Comparison:
    again = replace(one, gaps={})
    again.check()
    return again


@pytest.mark.parametrize("operation", OPERATIONS)
def test_oracles_go_another_way(operation, monkeypatch):
    """Were our own path wrong in every dtype, its oracle would not be."""
    whole = getattr(providers, f"our_{operation}")

    def wrong(problem: Problem):
        outputs = whole(problem)
        return tuple(1.01 * y for y in outputs) if isinstance(outputs, tuple) else 1.01 * outputs

    monkeypatch.setattr(providers, f"our_{operation}", wrong)
    fresh = providers._registry()[operation]
    monkeypatch.setitem(REGISTRY, operation, fresh)
    one = compared(operation, [OURS])
    one.check()
    assert all(row["gap"].startswith("gate:") for row in one.time())


@pytest.mark.parametrize(
    "operation, name, function",
    [("layer", "materialised", "materialized_layer"), ("tree", "materialised memory", "materialized_memory")],
)
def test_no_contender_is_its_own_oracle(operation, name, function, monkeypatch):
    right = getattr(providers, function)
    monkeypatch.setattr(providers, function, lambda problem: 1.01 * right(problem))
    monkeypatch.setitem(REGISTRY, operation, providers._registry()[operation])
    one = compared(operation, [name])
    one.check()
    assert all(row["gap"].startswith("gate:") for row in one.time())


def test_bytes_of_weights_by_dtype():
    shape = Shape("", 1, 8, 16, 2, 1)
    # Read and written in four bytes each.
    assert moved_bytes(shape, "out", "backward", 4) - 4 * 4 * 8 * 16 == 2 * 4 * 16**2
    assert moved_bytes(shape, "out", "backward", 2) - 4 * 2 * 8 * 16 == 3 * 2 * 16**2


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(comparison, "CHECKED_TOKENS", 32)
    monkeypatch.setattr(comparison, "CUT", 16)
    one = compared("layer", [OURS, "sdpa-math"], limits=replace(LIMITS, seconds=1e-9))
    one.check()
    # Ours is measured however long it takes.
    assert ["would take about" in row.get("gap", "") for row in one.time()] == [False, True] * 2
    one = compared("layer", [OURS, "sdpa-math"])
    one.check()
    # Of the long shape, 16 positions of which are compared.
    assert all("median" in row for row in one.time())


def test_what_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(comparison, "free_bytes", lambda device: 1e4)
    one = compared("layer", [OURS, "materialised", "sdpa-math"])
    one.check()
    assert ["gap" in row for row in one.time()] == [False, True, True] * 2


def test_a_result_in_another_dtype_is_wrong(monkeypatch):
    def build(problem: Problem) -> Form:
        return Form(lambda: providers.our_layer(problem).double(), problem.leaves())

    monkeypatch.setitem(REGISTRY["layer"], "made-up", replace(REGISTRY["layer"][OURS], name="made-up", build=build))
    one = compared("layer", [OURS, "made-up"])
    one.check()
    assert "expected a result in torch.float32" in next(r["gap"] for r in one.time() if r["provider"] == "made-up")


def test_the_peak_of_what_is_allocated():
    def work():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        return second, third

    assert peak_bytes(work, CPU) == 3 << 20


def test_what_is_kept_for_backward():
    x, weight = torch.randn(64, 32, requires_grad=True), nn.Parameter(torch.randn(32, 16))
    # The product keeps x and the parameter, of which the latter is there anyway; exp keeps its result.
    assert saved_bytes(lambda: (x @ weight).exp()) == 4 * (64 * 32 + 64 * 16)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_definitions(kind):
    torch.manual_seed(0)
    module, x = kind(8, 8, batch_first=True).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close("out", module(x)[0], recurrent.definition(module, x), 1e-12)


def test_gated_linear_attention_is_decayed_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 4, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(2, 7, 3, dtype=torch.float64)
    total = g.cumsum(1).transpose(1, 2)
    decay = torch.exp(total[..., :, None] - total[..., None, :]).tril()
    expected = torch.einsum("bthk,bshk,bhts,bshv->bthv", q, k, decay, v) * 4**-0.5
    assert_close("one gate", linear_attention.gated(q, k, v, g, g), expected, 1e-12)
    per_key = linear_attention.gated(q, k, v, g[..., None].expand(-1, -1, -1, 4), g)
    assert_close("a gate a key", per_key, expected, 1e-12)


def test_log_linear_attention_scales_by_level():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 11, 1, 4, dtype=torch.float64) for _ in range(2))
    v, g = torch.randn(1, 11, 3, 4, dtype=torch.float64), -torch.rand(1, 11, 3, dtype=torch.float64)
    ones = torch.ones(1, 11, 3, 5, dtype=torch.float64)
    plain = linear_attention.gated(q.expand(-1, -1, 3, -1), k.expand(-1, -1, 3, -1), v, g, g)
    assert_close("all levels alike", linear_attention.log_linear(q, k, v, g, ones) * 4**-0.5, plain, 1e-12)
    own = torch.zeros_like(ones)
    own[..., 0] = 1
    expected = (q * k).sum(-1, keepdim=True) * v
    assert_close("the token itself", linear_attention.log_linear(q, k, v, g, own), expected, 1e-12)
    # Position 6 (110 in binary) reads 4 and 5 at level 2 and 0 to 3 at level 3.
    second = torch.zeros_like(ones)
    second[..., 2] = 1
    changed = v.clone()
    changed[:, :4] = 0
    changed[:, 6:] = 0
    full, part = (linear_attention.log_linear(q, k, value, g, second) for value in (v, changed))
    assert_close("level 2", full[:, 6], part[:, 6], 1e-12)
    assert full[:, 6].abs().max() > 0.01


def test_the_gated_delta_rule_overwrites():
    """With orthogonal keys, no decay and β = 1, a query returns the newest value under its key."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2]][None, :, None]
    v = torch.randn(1, 4, 1, 5, dtype=torch.float64)
    q = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1]][None, :, None]
    zero, one = torch.zeros(1, 4, 1, dtype=torch.float64), torch.ones(1, 4, 1, 1, dtype=torch.float64)
    out = linear_attention.gated_delta(q, k, v, zero, one) * 2
    assert_close("out", out[0, :, 0], v[0, [0, 0, 2, 1], 0], 1e-5)


@pytest.mark.parametrize("name", linear_attention.KINDS)
def test_layers_of_linear_attention_literally(name):
    """All that can be run of them without a GPU: their definition, and that all of x reaches the output."""
    layer = linear_attention.Layer(linear_attention.KINDS[name], 128).double()
    x = torch.randn(1, 12, 128, dtype=torch.float64, requires_grad=True)
    y = layer(x, literally=True)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y[0, -1].sum(), x)
    assert (grad[0].abs().amax(-1) > 0).all()


def test_node_level_tree_has_our_rows():
    problem = Problem("tree", SHAPE, torch.float64, CPU, "reference")
    ours, theirs = providers.our_tree(problem), node_level.tree(problem)
    rows = problem.layout.unused_base
    assert ours.shape == theirs.shape
    assert_close("nodes", theirs[:, :rows], ours[:, :rows], 1e-12)


def test_floors_of_the_two_passes_add_up():
    ways = (FORWARD, BACKWARD, TRAINING)
    one = compare(HERE, "attention", SHAPE, [OURS, "node-level"], ways, LIMITS)
    one.check()
    rows = {(row["provider"], row["direction"]): row for row in one.time()}
    assert set(rows) == {(name, way) for name in (OURS, "node-level") for way in ways}
    assert all("mode" not in row and row["error"] <= row["tolerance"] for row in rows.values())
    floors = [rows[OURS, way]["floor_ms"] for way in ways]
    assert 0 < floors[0] < floors[1] < floors[2] and floors[0] + floors[1] == pytest.approx(floors[2], rel=1e-3)


@pytest.mark.parametrize("mode, calls", [(None, 1), (EAGER, 2), (GRAPH, 2)])
def test_launches_in_a_row_are_counted_as_such(mode, calls, monkeypatch):
    graphed, seen = [], []
    monkeypatch.setattr(comparison.timing, "graphed", lambda work, device: graphed.append(work) or work)
    turns = comparison.take_turns
    monkeypatch.setattr(comparison, "take_turns", lambda *given, **more: seen.append(given[3]) or turns(*given, **more))
    one = compare(HERE, "output", SHAPE, [OURS], (FORWARD, TRAINING), LIMITS, mode)
    one.check()
    rows = one.time()
    assert [row.get("mode") for row in rows] == [mode] * 2 and seen == [calls] * 2
    assert len(graphed) == (2 if mode == GRAPH else 0)


def test_a_backward_pass_is_that_of_the_call_before_it():
    problem = Problem("attention", SHAPE, torch.float32, CPU, "reference")
    provider, calls = REGISTRY["attention"][OURS], []
    form = provider.build(problem)
    counted = Form(lambda: calls.append(1) or form.call(), form.leaves)
    backward, training = (direction_work(counted, way, problem, provider) for way in (BACKWARD, TRAINING))
    alone = [backward() for _ in range(3)]
    assert len(calls) == 1
    for got, expected in zip(alone[2], training(), strict=True):
        assert_close("gradient", got, expected, 1e-6)
    assert len(calls) == 2


def test_groups_of_a_gpu_hold_every_contender_once(tmp_path):
    context = replace(HERE, device=torch.device("cuda"), quick=False, options={"operations": OPERATIONS})
    names = [case.name for case in kernels.cases(context)]
    assert len(set(names)) == len(names) and {"layer/C/main", "layer/P/main/graph", "tree/D/main"} <= set(names)
    for operation, found in REGISTRY.items():
        if operation in OPERATIONS:
            groups = {kernels.group_of(name) for name in found if name != OURS}
            assert groups <= set(kernels.GROUPS)
            assert {name.split("/")[2] for name in names if name.startswith(f"{operation}/C/")} == groups | {"main"}
