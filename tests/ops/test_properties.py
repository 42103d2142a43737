"""Any sizes, strides and dtypes against the definition; order, causality, autocast (R2, R6, R10, R12)."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients, error
from lmn_kernels import LinearMerge, LogarithmicMixing, Sequences, attend, build_tree
from python_ref import attention as ref_attention
from python_ref import step as ref_step
from tests.support.variants import VARIANTS, defined

F64 = torch.float64


common = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Case:
    """A layer and the shape of what it is given."""

    length: int
    batch: int
    heads: int
    head_size: int
    bank: int
    summarizer: str
    expand: int | None
    seed: int

    def layer(self, dtype: torch.dtype, **more) -> LogarithmicMixing:
        torch.manual_seed(self.seed)
        options = {"init": "variance_preserving", "summarizer": self.summarizer, "expand": self.expand} | more
        return LogarithmicMixing(self.embedding, self.heads, self.bank, dtype=dtype, **options)

    @property
    def embedding(self) -> int:
        return self.heads * self.head_size


@st.composite
def cases(draw, longest: int = 300, narrowest: int = 1) -> Case:
    expand = draw(st.sampled_from([None, None, 0, 1, 2]))
    # The edges of a level are where a block is complete or not; the definition is slow on tall stacks.
    cap = longest if not expand else 40 // expand
    edges = [n for power in range(9) for n in ((1 << power) - 1, 1 << power, (1 << power) + 1) if 1 <= n <= cap]
    return Case(
        length=draw(st.one_of(st.integers(1, cap), st.sampled_from(edges))),
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        head_size=draw(st.integers(narrowest, narrowest + 4)),
        bank=draw(st.integers(1, 3)),
        summarizer=draw(st.sampled_from(["linear", "conv", "conv_mixed", "depthwise_separable"])),
        expand=expand,
        seed=draw(st.integers(0, 1 << 16)),
    )


# From a contiguous tensor to one of the shape [B, L, E] whose memory lies elsewhere; applied inside the
# graph, so that the gradient of the contiguous tensor is what is compared.
def _batch_inside(base: Tensor) -> Tensor:
    return base.transpose(0, 1).contiguous().transpose(0, 1)


def _features_outside(base: Tensor) -> Tensor:
    return base.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def _part_of_a_fused_projection(base: Tensor) -> Tensor:
    """A slice with an offset from a tensor that is NaN around it, as q is a part of qkv."""
    size = base.shape[-1]
    return torch.nn.functional.pad(base, (size, size, 1, 2), value=float("nan"))[:, 1:-2, size : 2 * size]


def _every_other_feature(base: Tensor) -> Tensor:
    return torch.stack([base, torch.full_like(base, float("nan"))], -1).flatten(-2)[..., ::2]


def _one_row_for_all(base: Tensor) -> Tensor:
    return base[:1].expand_as(base)


def _one_token_for_all(base: Tensor) -> Tensor:
    return base[:, :1].expand_as(base)


FORMS = [
    torch.clone,
    _batch_inside,
    _features_outside,
    _part_of_a_fused_projection,
    _every_other_feature,
    _one_row_for_all,
    _one_token_for_all,
]


def transposed_weights(layer: LogarithmicMixing) -> None:
    """Every matrix of the layer with its last two axes swapped in memory, its values as they were."""
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)


def loss(y: Tensor, upstream: str, cotangent: Tensor) -> Tensor:
    """A scalar whose gradient with respect to y is laid out as ``upstream`` says."""
    if upstream == "sum":  # stride 0
        return y.sum()
    if upstream == "cat":  # a slice with an offset of a larger gradient
        return (torch.cat([y * 0.5, y, y], -1) * torch.cat([cotangent] * 3, -1)).sum()
    if upstream == "transposed":
        return (y.permute(2, 0, 1) * cotangent.permute(2, 0, 1).contiguous()).sum()
    return (y * cotangent).sum()


def gradients(y: Tensor, leaves: list[Tensor], upstream: str, cotangent: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss(y, upstream, cotangent), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def compare(case: Case, dtype: torch.dtype, form, upstream: str, strided_weights: bool) -> None:
    """Values and all gradients against the definition in float64 on the same rounded numbers."""
    layer = case.layer(dtype)
    exact = copy.deepcopy(layer).to(F64)
    if strided_weights:
        transposed_weights(layer)
    base = torch.randn(case.batch, case.length, case.embedding).to(dtype).requires_grad_()
    base64 = base.detach().to(F64).requires_grad_()
    cotangent = torch.randn(base.shape).to(dtype)
    names = ["x", *(name for name, _ in layer.named_parameters())]

    y = layer(form(base))
    expected = defined(exact, form(base64))
    values, grads = TOLERANCE[dtype]
    assert y.dtype == dtype and y.is_contiguous()
    assert_close("y", y.detach(), expected.detach(), values)
    got = gradients(y, [base, *layer.parameters()], upstream, cotangent)
    want = gradients(expected, [base64, *exact.parameters()], upstream, cotangent.to(F64))
    if dtype == F64:
        assert_same_gradients(names, got, want, grads)
        return
    # With few tokens a gradient is often a small difference of large terms, and nothing computed in that dtype
    # is within a tolerance relative to it: such a one may err as the definition does in that dtype (R2). One
    # number may be exact by luck, which is why these layers are not of the narrowest.
    plain = gradients(defined(layer, form(base)), [base, *layer.parameters()], upstream, cotangent)
    for name, g, p, w in zip(names, got, plain, want, strict=True):
        allowed = max(grads, 2 * error(p, w))
        assert_same_gradients([name, "all"], [g, torch.cat([x.flatten() for x in got])],
                              [w, torch.cat([x.flatten() for x in want])], allowed)  # fmt: skip


upstreams = st.sampled_from(["sum", "cat", "transposed", "plain"])


@given(
    case=cases(),
    form=st.sampled_from(FORMS),
    upstream=upstreams,
    strided_weights=st.booleans(),
    block=st.sampled_from([1, 5000, ref_attention.BLOCK_ELEMENTS]),
)
@settings(common, max_examples=60)
def test_float64_equals_the_definition(case, form, upstream, strided_weights, block):
    # Lengths that a definition can serve fit one block of attention: smaller ones make several.
    with mock.patch.object(ref_attention, "BLOCK_ELEMENTS", block):
        compare(case, F64, form, upstream, strided_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(
    case=cases(longest=150, narrowest=4),
    form=st.sampled_from(FORMS),
    upstream=upstreams,
    strided_weights=st.booleans(),
)
@settings(common, max_examples=40)
def test_other_dtypes_equal_the_definition(dtype, case, form, upstream, strided_weights):
    compare(case, dtype, form, upstream, strided_weights)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 32, 64])
def test_any_width_of_tile_gives_the_same(monkeypatch, width):
    """Only 16 is ever chosen below 2^20 tokens; the arithmetic of tiles must not hinge on it."""
    layers = [v.layer() for v in VARIANTS if v.name in ("linear", "expander_k1")]
    for layer in layers:
        for lengths in (None, torch.tensor([70, 0, 33])):
            x = torch.randn(3, 70, layer.embedding, dtype=F64, requires_grad=True)
            found = []
            for chosen in (ref_attention.tile_width, lambda levels: width):
                monkeypatch.setattr(ref_attention, "tile_width", chosen)
                y = layer(x, lengths=lengths)
                found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
            monkeypatch.undo()
            names = ["y", "x", *(name for name, _ in layer.named_parameters())]
            assert_same_gradients(names, found[1], found[0], TOLERANCE[F64][0])


@given(case=cases())
@settings(common, max_examples=40)
def test_left_is_not_right(case):
    """The merge has an order: with its halves swapped the result must be far off, else no test here proves it."""
    length = max(case.length, 2)
    layer, swapped = case.layer(F64), case.layer(F64)
    with torch.no_grad():
        if case.summarizer == "linear":
            swapped.summarizer.weight.copy_(torch.cat(layer.summarizer.weight.chunk(2, 1)[::-1], 1))
        elif case.summarizer == "depthwise_separable":
            swapped.summarizer.scale.copy_(layer.summarizer.scale.flip(0))
        else:
            swapped.summarizer.conv.weight.copy_(layer.summarizer.conv.weight.flip(-1))
        x = torch.randn(1, length, case.embedding, dtype=F64)
        slots, other = layer.parallel(x), swapped.parallel(x)
    assert torch.equal(slots[:, :, 0], other[:, :, 0])
    # What is seen from position 2 on: one summary at least.
    assert error(other[:, 1:, 1:], slots[:, 1:, 1:]) > 0.05


@given(case=cases(), data=st.data())
@settings(common, max_examples=50)
def test_no_output_hears_of_a_later_token(case, data):
    layer = case.layer(torch.float32).requires_grad_(False)
    x = torch.randn(case.batch, case.length, case.embedding)
    t = data.draw(st.integers(0, case.length - 1), label="t")
    changed = x.clone()
    changed[:, t] += data.draw(st.sampled_from([1e-3, 1.0, -1e4]), label="by")
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@given(case=cases(), data=st.data())
@settings(common, max_examples=40)
def test_no_gradient_reaches_a_later_token(case, data):
    """Causality of the backward pass: a loss on the first positions has an exact zero for all later tokens."""
    layer = case.layer(torch.float32)
    x = torch.randn(case.batch, case.length, case.embedding, requires_grad=True)
    t = data.draw(st.integers(1, case.length), label="t")
    layer(x)[:, :t].sum().backward()
    assert not x.grad[:, t:].any()
    assert x.grad[:, t - 1].any()


@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(common, max_examples=40)
def test_a_second_call_is_the_same_to_the_bit(case, dtype):
    """What the first call keeps, the second finds; flash-attention #2886 was wrong on cache hits alone."""
    layer = case.layer(dtype)
    x = torch.randn(case.batch, case.length, case.embedding).to(dtype).requires_grad_()
    results = []
    for _ in range(2):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)])
    for first, second in zip(*results, strict=True):
        assert first is second is None or torch.equal(first, second)


@given(case=cases(longest=64))
@settings(common, max_examples=15)
def test_rows_of_a_batch_do_not_meet(case):
    """One row alone gives what it gives in a batch, to rounding; and another row's content never shows, to the bit."""
    layer = case.layer(F64)
    x = torch.randn(3, case.length, case.embedding, dtype=F64)
    other = x.clone()
    other[0], other[2] = float("nan"), 1e9
    y = layer(x)
    assert torch.equal(layer(other)[1], y[1])
    assert_close("alone", layer(x[1:2]).detach()[0], y.detach()[1], TOLERANCE[F64][0])


@pytest.mark.parametrize("given_as", ["equal", "lengths", "attention_mask", "cu_seqlens", "state"])
@pytest.mark.parametrize("name", ["linear", "module", "expander_k1"])
def test_no_tokens_at_all(name, given_as):
    """R10: T = 0 gives an empty output, the state it was given, and gradients of zero."""
    layer = next(v for v in VARIANTS if v.name == name).layer()
    _, before = layer.prefill(torch.randn(1, 6, layer.embedding, dtype=F64))
    before = before.detach()
    options = {
        "equal": {},
        "lengths": {"lengths": torch.tensor([0])},
        "attention_mask": {"attention_mask": torch.zeros(1, 0, dtype=torch.bool)},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0])},
        "state": {"state": before},
    }[given_as]
    x = torch.randn(1, 0, layer.embedding, dtype=F64, requires_grad=True)
    y, after = layer(x, return_state=True, **options)
    assert y.shape == x.shape
    assert after.position.tolist() == ([6] if given_as == "state" else [0])
    if given_as == "state":
        for part in ("position", "token", "nodes", "q", "v"):
            assert torch.equal(getattr(after, part), getattr(before, part)), part
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_what_does_not_fit_is_refused_by_name():
    """A wrong number of rows would move the null row and the carried nodes: plausible numbers, all wrong."""
    sequences = Sequences.equal(1, 8)
    tokens, nodes = torch.randn(8, 24), torch.randn(1, 9, 16)
    attend(tokens, nodes, 2, sequences)
    for wrong in (torch.randn(1, 50, 16), torch.randn(1, 4, 16)):
        with pytest.raises(ValueError, match="node_qv"):
            attend(tokens, wrong, 2, sequences)
    with pytest.raises(ValueError, match="node_qv"):
        attend(tokens, nodes, 2, sequences, expand=1)
    with pytest.raises(ValueError, match="merge.weight: expected shape"):
        build_tree(torch.randn(8, 4), LinearMerge(torch.randn(1, 8, 4), torch.randn(1, 4), None), sequences)
    merge = LinearMerge(torch.randn(1, 1, 8, 4), torch.randn(1, 4), None)
    after = sequences.after(torch.tensor([5]), 5, 2)
    with pytest.raises(ValueError, match="carried"):
        x, token, carried = torch.randn(8, 4), torch.randn(1, 4), torch.randn(1, 3, 1, 4)
        build_tree(x, merge, after, token=token, carried=carried)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_sixteen_bits_rounds_once(dtype):
    """Scores, softmax and sums in float32: `TOLERANCE` alone would let a softmax in 16 bits pass (R12)."""
    sequences, unit = Sequences.equal(2, 150), torch.finfo(dtype).eps / 2
    operands = [torch.randn(300, 24).to(dtype), torch.randn(2, 301, 16).to(dtype)]
    cotangent, results = torch.randn(300, 8).to(dtype), []
    for kind in (dtype, F64):
        leaves = [operand.detach().to(kind).requires_grad_() for operand in operands]
        out, lse = attend(*leaves, 2, sequences)
        results.append([lse, out, *torch.autograd.grad(out, leaves, cotangent.to(kind))])
    # A number rounded once errs by 0.42 units in the root mean square; the gradients read the rounded ``out``, too.
    for got, expected, allowed in zip(*results, (1e-6, 0.6 * unit, 0.8 * unit, 0.8 * unit), strict=True):
        assert_close("attention", got.detach(), expected.detach(), allowed)


# Autocast

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.mark.parametrize("name", ["linear", "conv_mixed", "depthwise_separable", "module", "expander_k1"])
def test_autocast_in_training_prefill_and_step(name):
    layer = next(v for v in VARIANTS if v.name == name).layer(torch.float32)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 37, layer.embedding, requires_grad=True)
    with torch.autocast(**AUTOCAST):
        y = layer(x)
        _, state = layer.prefill(x[:, :20])
        stepped = []
        for t in range(20, 37):
            y_t, state = layer.step(x[:, t : t + 1], state)
            stepped.append(y_t)
    expected = exact(x.double()).detach()
    tolerance, grads = TOLERANCE[torch.bfloat16]
    assert y.dtype == torch.bfloat16 and state.nodes.dtype == torch.float32
    assert_close("y", y.detach(), expected, tolerance)
    assert_close("steps", torch.cat(stepped, 1).detach(), expected[:, 20:], tolerance)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in [x, *layer.parameters()])
    x64 = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(exact(x64).square().sum(), x64)
    assert_close("gradient of x", x.grad, want, grads)


def test_autocast_does_not_reach_inside_the_operations():
    """Scores, softmax and sums stay in float32: the same operands give the same bits under autocast and without."""
    sequences = Sequences.equal(2, 37)
    x, tokens, state = torch.randn(74, 8), torch.randn(74, 24), torch.randn(2, 6, 8)
    merge = LinearMerge(torch.randn(2, 1, 16, 8) * 0.3, torch.randn(2, 8), None)
    results = []
    for region in (contextlib.nullcontext(), torch.autocast(**AUTOCAST)):
        with region:
            nodes = build_tree(x, merge, sequences)
            out, lse = attend(tokens, torch.cat([nodes, -nodes], -1), 2, sequences)
            slots = ref_step.attend_slots(state[:, 0], state, state, torch.ones(2, 6, dtype=torch.bool), 2)
            results.append([nodes, out, lse, slots])
    for name, plain, cast in zip(("nodes", "out", "lse", "step"), *results, strict=True):
        assert torch.equal(plain, cast), name


def test_backward_inside_an_autocast_region():
    layer, x = LogarithmicMixing(8, 2, 2), torch.randn(2, 37, 8, requires_grad=True)
    with torch.autocast(**AUTOCAST):
        layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
