"""The compiled parallel form on a CPU against the float64 reference, whatever the batch, the threads and the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMixing, Sequences
from lmn_kernels.backend import extension
from python_ref import attention as attention_reference
from python_ref import tree as tree_reference
from python_ref.layout import Layout, level_count
from python_ref.tree import LinearMerge
from tests.support.operands import FORMS, cast, merge_of, sequences_of
from tests.support.served import Served

if (REASON := extension.load()[1]) is not None:
    pytest.skip(REASON, allow_module_level=True)
from lmn_kernels._cpp import attention, tree  # noqa: E402
from lmn_kernels._cpp.rows import EXTENSION  # noqa: E402

pytestmark = pytest.mark.ext

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
GRADIENTS = ("grad_x", "grad_weight", "grad_bias", "grad_scale", "grad_token", "grad_carried")
# Around a lane, a vector of them, a chunk and two; packed batches begin with a document of three.
LENGTHS = (3, 4, 7, 8, 33, 63, 64, 65, 129, 300)


def continued(sequences: Sequences, positions: list[int]) -> Sequences:
    return sequences.after(torch.tensor(positions), max(positions), level_count(max(positions)))


# What the forms of `sequences_of` leave out: tokens, offsets beside and beyond a chunk, sequences of nothing.
BATCHES = {
    "one token": Sequences.equal(2, 1),
    "two tokens": Sequences.equal(3, 2),
    "none": Sequences.equal(2, 0),
    "no sequence": Sequences.packed(5, torch.tensor([0])),
    "left padded": Sequences.masked(torch.arange(90) >= torch.tensor([[0], [53], [90]])),
    "rows in another order": Sequences(9, 2, 5, torch.tensor([[5, 4, 0], [0, 4, 0]])),
    "before the first node": continued(Sequences.equal(3, 3), [0, 1, 2]),
    "up to an edge and from it": continued(Sequences.equal(4, 65), [62, 63, 64, 127]),
    "far": continued(Sequences.equal(2, 70), [1023, 5000]),
    "far and padded": continued(Sequences.padded(3, 60, torch.tensor([60, 0, 1])), [4096, 130, 255]),
}


def batches(longest: int) -> list[tuple[str, Sequences]]:
    forms = [(f"{form} {n}", sequences_of(form, n, CPU)) for form in FORMS for n in LENGTHS if n <= longest]
    return [*forms, *BATCHES.items()]


class Attention:
    """Operands of `attend`, its results and gradients by a module."""

    def __init__(self, sequences: Sequences, size: int, heads: int, bank: int, expand: int, dtype: torch.dtype = F32):
        self.heads, self.layout = heads, Layout(sequences, expand, CPU)
        shapes = (sequences.tokens, 3 * size), (bank, self.layout.rows, 2 * size), (sequences.tokens, size)
        self.tokens, self.nodes, self.grad = (torch.randn(shape).to(dtype) for shape in shapes)

    def run(self, module: Any = attention, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        tokens, nodes, grad = change(self.tokens), change(self.nodes), change(self.grad)
        out, lse = module.attend(tokens, nodes, self.heads, self.layout)
        return [out, lse, *module.attend_backward(grad, tokens, nodes, out, lse, self.heads, self.layout)]


class Tree:
    """Operands of `build_tree`, its result and gradients by a module; gradients at rows of nodes alone."""

    def __init__(self, sequences: Sequences, kind: str, size: int, bank: int, dtype: torch.dtype = F32):
        merge = merge_of(kind, size, bank, CPU)
        expand = merge.weight.shape[1] - 1
        layout = self.layout = Layout(sequences, expand, CPU)
        self.bank, self.merge, self.x = bank, cast(merge, dtype), torch.randn(sequences.tokens, size).to(dtype)
        self.token = self.carried = None
        if layout.carried_levels is not None:
            self.token = torch.randn(layout.sequences, size).to(dtype)
            self.carried = torch.randn(layout.sequences, layout.carry_rows, bank, size).to(dtype)
        self.is_node = torch.zeros(layout.rows, dtype=torch.bool)
        self.is_node[layout.carry_base : layout.null_row] = True
        for level in range(1, layout.levels + 1):
            count = int(layout.tables()[4][level, -1]) * layout.heights[level]
            self.is_node[layout.level_base[level] : layout.level_base[level] + count] = True
        self.grad = (torch.randn(bank, layout.rows, size) * self.is_node[:, None]).to(dtype)

    def run(self, module: Any = tree, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor | None]:
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        x, token, carried, grad = map(changed, (self.x, self.token, self.carried, self.grad))
        merge = LinearMerge(*map(changed, self.merge))  # type: ignore[arg-type]
        nodes = module.build_tree(x, merge, self.bank, token, carried, self.layout)
        return [nodes, *module.build_tree_backward(grad, x, nodes, merge, token, self.layout)]


def check_attention(call: Attention, dtype: torch.dtype) -> None:
    got, want = call.run(), call.run(attention_reference, lambda t: t.double())
    values, gradients = TOLERANCE[dtype]
    tolerances = values, TOLERANCE[F32][0], gradients, gradients
    assert [t.dtype for t in got] == [dtype, F32, dtype, dtype]
    for name, g, w, tolerance in zip(("out", "lse", "d_tokens", "d_nodes"), got, want, tolerances, strict=True):
        assert g.is_contiguous(), name
        assert_close(name, g, w, tolerance)


def check_tree(call: Tree, dtype: torch.dtype) -> None:
    (nodes, *got), (expected, *want) = call.run(), call.run(tree_reference, lambda t: t.double())
    values, gradients = TOLERANCE[dtype]
    assert nodes.dtype == dtype and not nodes[:, ~call.is_node].any()
    assert_close("nodes", nodes[:, call.is_node], expected[:, call.is_node], values)
    for name, g, w in zip(GRADIENTS, got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            assert g.dtype == dtype and g.is_contiguous(), name
            assert_close(name, g, w, gradients)


# Features and heads: whole vectors or not, of eight and of sixteen, a head of one feature and one of many.
ATTENTIONS = ((8, 2, 1, 0), (12, 3, 2, 0), (32, 2, 2, 0), (5, 5, 1, 0), (80, 1, 1, 0), (16, 2, 2, 1), (8, 1, 1, 2))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
def test_attention(sizes, dtype):
    for _, sequences in batches(65 if sizes[3] else 300):
        check_attention(Attention(sequences, *sizes, dtype), dtype)


@pytest.mark.parametrize("name", EXTENSION.instruction_sets())
def test_attention_of_every_instruction_set(name):
    """Of this processor, and of those that have less."""
    before = EXTENSION.use_instruction_set(name)
    try:
        for sizes in ((32, 2, 2, 0), (80, 1, 1, 0), (12, 3, 1, 0), (16, 1, 1, 1)):
            for form in FORMS:
                sequences = sequences_of(form, 150, CPU)
                check_attention(Attention(sequences, *sizes), F32)
                check_attention(Attention(sequences, *sizes, BF16), BF16)
    finally:
        assert EXTENSION.use_instruction_set(before) == name
    with pytest.raises(ValueError, match="set: expected one of base.*got mmx"):
        EXTENSION.use_instruction_set("mmx")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "mixed", "separable", "expander"])
def test_tree(kind, dtype):
    for _, sequences in batches(65 if kind == "expander" else 300):
        for size, bank in ((8, 2), (5, 1)):
            check_tree(Tree(sequences, kind, size, bank, dtype), dtype)


def test_a_product_of_several_blocks():
    """2,048 rows are a block: whole ones, and one that begins the last."""
    for form in ("equal", "odd"):
        check_tree(Tree(sequences_of(form, 4100, CPU), "linear", 8, 2), F32)
        check_tree(Tree(sequences_of(form, 4100, CPU), "separable", 4, 1), F32)


def calls() -> list[Attention | Tree]:
    found: list[Attention | Tree] = [Attention(sequences_of(form, 300, CPU), 12, 3, 2, 0) for form in FORMS]
    found += [Attention(Sequences.equal(1, 700), 32, 4, 1, 0), Attention(Sequences.equal(2, 70), 16, 2, 1, 1, BF16)]
    found += [Tree(sequences_of(form, 300, CPU), "linear", 12, 2) for form in FORMS]
    return [*found, Tree(Sequences.equal(1, 9000), "linear", 32, 2), Tree(Sequences.equal(2, 5000), "mixed", 8, 2)]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_number_of_threads_gives_the_same_bits():
    for call in calls():
        torch.set_num_threads(1)
        expected = call.run()
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert same(call.run(), expected), f"{type(call).__name__} of {call.layout.tokens} on {threads}"


def test_any_strides():
    def strided(tensor: Tensor) -> Tensor:
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)

    for call in calls()[:-2]:
        assert same(call.run(change=strided), call.run())


def test_padding_reaches_nothing_and_gets_nothing():
    sequences = Sequences.padded(3, 100, torch.tensor([100, 0, 37]))
    padding = ~sequences.is_token()
    call = Attention(sequences, 12, 2, 2, 0)
    expected = call.run()
    assert not expected[0][padding].any() and not expected[1][padding].any() and not expected[2][padding].any()
    call.tokens[padding] = call.grad[padding] = float("nan")
    call.nodes[:, ~Tree(sequences, "linear", 12, 2).is_node] = float("inf")
    assert same(call.run(), expected)
    call = Tree(sequences, "linear", 12, 2)
    expected = call.run()
    assert not expected[1][padding].any()
    call.x[padding] = float("nan")
    call.grad[:, ~call.is_node] = float("nan")
    assert same(call.run(), expected)


def test_a_token_that_is_not_a_number_reaches_those_that_see_it_alone():
    call = Attention(Sequences.equal(1, 100), 8, 2, 1, 0)
    expected = call.run()[0]
    call.tokens[70] = float("nan")
    changed = (call.run()[0] != expected).any(1)
    assert changed.nonzero().flatten().tolist() == [70]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_of_ten_thousand_stay_finite(dtype):
    call = Attention(Sequences.equal(1, 130), 8, 2, 1, 0, dtype)
    call.tokens, call.nodes = call.tokens * 100, call.nodes * 100
    found = call.run()
    assert found[1].abs().max() > 5e3 and all(torch.isfinite(t).all() for t in found)


def test_what_would_be_read_beyond_a_tensor_is_refused():
    def run(spans: list[list[int]], levels: int | None = None, longest: int = 8) -> list[Tensor]:
        given = Sequences(8, len(spans), longest, torch.tensor(spans), levels)
        return Attention(given, 8, 2, 1, 0).run()

    run([[0, 4, 0], [4, 4, 0]])
    for spans in ([[0, 9, 0]], [[5, 4, 0]], [[-1, 3, 0]], [[0, -1, 0]]):
        with pytest.raises(ValueError, match="spans: expected rows of 0 ... 7"):
            run(spans)
    for spans, levels in (([[0, 4, 2]], None), ([[0, 4, -1]], 3)):
        with pytest.raises(ValueError, match="spans: expected an offset"):
            run(spans, levels, 15)
    with pytest.raises(ValueError, match="spans: expected at most 4 rows of nodes of level 1, got 8"):
        run([[0, 8, 0], [0, 8, 0]])
    call = Attention(Sequences.equal(1, 8), 8, 2, 1, 0)
    for name, wrong in (("tokens", call.tokens[:7]), ("nodes", call.nodes[:, 1:])):
        bad = Attention(Sequences.equal(1, 8), 8, 2, 1, 0)
        setattr(bad, name, wrong)
        with pytest.raises(ValueError, match="expected shape"):
            bad.run()
    with pytest.raises(TypeError, match="token_qkv: expected dtype float32 or bfloat16"):
        call.run(change=lambda t: t.half())


@pytest.mark.parametrize("offset", [14, 40, 1 << 40])
def test_a_sequence_beyond_its_room_leaves_the_others_as_they_are(offset):
    """As a compiled stream may be, which reads no position: its nodes stand before those of the other one."""
    sequences = Sequences(8, 2, 15, torch.tensor([[0, 4, offset], [4, 4, 2]]), 3)
    call = Attention(sequences, 8, 2, 2, 0)
    other = Attention(replace(sequences, spans=torch.tensor([[0, 0, 0], [4, 4, 2]])), 8, 2, 2, 0)
    sequence, position = torch.ones(4, dtype=torch.int64), torch.arange(3, 7)
    mine, theirs = (c.layout.slots(sequence, position, 2)[0].flatten() for c in (call, other))
    other.tokens, other.nodes[:, theirs] = call.tokens, call.nodes[:, mine]
    found = call.run()
    assert all(torch.isfinite(t).all() for t in found)
    assert torch.equal(found[0][4:], other.run()[0][4:])
    for kind in ("linear", "expander"):
        assert all(torch.isfinite(t).all() for t in Tree(sequences, kind, 8, 1).run() if t is not None)


def test_a_layer_is_served_by_name_in_training_prefill_and_chunks():
    layer = LogarithmicMixing(8, 2, 2, backend="cpp", init="variance_preserving")
    x = torch.randn(2, 37, 8, requires_grad=True)
    with Served() as served:
        y, state = layer(x[:, :20], return_state=True)
        y = torch.cat([y, layer(x[:, 20:], state=state)], 1)
        y.square().sum().backward()
    served.check("cpp", "build_tree", "attend", "build_tree_backward", "attend_backward")
    twin = LogarithmicMixing(8, 2, 2, backend="reference").double()
    twin.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    twin(x64).square().sum().backward()
    assert_close("y", y.detach(), twin(x64).detach(), TOLERANCE[F32][0])
    assert_close("gradient of x", x.grad, x64.grad, TOLERANCE[F32][1])


def test_a_second_derivative_is_the_references():
    results = []
    for backend, dtype in (("cpp", F32), ("reference", torch.float64)):
        torch.manual_seed(1)
        layer = LogarithmicMixing(8, 2, 2, backend=backend, init="variance_preserving").to(dtype)
        x = torch.randn(1, 13, 8).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close("second derivative", *results, TOLERANCE[F32][1])
