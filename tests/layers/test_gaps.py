"""Attention masks whose tokens stand apart: what the sequence without the gaps gives, with nothing read back (R7)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, Sequences, attend
from tests.support.variants import VARIANTS, defined

VALUE, GRADIENT = TOLERANCE[torch.float64]
PARTS = ("token", "nodes", "q", "v")
# A gap, two, only the ends, one token, none, no gap on either side, all of it.
ROWS = ["1110111101", "0110011100", "1000000001", "0000100000", "0000000000", "0001111111", "1111000000", "1111111111"]
MASK = torch.tensor([[int(bit) for bit in row] for row in ROWS])
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
BY_NAME = {variant.name: variant for variant in VARIANTS}


def random(*shape: int, **more) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **more)


@pytest.fixture(params=["looked at", "not looked at"])
def values(request, monkeypatch) -> str:
    """Whether gaps are looked for, as on a CPU, or not, as on a GPU and while compiling."""
    if request.param == "not looked at":
        monkeypatch.setattr("python_ref.sequences.concrete", lambda tensor: False)
    return request.param


def assert_same_row(got: MemoryState, row: int, alone: MemoryState) -> None:
    assert got.position[row] == alone.position[0]
    for name in PARTS:
        mine, theirs = getattr(got, name)[row], getattr(alone, name)[0]
        if name != "token":
            assert not mine[len(theirs) :].any()
            mine = mine[: len(theirs)]
        assert_close(name, mine, theirs, VALUE)


@variants
def test_rows_equal_those_without_the_gaps(variant, values):
    layer, x = variant.layer(), random(*MASK.shape, variant.embedding, requires_grad=True)
    weight = random(*x.shape)
    y, state = layer(x, attention_mask=MASK, return_state=True)
    assert not y[MASK == 0].any()
    apart = y.sum() * 0
    for row, is_token in enumerate(MASK.bool()):
        alone = x[row : row + 1, is_token]
        expected, end = layer(alone, return_state=True)
        assert_close("y", y[row : row + 1, is_token], expected, VALUE)
        assert_close("y by definition", y[row : row + 1, is_token], defined(layer, alone), VALUE)
        assert_same_row(state, row, end)
        apart = apart + (expected * weight[row, is_token]).sum() + end.nodes.sum() + end.q.sin().sum()
    together = (y * weight).sum() + state.nodes.sum() + state.q.sin().sum()
    names, leaves = zip(("x", x), *layer.named_parameters(), strict=True)
    got, wanted = (
        torch.autograd.grad(loss, leaves, materialize_grads=True, retain_graph=True) for loss in (together, apart)
    )
    assert_same_gradients(list(names), list(got), list(wanted), GRADIENT)
    assert not got[0][MASK == 0].any()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_what_a_gap_holds_reaches_nothing(filler, hooked, values):
    layer = LogarithmicMemory(8, 2, 2, dtype=torch.float64)
    if hooked:
        layer.sva.register_forward_hook(lambda *_: None)
    x, hidden = random(*MASK.shape, 8), (MASK == 0)[..., None]

    def run(filler: float) -> list[Tensor]:
        given = x.masked_fill(hidden, filler).requires_grad_()
        y, state = layer(given, attention_mask=MASK.bool(), return_state=True)
        upstream = torch.ones_like(y).masked_fill(hidden, filler)
        found = torch.autograd.grad(y, [given, *layer.parameters()], upstream, materialize_grads=True)
        return [y, state.nodes, state.token, *found]

    for got, expected in zip(run(filler), run(0.0), strict=True):
        assert torch.isfinite(got).all() and torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["linear", "expander_k1", "module"])
def test_chunks_with_gaps_go_on(kind, values):
    """In chunks of four, each with its part of the mask: rows come to stand at positions of their own."""
    layer, x = BY_NAME[kind].layer(), random(*MASK.shape, BY_NAME[kind].embedding)
    whole, end = layer(x, attention_mask=MASK, return_state=True)
    state, found = None, []
    for part, mask in zip(x.split(4, 1), MASK.split(4, 1), strict=True):
        y, state = layer(part, attention_mask=mask, state=state, return_state=True)
        found.append(y)
    assert_close("y", torch.cat(found, 1), whole, VALUE)
    assert torch.equal(state.position, MASK.sum(1)) and torch.equal(end.position, state.position)
    rows = end.nodes.shape[1]
    for name in PARTS:
        part = getattr(state, name)
        assert_close(name, part if name == "token" else part[:, :rows], getattr(end, name), VALUE)


def test_a_stream_in_a_layer_takes_gaps():
    layer = LogarithmicMixing(8, 2, 2, parallelize=False, dtype=torch.float64)
    x = random(*MASK.shape, 8)
    y = torch.cat(
        [layer(part, attention_mask=mask) for part, mask in zip(x.split(5, 1), MASK.split(5, 1), strict=True)], 1
    )
    layer.parallelize = True
    assert_close("y", y, layer(x, attention_mask=MASK), VALUE)


def test_compiled_for_any_length_and_any_mask():
    """One graph, whatever the mask; gaps, padding on either side and none."""
    torch.compiler.reset()
    layer, graphs = LogarithmicMemory(8, 2, 2, dtype=torch.float64), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, mask: layer(x, attention_mask=mask, return_state=True), backend=count, fullgraph=True, dynamic=True
    )
    for mask in (MASK, MASK[:, 1:].contiguous(), torch.ones(8, 10, dtype=torch.int64), MASK.flip(0)):
        x = random(*mask.shape, 8)
        y, state = compiled(x, mask)
        expected, end = layer(x, attention_mask=mask, return_state=True)
        assert_close("y", y, expected, VALUE)
        for name in PARTS:
            assert_close(name, getattr(state, name), getattr(end, name), VALUE)
    assert len(graphs) == 1


def test_rows_without_gaps_stay_where_they_are():
    """Where that is known: nothing is put in another order for padding alone."""
    assert Sequences.of(torch.zeros(8, 10, 1), attention_mask=MASK).order is not None
    for row in MASK[5:].split(1):
        assert Sequences.of(torch.zeros(1, 10, 1), attention_mask=row).order is None


def test_operations_take_rows_in_order_alone():
    x = torch.zeros(8, 10, 1)
    sequences = Sequences.of(x, attention_mask=MASK)
    with pytest.raises(ValueError, match=r"sequences.*in order.*order"):
        attend(torch.zeros(80, 3), torch.zeros(1, 81, 2), 1, sequences)
    out, _ = attend(torch.zeros(80, 3), torch.zeros(1, 81, 2), 1, sequences.in_order())
    assert out.shape == (80, 1)
    with pytest.raises(ValueError, match="attention_mask: expected one run of tokens per row, got a row with gaps"):
        Sequences.masked(MASK)


def test_the_order_is_a_stable_partition():
    order = Sequences.gapped(MASK).order
    place = torch.arange(80).view(8, 10)
    for row, is_token in enumerate(MASK.bool()):
        expected = torch.cat([place[row, is_token], place[row, ~is_token]])
        assert torch.equal(order.row.view(8, 10)[row], expected)
    assert torch.equal(order.row[order.place], torch.arange(80))
