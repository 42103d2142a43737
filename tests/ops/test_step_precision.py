"""The sequential form against float64: every layer, dtype and position, goldens, and 100,000 steps (R3, R4, R12)."""

from __future__ import annotations

import pytest
import torch

from bench.close import assert_close, error
from lmn_kernels import LogarithmicMixing, decode_
from python_ref.step import attend_slots
from tests.ops.test_golden import CASES, Golden
from tests.support.stepping import (
    BY_NAME,
    assert_state_close,
    every_backend,
    every_layer,
    exact,
    exact_steps,
    extension,
    layers,
    one_by_one,
    started,
    tolerance,
)
from tests.support.variants import Variant

F32, BF16 = torch.float32, torch.bfloat16

both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
both_states = pytest.mark.parametrize("state_dtype", [F32, BF16], ids="state {}".format)


@both_states
@both_dtypes
@every_layer
@every_backend
@torch.no_grad()
def test_outputs_and_states_equal_float64(variant, dtype, state_dtype, backend):
    """From nothing, from inside a level, and across 32."""
    layer = variant.layer(dtype, step_backend=backend)
    x, state = torch.randn(3, 19, variant.embedding).to(dtype), started(layer, [0, 5, 30], 19, state_dtype)
    expected, end = exact_steps(variant, layer, x, state)
    y = decode_(x, state, layer.step_weights(), backend=backend)
    assert y.dtype == dtype and state.max_position == 49
    assert {getattr(state, name).dtype for name in ("token", "nodes", "q", "v")} == {state_dtype}
    assert_close("y", y, expected, tolerance(dtype, state_dtype))
    # The extension computes in float32, whatever the weights are: its nodes are rounded where they are kept, only.
    allowed = tolerance(state_dtype) if backend == "cpp" else tolerance(dtype, state_dtype)
    assert_state_close(state, end, allowed)


@pytest.mark.parametrize("position", [2**31 - 1, 2**32 - 1, 2**40 - 1], ids=lambda n: f"2^{n.bit_length()}-1")
@layers("linear", "conv_mixed", "depthwise_separable", "expander_k1", "block")
@every_backend
@torch.no_grad()
def test_counters_carry_past_32_bits(variant, position, backend):
    """The first token summarises every level there is, from random nodes; the next one none, or one."""
    layer = variant.layer(F32, step_backend=backend)
    state, x = started(layer, [position, position - 1, 6], 2), torch.randn(3, 2, variant.embedding)
    for t in range(2):
        expected, end = exact_steps(variant, layer, x[:, t : t + 1], state)
        y = decode_(x[:, t : t + 1], state, layer.step_weights(), backend=backend)
        assert_close(f"token {t}", y, expected, tolerance(F32))
        assert_state_close(state, end, tolerance(F32))
    assert state.position.tolist() == [position + 2, position + 1, 8]


@layers("linear", "conv_mixed", "expander_k1", "block")
@every_backend
@torch.no_grad()
def test_every_split_into_prefill_and_steps(variant, backend):
    layer, x = variant.layer(F32, step_backend=backend), torch.randn(2, 40, variant.embedding)
    twin = exact(variant, layer)
    expected = twin(x.double())
    ends = [twin.prefill(x[:, :count].double())[1] for count in range(41)]
    for split in range(40):
        stop = 40 if split % 8 == 0 or backend == "cpp" else min(split + 2, 40)
        y, state = layer.prefill(x[:, :split])
        assert_close(f"prefill of {split}", y, expected[:, :split], tolerance(F32))
        y, state = one_by_one(layer, x[:, split:stop], state)
        assert_close(f"steps behind {split}", y, expected[:, split:stop], tolerance(F32))
        assert_state_close(state, ends[stop], tolerance(F32))


@pytest.mark.parametrize("case", CASES, ids=[case["file"].removesuffix(".npz") for case in CASES])
@every_backend
@torch.no_grad()
def test_goldens_in_float32(case, backend):
    """What the original's sequential form gave in float64, token by token and in one run."""
    golden = Golden(case)
    layer, x = golden.layer.float(), golden.x.float()
    layer.step_backend = backend
    y, _ = one_by_one(layer, x, layer.init_state(x.shape[0]))
    assert_close("step", y, golden.y_sequential, tolerance(F32))
    y = layer.step_(x, layer.init_state(x.shape[0], max_position=x.shape[1]))
    assert_close("step_", y, golden.y_sequential, tolerance(F32))


@both_states
@extension
@torch.no_grad()
def test_errors_do_not_grow_over_100000_steps(state_dtype, backend):
    """A node is rounded once a level, and there are log n levels: tokens 90,000 apart err alike."""
    variant, count = Variant("long", 16, 2, 2), 10_000
    layer = variant.layer(BF16, step_backend=backend)
    x = torch.randn(1, 100_000, 16).to(BF16)
    expected = exact(variant, layer)(x.double())
    y = layer.step_(x, layer.init_state(1, max_position=100_000, dtype=state_dtype))
    first, last = error(y[:, :count], expected[:, :count]), error(y[:, -count:], expected[:, -count:])
    assert last <= 1.5 * first, f"the error grew from {first:.3g} to {last:.3g}"
    assert_close("all", y, expected, tolerance(BF16))


@every_backend
@torch.no_grad()
def test_a_softmax_of_two_is_a_sigmoid(backend):
    """To a few units in the last place, over all that float32 holds: a slot of any score beside one of score 0."""
    layer = LogarithmicMixing(1, step_backend=backend)
    for parameter, value in zip(layer.sva.parameters(), (0, 0, 0, 1, 0, 0, 1, 0), strict=True):
        parameter.fill_(value)  # weight and bias of q, k, v, out_proj: q = v = 0 of the token, k = 1
    scores = torch.linspace(-85, 85, 20_001)
    state = started(layer, [2] * len(scores), 1)
    state.q[:, 0, 0, 0], state.v[...] = scores, 1
    y = layer.step_(torch.ones(len(scores), 1, 1), state).flatten()
    expected = torch.sigmoid(scores.double())
    assert (y / expected - 1).abs().max() < 5e-7


@pytest.mark.parametrize("scale", [1, 30, 1000], ids="tokens times {}".format)
@both_dtypes
@every_backend
@torch.no_grad()
def test_extreme_scores(scale, dtype, backend):
    """Scores far past ±1e4: a softmax of a single slot, and terms below what float32 can hold."""
    variant = Variant("sharp", 16, 2, 2)
    layer = variant.layer(dtype, step_backend=backend)
    layer.sva.q.weight.mul_(20)
    x = torch.randn(2, 19, 16).mul(scale).to(dtype)
    y = layer.step_(x, layer.init_state(2, max_position=19))
    assert torch.isfinite(y).all()
    # Scores err by what they are rounded to; those of the reference's bfloat16 nodes, or of size 1e6, by too much.
    if scale < 1000 and (backend == "cpp" or dtype == F32):
        assert_close("y", y, exact(variant, layer)(x.double()), tolerance(BF16))


@every_backend
@torch.no_grad()
def test_what_is_kept_is_rounded_as_torch_rounds(backend):
    """To the nearest, ties to even; past the largest number is infinite, and a NaN stays one."""
    words = [0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000]
    words += [0x3F818000, 0x3F808001, 0x3F7FFFFF, 0x00000001, 0x80018000, 0x80000000]
    x = torch.tensor(words).to(torch.int32).view(1, 1, 12).view(F32)
    layer = BY_NAME["linear"].layer(F32, step_backend=backend)
    state = layer.init_state(1, max_position=1, dtype=BF16)
    layer.step_(x, state)
    torch.testing.assert_close(state.token, x[:, 0].to(BF16), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(state.token.signbit()[0, 2:], x[0, 0, 2:].signbit())


@every_backend
@torch.no_grad()
def test_a_node_is_rounded_once(backend):
    """Of a kept token and a new one, in float32; what is in between is not rounded."""
    layer = BY_NAME["wide_102"].layer(F32, step_backend=backend)
    x, state = torch.randn(8, 1, 102), started(layer, [1] * 8, 1, BF16)
    _, end = exact_steps(BY_NAME["wide_102"], layer, x, state)
    layer.step_(x, state)
    assert error(state.nodes, end.nodes) < 1.1 * error(end.nodes.to(BF16), end.nodes)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_attention_over_slots_of_16_bits_is_rounded_once(dtype):
    k, slots = torch.randn(3, 8, dtype=dtype), torch.randn(2, 3, 40, 8, dtype=dtype)
    valid = torch.rand(3, 40) < 0.7
    valid[:, 0] = True
    exactly = attend_slots(k.float(), *slots.float(), valid, 2)
    assert torch.equal(attend_slots(k, *slots, valid, 2), exactly.to(dtype))
