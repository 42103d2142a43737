"""Dropout and projections without a bias, in every form of a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, LogarithmicMixing
from tests.support.stepping import every_backend

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
KINDS = [LogarithmicMixing, LogarithmicMemory, ExpanderSummarizerLogarithmicMemory]
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, **options):
    torch.manual_seed(0)
    return kind(12, 3, 2, init="variance_preserving", **options)


def forms(layer, x):
    """The output of each form over the same tokens."""
    layer.parallelize, state = True, layer.init_state(2)
    found = {"forward": layer(x)}
    prefix, carried = layer.prefill(x[:, :4])
    found["chunks"] = torch.cat([prefix, layer(x[:, 4:], state=carried)], 1)
    steps = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        steps.append(y)
    found["step"] = torch.cat(steps, 1)
    pool = layer.init_state(2, max_position=x.shape[1])
    found["step_"] = layer.step_(x, pool)
    layer.parallelize = False
    found["stream"] = torch.cat([layer(x_t) for x_t in x.split(1, 1)], 1)
    layer.reset()
    layer.parallelize = True
    return found


class Constant(nn.Dropout):
    """Dropout of the same elements, whatever is dropped: a quarter of the features."""

    def forward(self, x):
        keep = torch.arange(x.shape[-1], device=x.device) % 4 > 0
        return x * keep / 0.75 if self.training else x


def by_hand(layer, x):
    """What a layer with `Constant` dropout is to compute, from one without."""
    plain = copy.deepcopy(layer)
    plain.drop = None
    if isinstance(layer, LogarithmicMemory):
        plain.feedforward.drop = None
        block, mixing = plain, copy.deepcopy(plain)
        mixing.norm1, mixing.feedforward, mixing.norm2 = nn.Identity(), None, None
        inner = block.norm1(x)
        mixed = x + layer.drop(mixing(inner) - inner)
        return mixed + layer.feedforward.drop(block.feedforward(block.norm2(mixed)))
    return layer.drop(plain(x))


@every_kind
@pytest.mark.parametrize("lean", [False, True])
def test_dropout_falls_on_what_the_attention_and_the_feedforward_return_in_every_form(kind, lean):
    layer, x = made(kind, dropout=0.25, lean=lean, dtype=F64), torch.randn(2, 9, 12, dtype=F64)
    layer.drop = Constant(0.25)
    if kind is not LogarithmicMixing:
        layer.feedforward.drop = Constant(0.25)
    expected = by_hand(layer, x)
    assert (expected - by_hand(layer.eval(), x)).abs().max() > 0.1
    for name, y in forms(layer.train(), x).items():
        assert_close(name, y, expected, VALUE)


@every_kind
@every_backend
def test_dropout_is_off_in_eval_and_then_the_layer_is_the_one_without(kind, backend):
    layer, twin = made(kind, dropout=0.5, step_backend=backend), made(kind, step_backend=backend)
    assert layer.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        expected = forms(twin, x)
        for name, y in forms(layer.eval(), x).items():
            assert torch.equal(y, expected[name]), name
        assert "_plan" in layer.__dict__
        state = layer.init_state(2)
        served, _ = layer.step(x[:, :1], state)
        layer.train()
        dropped = {bool(layer.step(x[:, :1], state)[0].equal(served)) for _ in range(5)}
        assert dropped == {False}, "a plan of eval() serves a layer that trains"
        layer.eval()
        assert torch.equal(layer.step(x[:, :1], state)[0], served)


@pytest.mark.parametrize("form", ["forward", "step", "step_", "memory tensor"])
@every_backend
def test_dropout_draws_anew_at_every_call_and_drops_at_its_rate(form, backend):
    layer = LogarithmicMixing(64, 4, dropout=0.25, step_backend=backend)
    x = torch.randn(8, 1, 64)

    def call():
        if form == "forward":
            return layer(x)
        if form == "step":
            return layer.step(x, layer.init_state(8))[0]
        if form == "step_":
            return layer.step_(x, layer.init_state(8, max_position=1))
        return layer.attention(x[:, :, None])

    with torch.no_grad():
        torch.manual_seed(0)
        first, second = call(), call()
        torch.manual_seed(0)
        assert torch.equal(call(), first) and not torch.equal(first, second)
        kept = torch.stack([call() for _ in range(40)])
        assert kept.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)
        whole = layer.eval() and call()
        assert_close("what is kept", kept[kept != 0] * 0.75, whole.expand_as(kept)[kept != 0], 1e-6)


@every_kind
def test_recomputation_draws_the_same_numbers(kind):
    layer, x = made(kind, dropout=0.3, dtype=F64), torch.randn(2, 9, 12, dtype=F64)
    found = []
    for lean in (False, True):
        layer.lean = lean
        torch.manual_seed(1)
        found.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    names = [name for name, _ in layer.named_parameters()]
    assert_same_gradients(names, list(found[1]), list(found[0]), GRADIENT)


def test_weights_of_a_layer_that_drops_are_not_given_away():
    layer = LogarithmicMemory(12, 3, dropout=0.1)
    with pytest.raises(TypeError, match=r"block: .* dropout that is off \(eval\(\)\)"):
        layer.step_weights()
    assert len(layer.eval().step_weights().block) == 6


@every_kind
@every_backend
def test_without_biases_every_form_is_that_of_biases_that_are_zero(kind, backend):
    dtype = F64 if backend == "reference" else torch.float32
    layer, twin = (made(kind, bias=bias, dtype=dtype, step_backend=backend) for bias in (False, True))
    own = {name for name, _ in layer.named_parameters() if "bias" in name}
    assert all(name.startswith(("summarizer", "expander")) for name in own)
    missing, unexpected = twin.load_state_dict(layer.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing) and missing
    with torch.no_grad():
        for name in missing:
            twin.get_parameter(name).zero_()
    x, tolerance = torch.randn(2, 9, 12, dtype=dtype), TOLERANCE[dtype][0]
    with torch.no_grad():
        expected = forms(twin, x)
        for name, y in forms(layer, x).items():
            assert_close(name, y, expected[name], tolerance)
        assert "_plan" in layer.__dict__
    if dtype == F64:
        for name, y in forms(layer, x).items():
            if name != "step_":
                names = [name for name, _ in layer.named_parameters()]
                want = torch.autograd.grad(twin(x).square().sum(), [twin.get_parameter(name) for name in names])
                got = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
                assert_same_gradients(names, list(got), list(want), GRADIENT)


@every_backend
def test_a_bias_that_is_put_in_later_is_heard(backend):
    layer, x = made(LogarithmicMemory, bias=False, step_backend=backend), torch.randn(2, 1, 12)
    with torch.no_grad():
        state = layer.init_state(2)
        before = [layer.step(x, state)[0] for _ in range(3)]
        assert "_plan" in layer.__dict__
        for part in (layer.sva.k, layer.sva.out_proj, layer.feedforward.fc2):
            part.bias = nn.Parameter(torch.ones(12))
        after, whole = layer.step(x, state)[0], layer(x)
    assert_close("step", after, whole, 1e-5)
    assert (after - before[0]).abs().max() > 0.5


def test_one_projection_alone_may_have_no_bias_and_so_may_convolutions():
    layer = LogarithmicMixing(12, 3, 2, summarizer="conv_mixed", expand=1, dtype=F64)
    layer.sva.k = nn.Linear(12, 12, bias=False, dtype=F64)
    layer.summarizer.conv = nn.Conv1d(24, 24, 2, 2, bias=False, dtype=F64)
    layer.expander.conv_transpose = nn.ConvTranspose1d(12, 12, 2, bias=False, dtype=F64)
    twin = LogarithmicMixing(12, 3, 2, summarizer="conv_mixed", expand=1, dtype=F64)
    twin.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for part in (twin.sva.k, twin.summarizer.conv, twin.expander.conv_transpose):
            part.bias.zero_()
        x = torch.randn(2, 33, 12, dtype=F64)
        expected = twin(x)
        for name, y in forms(layer, x).items():
            assert_close(name, y, expected, VALUE)


def test_a_layer_without_biases_compiles_whole_and_shows_its_options():
    layer, x = made(LogarithmicMemory, bias=False, dropout=0.1).eval(), torch.randn(2, 9, 12)
    torch._dynamo.reset()
    with torch.no_grad():
        y, state = torch.compile(layer, fullgraph=True, backend="eager")(x, return_state=True)
        assert_close("y", y, layer(x), 1e-6)
        after, _ = torch.compile(layer.step, fullgraph=True, backend="eager")(x[:, :1], state)
        assert_close("step", after, layer.step(x[:, :1], state)[0], 1e-6)
    assert "dropout=0.1, bias=False" in repr(layer)
    assert "dropout" not in repr(LogarithmicMemory(12)) and "bias" not in LogarithmicMixing(12).extra_repr()


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=f"dropout: expected a number in 0 … 1, got {rate}"):
        LogarithmicMemory(12, dropout=rate)


@every_backend
def test_a_layer_without_biases_follows_its_parameters_to_another_dtype(backend):
    layer = made(LogarithmicMemory, bias=False, step_backend="auto" if backend == "cpp" else backend)
    for dtype in (torch.float32, F64, torch.float32):
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype)  # which a plan is not told of
        x = torch.randn(2, 9, 12, dtype=dtype)
        with torch.no_grad():
            expected = layer(x)
            for name, y in forms(layer, x).items():
                assert_close(name, y, expected, TOLERANCE[dtype][0])
