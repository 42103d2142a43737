"""Nothing of size B·L·log L·E exists, forward or backward; what is kept grows with L, a state with log n (R25)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from bench.contenders import materialized
from bench.measure.footprint import saved_bytes
from lmn_kernels import LogarithmicMixing
from python_ref import attention as ref_attention
from python_ref import tree as ref_tree
from python_ref.layout import Layout
from python_ref.sequences import Sequences
from tests.support.variants import VARIANTS, defined


@pytest.fixture(autouse=True)
def _cheap():
    """The subject is size, not content: filling large tensors with NaN adds nothing to it."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements of its storage, so that a view counts in full."""

    def __init__(self):
        super().__init__()
        self.elements, self.by, self.calls = 0, "nothing", 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.by = elements, str(function)
        return result


def run_all(batch: int, length: int, embedding: int, heads: int, bank: int, ragged: bool = False) -> Largest:
    """Tree, projections and attention, and their gradients, under `Largest`.

    A mode does not see inside an operation of a library (`test_the_mode_would_be_blind_in_the_layer`), so
    the functions behind the operations are called by name.
    """
    tokens = batch * length
    x = torch.randn(tokens, embedding)
    weight, bias = torch.randn(bank, 1, 2 * embedding, embedding) * embedding**-0.5, torch.randn(bank, embedding)
    merge = ref_tree.LinearMerge(weight, bias, None)
    q, k, v = (torch.randn(embedding, embedding) * embedding**-0.5 for _ in range(3))
    spans = None
    if ragged:
        start = torch.arange(batch) * length
        spans = torch.stack([start, torch.full_like(start, length - 1), torch.zeros_like(start)], 1)
    with Largest() as mode:
        layout = Layout(Sequences(tokens, batch, length, spans), 0, x.device)
        nodes = ref_tree.build_tree(x, merge, bank, None, None, layout)
        token_qkv, node_qv = x @ torch.cat([q, k, v], 1), nodes @ torch.cat([q, v], 1)
        out, lse = ref_attention.attend(token_qkv, node_qv, heads, layout)
        grad = torch.ones(()).expand(out.shape)
        grad_qkv, grad_qv = backward_of_attend(grad, token_qkv, node_qv, out, lse, heads, layout)
        grad_nodes = grad_qv @ torch.cat([q, v], 1).T
        ref_tree.build_tree_backward(grad_nodes, x, nodes, merge, None, layout)
    assert torch.isfinite(out).all() and torch.isfinite(grad_qkv).all()
    return mode


def backward_of_attend(grad, token_qkv, node_qv, out, lse, heads, layout):
    return ref_attention.attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout)


def test_the_mode_sees_what_a_materialised_tensor_would_be():
    """The check must be able to fail: the materialising form does reach the size that is forbidden."""
    batch, length, embedding, heads, bank = 1, 512, 32, 4, 1
    layer = LogarithmicMixing(embedding, heads, bank)
    x, summarizer, weights = torch.randn(1, length, embedding), layer.summarizer, dict(layer.sva.named_parameters())
    with Largest() as mode, torch.no_grad():
        materialized.mix(x, summarizer.weight, summarizer.bias, weights, heads)
    assert mode.elements >= batch * length * math.log2(length) * embedding / 2


def test_the_mode_would_be_blind_in_the_layer():
    """Why `run_all` calls functions: inside an operation of a library the mode sees one call and no more."""
    layer, x = LogarithmicMixing(32, 4, 1), torch.randn(1, 512, 32)
    with Largest() as mode, torch.no_grad():
        layer(x)
    assert 0 < mode.calls < 60
    assert run_all(1, 512, 32, 4, 1).calls > 150


@pytest.mark.parametrize("bank", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_nothing_of_length_times_log_length(bank, ragged):
    batch, length, embedding, heads = 1, 4096, 32, 4
    mode = run_all(batch, length, embedding, heads, bank, ragged)
    forbidden = batch * length * math.log2(length) * embedding / 2
    assert mode.elements < forbidden, f"{mode.by} made {mode.elements} elements, {forbidden:g} are forbidden"


@pytest.mark.parametrize(("bank", "ragged"), [(1, False), (2, False), (2, True)])
def test_the_largest_tensor_is_linear_in_tokens(monkeypatch, bank, ragged):
    """At most ``max(3, 2·m)·(M+1)·E`` elements: q, k and v of the tokens (or their gradients, with one row to
    spare), or q and v of the nodes. A block of attention stays under its own bound, whatever the length: made
    smaller than all else here, so that no log L can hide in it.
    """
    embedding, heads, block = 16, 2, 1 << 16
    monkeypatch.setattr(ref_attention, "BLOCK_ELEMENTS", block)
    for length in (4096, 16384):
        mode = run_all(2, length // 2, embedding, heads, bank, ragged)
        bound = max(3, 2 * bank) * (length + 1) * embedding
        assert block < bound and mode.elements <= bound, f"L={length}: {mode.by} made {mode.elements}, over {bound}"


def test_a_block_of_attention_is_bounded_at_its_own_size():
    """The size that ships: scores of all tokens at once would be half as large again as the bound."""
    length, embedding, heads, bank = 1 << 16, 16, 2, 2
    mode = run_all(1, length, embedding, heads, bank)
    assert mode.elements <= 2 * bank * (length + 1) * embedding, mode.by


@pytest.mark.parametrize("expand", [1, 2])
def test_an_expander_stays_linear_in_tokens(monkeypatch, expand):
    """Its nodes take up to (1+2k)·M rows."""
    embedding, heads = 8, 2
    monkeypatch.setattr(ref_attention, "BLOCK_ELEMENTS", 1 << 15)
    sizes = {}
    for length in (1024, 8192):
        x = torch.randn(length, embedding)
        weight = torch.randn(1, 1 + expand, 2 * embedding, embedding) * 0.1
        merge = ref_tree.LinearMerge(weight, torch.randn(1, embedding), None)
        with Largest() as mode:
            layout = Layout(Sequences.equal(1, length), expand, x.device)
            nodes = ref_tree.build_tree(x, merge, 1, None, None, layout)
            token_qkv, node_qv = torch.cat([x, x, x], 1), torch.cat([nodes, nodes], -1)
            out, lse = ref_attention.attend(token_qkv, node_qv, heads, layout)
            backward_of_attend(out, token_qkv, node_qv, out, lse, heads, layout)
            ref_tree.build_tree_backward(nodes, x, nodes, merge, None, layout)
        sizes[length] = mode.elements / (length * embedding)
    # Eight times the tokens: log L grows by 1.3, and (1+2k)·M is approached from below.
    assert sizes[8192] <= 1.1 * sizes[1024], sizes


def test_at_most_a_fifth_of_the_materialising_form_is_saved():
    length, embedding, heads, bank = 4096, 256, 4, 1
    layer = LogarithmicMixing(embedding, heads, bank)
    x = torch.randn(1, length, embedding, requires_grad=True)
    weights = dict(layer.sva.named_parameters())
    ours = saved_bytes(lambda: layer(x))
    theirs = saved_bytes(lambda: materialized.mix(x, layer.summarizer.weight, layer.summarizer.bias, weights, heads))
    assert ours * 5 <= theirs, f"{ours / 1e6:.1f} MB against {theirs / 1e6:.1f} MB"
    # x, the node, q, k and v of the token, q and v of the node, the output: eight rows a token; lse; the weights.
    assert ours <= 4 * (8 * length * embedding + length * heads + 9 * embedding * embedding)


@pytest.mark.parametrize("ragged", [False, True])
def test_what_is_saved_is_linear_in_length(ragged):
    layer = LogarithmicMixing(16, 2, 1)
    per_token = {}
    for length in (8192, 131072):
        x = torch.randn(1, length, 16, requires_grad=True)
        lengths = torch.tensor([length - 5]) if ragged else None
        per_token[length] = saved_bytes(lambda x=x, lengths=lengths: layer(x, lengths=lengths)) / length
    assert per_token[131072] == pytest.approx(per_token[8192], rel=0.05)


def test_saved_bytes_counts_every_storage_once():
    """The measure itself: a square keeps its input, a view of it keeps nothing more, a parameter is not counted."""
    x, w = torch.randn(10, 10, requires_grad=True), torch.nn.Parameter(torch.randn(10, 10))
    assert saved_bytes(lambda: x * x) == 400
    assert saved_bytes(lambda: (x * x) * x[:1]) == 800  # x, and the square
    assert saved_bytes(lambda: x @ w) == 400


@pytest.mark.parametrize("bank", [1, 3])
def test_a_state_is_logarithmic(bank):
    embedding = 8
    layer = LogarithmicMixing(embedding, 2, bank)
    level = 3 * bank * embedding * 4  # a node, its q and its v, in float32
    fixed = 8 + embedding * 4  # position and newest token
    for power in (0, 1, 5, 20, 40):
        assert layer.init_state(1, max_position=1 << power).nbytes == fixed + power * level
    for length in (1, 2, 3, 255, 256, 300):
        _, state = layer.prefill(torch.randn(1, length, embedding))
        assert state.nbytes == fixed + (length.bit_length() - 1) * level


def test_stepping_grows_a_state_at_powers_of_two_alone():
    layer = LogarithmicMixing(8, 2, 2)
    state, sizes = layer.init_state(1), []
    with torch.no_grad():
        for _ in range(70):
            _, state = layer.step(torch.randn(1, 1, 8), state)
            sizes.append(state.nbytes)
    grown = [n for n, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False), 2) if after != before]
    assert grown == [2, 4, 8, 16, 32, 64]


def test_the_baseline_of_every_ratio_computes_the_same():
    """A baseline that computed less, or something else, would make the ratios above worth nothing."""
    variant = VARIANTS[1]
    layer = variant.layer()
    weights = dict(layer.sva.named_parameters())
    for length in (1, 2, 7, 16, 37):
        x = torch.randn(2, length, variant.embedding, dtype=torch.float64, requires_grad=True)
        leaves, names = [x, *layer.parameters()], ["x", *(name for name, _ in layer.named_parameters())]
        got = materialized.mix(x, layer.summarizer.weight, layer.summarizer.bias, weights, layer.heads)
        expected = defined(layer, x)
        assert_close("y", got.detach(), expected.detach(), TOLERANCE[torch.float64][0])
        found = []
        for y in (got, expected):
            grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
            found.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)])
        assert_same_gradients(names, *found, TOLERANCE[torch.float64][1])
