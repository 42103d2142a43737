"""The efficient reference against the definition, for every kind of layer; its formulas against autograd."""

from __future__ import annotations

import pytest
import torch

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from bench.measure.footprint import saved_bytes
from lmn_kernels import LinearMerge, Sequences, attend, build_tree, why_not
from python_ref import definition
from python_ref.attention import tile_width
from python_ref.layout import Layout, level_count, make_layout, node_rows
from python_ref.tree import build_tree_with, merge_stacks
from tests.support.variants import VARIANTS, defined

LENGTHS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 70)


def gradients(y, leaves, cotangent):
    found = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_and_gradients(variant):
    layer = variant.layer()
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for length in LENGTHS if variant.name == "linear" else (1, 2, 5, 16, 37):
        x = torch.randn(2, length, variant.embedding, dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        cotangent = torch.randn_like(x)
        y, expected = layer(x), defined(layer, x)
        assert_close(f"y at L={length}", y.detach(), expected.detach(), TOLERANCE[torch.float64][0])
        got, want = gradients(y, leaves, cotangent), gradients(expected, leaves, cotangent)
        assert_same_gradients(names, got, want, TOLERANCE[torch.float64][1])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("reference", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *(pytest.param("cpp", dtype, marks=pytest.mark.ext) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_low_precision_against_float64(backend, dtype):
    if (reason := why_not(backend, "attend", "cpu", dtype)) is not None:
        pytest.skip(reason)
    for variant in [v for v in VARIANTS if "module" not in v.name and v.name != "function"]:
        layer = variant.layer(dtype, backend=backend)
        x = torch.randn(2, 45, variant.embedding, dtype=dtype, requires_grad=True)
        exact = variant.layer()
        exact.load_state_dict(layer.state_dict())
        x64 = x.detach().double().requires_grad_()
        y, expected = layer(x), defined(exact, x64)
        values, grads = TOLERANCE[dtype]
        assert y.dtype == dtype
        assert_close("y", y.detach(), expected.detach(), values)
        cotangent = torch.randn_like(x)
        names = ["x", *(name for name, _ in layer.named_parameters())]
        got = gradients(y, [x, *layer.parameters()], cotangent)
        want = gradients(expected, [x64, *exact.parameters()], cotangent.double())
        assert all(g.dtype == dtype for g in got)
        assert_same_gradients(names, got, want, grads)


def test_the_order_of_a_merge_matters():
    layer = VARIANTS[1].layer()
    x = torch.randn(1, 12, 12, dtype=torch.float64)
    swapped = VARIANTS[1].layer()
    swapped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        swapped.summarizer.weight.copy_(torch.cat(layer.summarizer.weight.chunk(2, 1)[::-1], 1))
        with pytest.raises(AssertionError, match="error"):
            assert_close("y", layer(x), defined(swapped, x), 1e-3)


def test_scores_of_ten_thousand_stay_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tokens, embedding = 40, 8
        sequences = Sequences.equal(1, tokens)
        rows = node_rows(sequences, 0)
        scale = 100.0
        token_qkv = (torch.randn(tokens, 3 * embedding) * scale).to(dtype).requires_grad_()
        node_qv = (torch.randn(1, rows, 2 * embedding) * scale).to(dtype).requires_grad_()
        out, lse = attend(token_qkv, node_qv, 2, sequences)
        out.float().sum().backward()
        assert lse.abs().max() > 1e4 / 4
        for value in (out, lse, token_qkv.grad, node_qv.grad):
            assert torch.isfinite(value).all()


def test_weights_of_zero_inputs_are_those_of_structure_not_of_value():
    """The original takes an exact zero for an empty slot; here a zero token counts like any other."""
    layer = VARIANTS[0].layer()
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    x[:, 3:6] = 0
    assert_close("y", layer(x).detach(), defined(layer, x).detach(), TOLERANCE[torch.float64][0])


@pytest.mark.parametrize("groups", ["per bank", "mixed", "scaled", "expanded"])
def test_in_place_and_out_of_place_trees_agree(groups):
    bank, size, lengths = 2, 6, torch.tensor([13, 0, 7, 20])
    expand = 1 if groups == "expanded" else 0
    if groups == "mixed":
        merge = LinearMerge(torch.randn(1, 1, 4 * size, 2 * size), torch.randn(1, 2 * size), None)
    elif groups == "scaled":
        merge = LinearMerge(torch.randn(2, 1, size, size), torch.randn(2, size), torch.randn(2, 2, size))
    else:
        merge = LinearMerge(torch.randn(2, 1 + expand, 2 * size, size), torch.randn(2, size), None)
    merge = LinearMerge(*(None if part is None else part.double() * 0.3 for part in merge))
    x = torch.randn(4 * 20, size, dtype=torch.float64)
    for sequences in (Sequences.equal(4, 20), Sequences.padded(4, 20, lengths)):
        layout = make_layout(sequences, expand, x.device)
        plain = build_tree_with(lambda a, b: merge_stacks(merge, a, b), x, bank, None, None, layout)
        fast = build_tree(x, merge, sequences)
        used = layout.unused_base
        assert_close("nodes", fast[:, :used], plain[:, :used], 1e-12)
        assert not fast[:, used:].any() and not plain[:, used:].any()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 63, 64, 65, 100])
def test_a_slot_is_the_last_complete_block(length):
    """Section 2, checked row by row: the slots of the layout name the nodes that the definition names."""
    x = torch.randn(2, length, 3, dtype=torch.float64)
    weight, bias = torch.randn(1, 6, 3, dtype=torch.float64) * 0.5, torch.randn(1, 1, 3, dtype=torch.float64)
    nodes = build_tree(x.flatten(0, 1), LinearMerge(weight[:, None], bias[:, 0], None), Sequences.equal(2, length))
    layout = Layout(Sequences.equal(2, length), 0, x.device)
    expected = definition.visible_nodes(x, definition.linear_merge(weight, bias), 1)
    for n in range(1, length + 1):
        row, exists = layout.slots(torch.arange(2), torch.full((2,), n), level_count(length))
        assert exists.sum() == 2 * level_count(n)
        for level, stack in enumerate(expected[n - 1], 1):
            assert_close("node", nodes[0, row[:, level - 1]], stack[:, 0, 0], 1e-12)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[9]], ids=str)
def test_lean_keeps_less_and_gives_the_same(variant):
    plain, lean = variant.layer(), variant.layer(lean=True)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 500, variant.embedding, dtype=torch.float64, requires_grad=True)
    for layers in (plain, lean):
        y, state = layers(x, return_state=True)
        loss = y.square().sum() + state.q.sum()
        layers.found = torch.autograd.grad(loss, [x, *layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain.found, lean.found, strict=True))
    assert saved_bytes(lambda: lean(x)) < 0.6 * saved_bytes(lambda: plain(x))


def test_a_tile_never_gathers_more_than_a_row_a_position():
    for levels in range(64):
        width = tile_width(levels)
        assert width & (width - 1) == 0
        assert max(0, levels - (width.bit_length() - 1) + 1) <= width


def test_nothing_breaks_on_one_sequence_of_every_small_length():
    layer = VARIANTS[1].layer()
    x = torch.randn(1, 20, 12, dtype=torch.float64)
    full = layer(x)
    for length in range(1, 20):
        assert_close(f"L={length}", layer(x[:, :length]).detach(), full[:, :length].detach(), 1e-12)
