"""The attention kernels against the float64 reference: on a GPU, or under Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import kernel_place

DEVICE = kernel_place.device()

from bench.close import TOLERANCE, assert_close  # noqa: E402
from lmn_kernels import Sequences  # noqa: E402
from lmn_kernels._triton import attention as kernels  # noqa: E402
from python_ref import attention as reference  # noqa: E402
from python_ref.layout import Layout, level_count  # noqa: E402
from tests.support.launches import every_launch  # noqa: E402

pytestmark = kernel_place.mark()


def continued(sequences: Sequences, positions: list[int]) -> Sequences:
    longest = max(positions)
    return sequences.after(torch.tensor(positions), longest, level_count(longest))


PACKED = torch.tensor([0, 3, 3, 70, 71, 200])
CASES = {
    "one token": (Sequences.equal(2, 1), 8, 2, 1, 0),
    "edge lengths 2": (Sequences.equal(3, 2), 6, 2, 1, 0),
    "edge lengths 63": (Sequences.equal(1, 63), 8, 1, 2, 0),
    "edge lengths 64": (Sequences.equal(1, 64), 8, 1, 1, 0),
    "edge lengths 65": (Sequences.equal(2, 65), 24, 3, 1, 0),
    "shared nodes": (Sequences.equal(1, 300), 16, 2, 2, 0),
    "heads of 80": (Sequences.equal(1, 70), 80, 1, 1, 0),
    "heads of 128": (Sequences.equal(1, 70), 128, 1, 1, 0),
    "expander": (Sequences.equal(1, 150), 16, 2, 1, 1),
    "expander of two": (Sequences.equal(1, 70), 8, 1, 2, 2),
    "padded": (Sequences.padded(3, 100, torch.tensor([100, 0, 37])), 12, 2, 2, 0),
    "left padded": (Sequences.masked(torch.arange(90) >= torch.tensor([[0], [53]])), 8, 2, 1, 0),
    "packed": (Sequences.packed(210, PACKED), 8, 2, 2, 0),
    "packed expander": (Sequences.packed(210, PACKED), 8, 2, 1, 1),
    "continued": (continued(Sequences.equal(2, 90), [200, 5]), 8, 2, 2, 0),
    "continued, padded, expander": (
        continued(Sequences.padded(2, 60, torch.tensor([60, 9])), [63, 128]),
        8,
        1,
        1,
        1,
    ),  # fmt: skip
}


def inputs(case, dtype):
    sequences, size, heads, bank, expand = CASES[case]
    spans = None if sequences.spans is None else sequences.spans.to(DEVICE)
    layout = Layout(replace(sequences, spans=spans), expand, DEVICE)
    shapes = (sequences.tokens, 3 * size), (bank, layout.rows, 2 * size), (sequences.tokens, size)
    token_qkv, node_qv, grad = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    return token_qkv, node_qv, grad, heads, layout


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_in_float32(case):
    check(case, torch.float32)


HALVES = (torch.float16, torch.bfloat16)
IN_HALVES = ["shared nodes", "heads of 80", "packed", "continued", "expander"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in IN_HALVES for dtype in HALVES),
        *kernel_place.in_other_dtypes((case, dtype) for case in CASES for dtype in HALVES if case not in IN_HALVES),
    ],
    ids=str,
)
def test_forward_and_backward_in_16_bits(case, dtype):
    check(case, dtype)


def check(case, dtype):
    token_qkv, node_qv, grad, heads, layout = inputs(case, dtype)
    out, lse = kernels.attend(token_qkv, node_qv, heads, layout)
    wide = [tensor.double() for tensor in (token_qkv, node_qv)]
    expected, expected_lse = reference.attend(*wide, heads, layout)
    values, gradients = TOLERANCE[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", out.double(), expected, values)
    assert_close("lse", lse.double(), expected_lse, TOLERANCE[torch.float32][0])
    got = kernels.attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout)
    want = reference.attend_backward(grad.double(), *wide, expected, expected_lse, heads, layout)
    for name, g, w in zip(("d_token_qkv", "d_node_qv"), got, want, strict=True):
        assert g.dtype == dtype
        assert_close(name, g.double(), w, gradients)


@pytest.mark.slow
def test_every_configuration_gives_the_same():
    token_qkv, node_qv, grad, heads, layout = inputs("shared nodes", torch.float32)
    expected, lse = reference.attend(token_qkv, node_qv, heads, layout)
    want = reference.attend_backward(grad, token_qkv, node_qv, expected, lse, heads, layout)
    for launch in every_launch("attend_fwd", "attend_bwd"):
        out, _ = kernels.attend(token_qkv, node_qv, heads, layout, launch)
        assert_close(f"out of {launch}", out, expected, TOLERANCE[torch.float32][0])
        got = kernels.attend_backward(grad, token_qkv, node_qv, expected, lse, heads, layout, launch)
        for g, w in zip(got, want, strict=True):
            assert_close(f"gradient of {launch}", g, w, TOLERANCE[torch.float32][1])


def test_any_strides():
    token_qkv, node_qv, grad, heads, layout = inputs("packed", torch.float32)
    expected = kernels.attend(token_qkv, node_qv, heads, layout)
    strided = token_qkv.T.contiguous().T, node_qv.transpose(1, 2).contiguous().transpose(1, 2)
    got = kernels.attend(*strided, heads, layout)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    ones = torch.ones((), device=DEVICE).expand_as(grad)
    gradients = kernels.attend_backward(ones, *strided, *got, heads, layout)
    plain = kernels.attend_backward(ones.contiguous(), token_qkv, node_qv, *expected, heads, layout)
    assert all(torch.equal(g, e) for g, e in zip(gradients, plain, strict=True))


def test_padding_reaches_nothing():
    token_qkv, node_qv, grad, heads, layout = inputs("padded", torch.float32)
    out, lse = kernels.attend(token_qkv, node_qv, heads, layout)
    expected = kernels.attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout)
    padding = torch.ones(300, dtype=torch.bool, device=DEVICE)
    padding[:100] = padding[200:237] = False
    assert not out[padding].any() and not lse[padding].any()
    poisoned = token_qkv.masked_fill(padding[:, None], float("nan"))
    again, _ = kernels.attend(poisoned, node_qv, heads, layout)
    assert torch.equal(again, out)
    bad = grad.masked_fill(padding[:, None], float("nan"))
    got = kernels.attend_backward(bad, poisoned, node_qv, out, lse, heads, layout)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert not got[0][padding].any()


def test_scores_of_ten_thousand_stay_finite():
    token_qkv, node_qv, grad, heads, layout = inputs("shared nodes", torch.float16)
    out, lse = kernels.attend(token_qkv * 60, node_qv * 60, heads, layout)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 5e3
    for gradient in kernels.attend_backward(grad, token_qkv * 60, node_qv * 60, out, lse, heads, layout):
        assert torch.isfinite(gradient).all()


def test_too_wide_a_head_is_an_error():
    with pytest.raises(ValueError, match="heads: expected at most 128 features a head in torch.float32, got 160"):
        kernels.launch_for("attend_fwd", 160, torch.float32, DEVICE)
