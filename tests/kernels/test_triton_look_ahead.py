"""The look-ahead kernels against the float64 reference: on a GPU, or under Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.support import kernel_place

DEVICE = kernel_place.device()

from bench.close import TOLERANCE, assert_close  # noqa: E402
from lmn_kernels._triton import look_ahead as kernels  # noqa: E402
from python_ref import look_ahead as reference  # noqa: E402
from tests.support.launches import every_launch  # noqa: E402

pytestmark = kernel_place.mark()

# Batch, T, M, W, heads, head size, whether the memory looks ahead, goes on, has a table of its own, and starts late.
CASES = {
    "first segment": (1, 40, 0, 40, 2, 8, True, False, False, False),
    "one token": (2, 1, 7, 1, 2, 8, True, True, False, False),
    "one token, first": (1, 1, 0, 1, 1, 8, True, False, False, False),
    "equal": (1, 32, 32, 32, 2, 8, True, True, False, False),
    "edges": (1, 33, 65, 33, 1, 6, True, True, False, False),
    "long memory": (1, 17, 100, 17, 1, 8, True, True, False, False),
    "short memory": (1, 70, 9, 70, 1, 12, True, True, False, False),
    "another window": (1, 20, 60, 33, 1, 8, True, True, False, False),
    "no seed": (1, 30, 40, 30, 1, 8, True, False, False, False),
    "own table": (2, 20, 40, 20, 1, 8, True, True, True, False),
    "late starts": (2, 20, 40, 20, 1, 8, True, True, False, True),
    "looks back alone": (1, 35, 40, 35, 2, 8, False, False, False, False),
    "looks back, late starts": (2, 20, 40, 20, 1, 8, False, False, False, True),
    "heads of 41": (1, 20, 30, 20, 2, 41, True, True, False, False),
    "heads of 64": (1, 20, 30, 20, 1, 64, True, True, False, False),
    "heads of 128": (1, 20, 30, 20, 1, 128, True, True, False, False),
    "many streams": (5, 12, 12, 12, 1, 8, True, True, True, False),
}


def inputs(case, dtype):
    batch, tokens, memory, window, heads, size, ahead, seeded, own, late = CASES[case]
    keys, rows = tokens + memory, tokens + memory * ahead
    future_row = keys if own else 0
    shapes = (
        (batch, rows, heads, size), (batch, keys, 2, heads, size), (4, heads, size),
        (keys + (memory + 1) * own, heads, size), (batch, memory, heads, size), (batch, rows, heads, size),
    )  # fmt: skip
    q, kv, bias, table, output, grad = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    lse, grad_lse = (torch.randn(batch, n, heads).to(DEVICE) for n in (memory, rows))
    start = torch.arange(batch, device=DEVICE) * memory // max(1, batch - 1) if late else None
    seeds = (output, lse) if seeded and memory else (None, None)
    return (q, kv, bias, table), seeds, (start, tokens, window, future_row), (grad, grad_lse)


def wide(tensors):
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


# Float32 takes no wider heads than 64.
@pytest.mark.parametrize("case", [case for case in CASES if case != "heads of 128"])
def test_forward_and_backward_in_float32(case):
    check(case, torch.float32)


HALVES = (torch.float16, torch.bfloat16)
# Of the widest heads in float16 alone: in bfloat16 the interpreter multiplies in float32.
IN_HALVES = [(case, dtype) for case in ("edges", "own table", "late starts", "heads of 41") for dtype in HALVES]
IN_HALVES.append(("heads of 128", torch.float16))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *IN_HALVES,
        *kernel_place.in_other_dtypes(
            (case, dtype) for case in CASES for dtype in HALVES if (case, dtype) not in IN_HALVES
        ),
    ],
    ids=str,
)
def test_forward_and_backward_in_16_bits(case, dtype):
    check(case, dtype)


def check(case, dtype):
    operands, seeds, reach, grads = inputs(case, dtype)
    out, lse = kernels.attend(*operands, *seeds, *reach)
    expected, expected_lse = reference.attend(*wide(operands), *wide(seeds), *reach)
    values, gradients = TOLERANCE[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", out.double(), expected, values)
    # q + u and q + v are rounded to the dtype of the products, and scores with them.
    assert_close("lse", lse.double(), expected_lse, values)
    got = kernels.attend_backward(*grads, *operands, out, lse, *reach)
    want = reference.attend_backward(*wide(grads), *wide(operands), expected, expected_lse, *reach)
    for name, g, w in zip(("q", "kv", "bias", "table"), got, want, strict=True):
        assert g.dtype == dtype
        assert_close(f"gradient of {name}", g.double(), w, gradients)


@pytest.mark.slow
def test_every_configuration_gives_the_same():
    operands, seeds, reach, grads = inputs("own table", torch.float32)
    expected, lse = reference.attend(*operands, *seeds, *reach)
    want = reference.attend_backward(*grads, *operands, expected, lse, *reach)
    names = "look_ahead_fwd", "look_ahead_bwd_dq", "look_ahead_bwd_dkv", "look_ahead_bwd_dtable"
    for launch in every_launch(*names):
        out, _ = kernels.attend(*operands, *seeds, *reach, launch)
        assert_close(f"out of {launch}", out, expected, TOLERANCE[torch.float32][0])
        got = kernels.attend_backward(*grads, *operands, expected, lse, *reach, launch)
        for g, w in zip(got, want, strict=True):
            assert_close(f"gradient of {launch}", g, w, TOLERANCE[torch.float32][1])


def test_any_strides():
    operands, seeds, reach, grads = inputs("late starts", torch.float32)
    expected = kernels.attend(*operands, *seeds, *reach)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in operands]
    start = torch.stack([reach[0], reach[0] + 5], 1)[:, 0]
    assert not start.is_contiguous()
    got = kernels.attend(*strided, *seeds, start, *reach[1:])
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    ones = torch.ones((), device=DEVICE).expand_as(grads[0]), torch.ones((), device=DEVICE).expand_as(grads[1])
    gradients = kernels.attend_backward(*ones, *strided, *got, start, *reach[1:])
    plain = kernels.attend_backward(*(one.contiguous() for one in ones), *operands, *expected, *reach)
    assert all(torch.equal(g, e) for g, e in zip(gradients, plain, strict=True))


def test_what_no_pair_sees_reaches_nothing():
    """NaN in keys before a stream's start, and in rows of the table for distances that no pair has."""
    (q, kv, bias, table), seeds, reach, grads = inputs("looks back, late starts", torch.float32)
    gone = torch.arange(kv.shape[1], device=DEVICE)[None] < reach[0][:, None]
    results = []
    for value in (0.0, float("nan")):
        hidden = kv.masked_fill(gone[:, :, None, None, None], value)
        longer = torch.cat([table, torch.full_like(table[:7], value)])
        found = kernels.attend(q, hidden, bias, longer, *seeds, *reach)
        results.append([*found, *kernels.attend_backward(*grads, q, hidden, bias, longer, *found, *reach)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    d_kv = results[1][3]
    assert not d_kv[gone].any() and d_kv[~gone].any()


def test_rows_between_two_tables_reach_nothing():
    (q, kv, bias, table), seeds, (start, tokens, window, future_row), grads = inputs("own table", torch.float32)
    results = []
    for value in (0.0, float("nan")):
        # A gap of three rows, and the row of distance 0, which no pair ahead has.
        spaced = torch.cat([table[:future_row], torch.full_like(table[:4], value), table[future_row + 1 :]])
        reach = start, tokens, window, future_row + 3
        found = kernels.attend(q, kv, bias, spaced, *seeds, *reach)
        results.append([*found, *kernels.attend_backward(*grads, q, kv, bias, spaced, *found, *reach)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scores_of_ten_thousand_stay_finite():
    operands, seeds, reach, grads = inputs("equal", torch.float16)
    q, kv, bias, table = operands
    out, lse = kernels.attend(q * 60, kv * 60, bias, table, *seeds, *reach)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 5e3
    for gradient in kernels.attend_backward(*grads, q * 60, kv * 60, bias, table, out, lse, *reach):
        assert torch.isfinite(gradient).all()


def test_too_wide_a_head_is_an_error():
    with pytest.raises(ValueError, match="heads: expected at most 128 features a head in torch.float16, got 160"):
        kernels.launch_for("look_ahead_fwd", 160, torch.float16, DEVICE)
    with pytest.raises(ValueError, match="heads: expected at most 64 features a head in torch.float32, got 80"):
        kernels.launch_for("look_ahead_bwd_dkv", 80, torch.float32, DEVICE)
