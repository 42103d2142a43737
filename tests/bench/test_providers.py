"""Contenders: each agrees with an oracle of its own before it gives a number, or is a named gap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from bench.close import TOLERANCE, assert_close
from bench.contenders import flex, linear_attention, node_level, providers, recurrent
from bench.contenders.problems import OPERATIONS, Form, Problem
from bench.contenders.providers import OURS, REGISTRY, Provider
from bench.contenders.shapes import Shape, moved_bytes
from bench.contenders.streams import CachedAttention, RecomputedAttention
from bench.measure import comparison
from bench.measure.comparison import FORWARD, TRAINING, Comparison, Limits
from bench.measure.footprint import peak_bytes, saved_bytes
from bench.runs import decode, paper_fig9, scaling

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 45, 16, 2, 2)
COMPILED = ("materialised, compiled", "FlexAttention")
LIMITS = Limits(seconds=60, budget=0, least=2)


def compared(operation: str, names, shape: Shape = SHAPE, limits: Limits = LIMITS, **more) -> Comparison:
    both = (FORWARD, TRAINING)
    return Comparison(operation, shape, torch.float32, CPU, names, both, limits, True, "reference", **more)


@pytest.fixture(autouse=True)
def _cheap():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_contender_is_right_or_a_named_gap(operation):
    one = compared(operation, [name for name in REGISTRY[operation] if name not in COMPILED])
    one.check()
    rows = one.time()
    assert len(rows) == 2 * len(one.names)
    for row in rows:
        elsewhere = row["provider"] in {"sdpa-cudnn", *linear_attention.KINDS}
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
    names = {"tree": "our_tree", "projections": "our_projections", "attention": "our_attention", "layer": "our_layer"}
    whole = getattr(providers, names[operation])

    def wrong(problem: Problem):
        outputs = whole(problem)
        return tuple(1.01 * y for y in outputs) if isinstance(outputs, tuple) else 1.01 * outputs

    monkeypatch.setattr(providers, names[operation], wrong)
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


@pytest.mark.parametrize("fused", [False, True])
def test_streams_of_attention_are_causal_attention(fused):
    problem = Problem("layer", Shape("", 1, 20, 16, 2, 1), torch.float64, CPU, "reference")
    provider: Provider = REGISTRY["layer"]["sdpa-math"]
    expected = provider.oracle(problem, None)[0]
    with torch.no_grad():
        for stream in (CachedAttention(problem.layer, 20, fused), RecomputedAttention(problem.layer)):
            got = torch.cat([stream(token) for token in problem.x[0].split(1)])
            assert_close(type(stream).__name__, got, expected, 1e-12)


def test_rows_of_decoding():
    shape = Shape("tiny", 1, 1, 32, 2, 1)
    rows = {row["provider"]: row for row in decode.at_position(shape, torch.float32, 100, turns=2)}
    for name, row in rows.items():
        if "gap" in row:
            assert name.startswith(OURS) and ("C++" in row["gap"] or "extension" in row["gap"]), row
        else:
            assert row["unit"] == "us" and 0 < row["p20"] <= row["median"] <= row["p80"]
            assert row["typical"] <= row["p99"] and row["error"] <= row["tolerance"]
    assert {"reference", "ATen loop", "KV cache", "GRU", "LSTM"} <= set(rows)


def test_a_wrong_stream_is_a_gap(monkeypatch):
    monkeypatch.setattr(CachedAttention, "__call__", lambda self, x: x)
    rows = {row["provider"]: row for row in decode.at_position(Shape("", 1, 1, 32, 2, 1), torch.float32, 64, turns=2)}
    assert rows["KV cache"]["gap"].startswith("gate: error") and "median" not in rows["KV cache"]
    assert "median" in rows["GRU"]


def test_sequential_forms_of_figure_9(monkeypatch, tmp_path):
    context = a_context(tmp_path)
    rows = {row["provider"]: row for row in paper_fig9.sequential_rows(context, {}, 40)}
    assert set(rows) == {"ours", "attention", "attention, cached"}
    assert all(row["median"] > 0 and row["mode"] == "sequential" for row in rows.values())
    monkeypatch.setattr(paper_fig9, "QUICK_SECONDS", 0.0)
    given_up: dict[str, int] = {}
    assert all("of 40 tokens" in row["gap"] for row in paper_fig9.sequential_rows(context, given_up, 40))
    assert all("with 40 tokens" in row["gap"] for row in paper_fig9.sequential_rows(context, given_up, 80))


def test_a_wrong_form_of_figure_9_is_a_gap(monkeypatch, tmp_path):
    monkeypatch.setattr(RecomputedAttention, "__call__", lambda self, x: x)
    rows = {row["provider"]: row for row in paper_fig9.sequential_rows(a_context(tmp_path), {}, 40)}
    assert rows["attention"]["gap"].startswith("gate: error") and "median" not in rows["attention"]
    assert "median" in rows["ours"] and "ratio" in rows["attention, cached"]


def a_context(tmp_path):
    from bench.measure.runner import Context

    return Context(CPU, torch.float32, "reference", True, tmp_path, tmp_path, {})


def test_slopes_of_power_laws():
    def row(provider: str, length: int, power: float) -> dict:
        return {"provider": provider, "direction": FORWARD, "shape": {"length": length}, "median": length**power}

    lengths = [128, 8192, 16384, 32768]
    rows = [row(name, length, power) for name, power in (("ours", 1.0), ("sdpa", 2.0)) for length in lengths]
    rows += [row("short", 128, 1.0)]
    # Short lengths, where fixed costs dominate, have no say.
    rows[0]["median"] = 1e9
    found = {row["provider"]: row for row in scaling.slopes([*rows, {"provider": "x", "gap": "none"}])}
    assert found["ours"]["slope"] == 1.0 and found["sdpa"]["slope"] == 2.0
    assert found["short"]["slope"] is None
    assert (found["ours"]["from_length"], found["ours"]["to_length"]) == (8192, 32768)
