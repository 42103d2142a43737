"""Attention of a segment over its memory, and of the memory over what comes after it (LaMemo)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from python_ref import look_ahead as reference
from python_ref.checks import check_device, check_float, check_ids, check_no_tangent, check_positive, check_shape
from python_ref.precision import compute_dtype, no_autocast

from ..backend.choice import declare, functional, resolve
from .library import OPS, launcher, register, second_derivative


def look_ahead_attend(
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    *,
    tokens: int,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    start: Tensor | None = None,
    window: int | None = None,
    future_row: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of a segment over its memory, and of the memory over the segment's beginning (LaMemo, sections 1 to 4).

    Of K rows of keys the last T are the segment, those before are the memory. Row i of the segment sees keys 0 … i;
    row i of the M = K - T of the memory, where q has them, sees the keys from max(i+1, M-W+1) to M, the segment's
    first. A score is ``((q_i + u)·k_j + (q_i + v)·r_|i-j|) / √D``. Gradients flow through both results, and not into
    ``output`` and ``lse``.

    Args:
        q: ``[B, T, H, D]``, or ``[B, K, H, D]`` with the memory's rows; a floating dtype, any strides.
        kv: ``[B, K, 2, H, D]`` keys and values, K ≥ T.
        bias: ``[4, H, D]``: u and v of the segment's rows, u and v of the memory's.
        table: ``[R, H, D]``: row a is r of distance a, R ≥ K. The memory's rows read row ``future_row + a``,
            ``R > future_row + M``.
        tokens: T ≥ 1.
        output: ``[B, M, H, D]`` in the dtype of q, and ``lse [B, M, H]`` in float32 (float64 for float64): result and
            log-sum-exp of what the memory's rows saw before, to go on from; or neither.
        start: ``[B]`` int32 or int64: the segment does not see keys before it, 0 … K-T, whatever they hold; 0 where
            None.
        window: W ≥ 1; T where None.
        future_row: where the memory's table begins: 0, or behind the other one's K rows.
        backend: ``"auto"``, ``"reference"``, or the name of a kernel implementation.

    Returns:
        ``out`` shaped and typed as q, and the log-sum-exp of its scores ``[B, rows, H]``, float32 (float64 for
        float64), each merged with ``output`` and ``lse``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number or the name of the backend is wrong, or ``output`` or ``lse`` requires
            a gradient.
        NotImplementedError: an input carries a forward-mode tangent.
        BackendError: the named backend cannot serve the call.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None, None), "[batch, rows, heads, head size]")
    batch, rows, heads, size = q.shape
    check_positive("q.shape[2], the heads", heads)
    check_positive("q.shape[3], their size", size)
    tokens = check_positive("tokens", tokens)
    check_shape("kv", kv, (batch, None, 2, heads, size), "[batch, keys, 2, heads, head size]")
    keys = kv.shape[1]
    if tokens > keys:
        raise ValueError(f"tokens: expected at most the {keys} keys of kv, got {tokens}")
    if rows != tokens and rows != keys:
        raise ValueError(f"q: expected {tokens} rows of the tokens or all {keys} of the keys, got {rows}")
    memory = rows - tokens
    check_shape("bias", bias, (4, heads, size), "[kinds, heads, head size]")
    check_shape("table", table, (None, heads, size), "[distances, heads, head size]")
    future_row = check_positive("future_row", future_row, 0)
    if 0 < future_row < keys:
        raise ValueError(f"future_row: expected 0, or {keys} or more to begin behind the other table, got {future_row}")
    needed = max(keys, future_row + memory + 1)
    if table.shape[0] < needed:
        raise ValueError(f"table: expected at least {needed} rows, got {table.shape[0]}")
    window = tokens if window is None else check_positive("window", window)
    if (output is None) != (lse is None) or (output is not None and not memory):
        raise ValueError("output, lse: expected both with memory rows in q, or neither")
    if output is not None and lse is not None:
        check_shape("output", output, (batch, memory, heads, size), "[batch, memory, heads, head size]")
        check_shape("lse", lse, (batch, memory, heads), "[batch, memory, heads]")
        check_float("lse", lse, compute_dtype(q.dtype))
        check_device("lse", lse, q.device)
        if output.requires_grad or lse.requires_grad:
            raise ValueError("output, lse: expected constants (detach them), got tensors that require grad")
    if start is not None:
        check_ids("start", start, (batch,), 0, keys - tokens)
        check_device("start", start, q.device)
        start = start.long()
    for name, value in (("kv", kv), ("bias", bias), ("table", table), ("output", output)):
        if value is not None:
            check_float(name, value, q.dtype)
            check_device(name, value, q.device)
    for name, value in (("q", q), ("kv", kv), ("bias", bias), ("table", table), ("output", output), ("lse", lse)):
        if value is not None:
            check_no_tangent(name, value)
    if functional(backend, "look_ahead_attend"):
        with no_autocast(q.device):
            return reference.attend_with(q, kv, bias, table, output, lse, start, tokens, window, future_row)
    served = resolve(backend, "look_ahead_attend", q.device, q.dtype, size)
    out, total = OPS.look_ahead_attend(q, kv, bias, table, output, lse, start, tokens, window, future_row, served)
    return out, total


# Where streams start, T, W and where the second table begins (`python_ref.look_ahead`), and who computes.
_REACH = "Tensor? start, SymInt tokens, SymInt window, SymInt future_row, str backend"
_OPERANDS = "Tensor q, Tensor kv, Tensor bias, Tensor table"
_SEEDS = "Tensor? output, Tensor? lse"
_NO_SEEDS, _NO_REACH = (None,) * 2, (None,) * 5


def _run(*given: Any) -> tuple[Tensor, Tensor]:
    *operands, backend = given
    results: tuple[Tensor, Tensor] = launcher("look_ahead", backend).attend(*operands)
    return results


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tokens, window, future_row, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.reach = tokens, window, future_row, backend


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *operands, output, lse, start, out, total = ctx.saved_tensors
    grads = OPS.look_ahead_attend_backward(grad, grad_lse, *operands, out, total, output, lse, start, *ctx.reach)
    return (*grads, *_NO_SEEDS, *_NO_REACH)


def _run_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    out: Tensor,
    total: Tensor,
    output: Tensor | None,
    lse: Tensor | None,
    *reach: Any,
) -> tuple[Tensor, ...]:
    # A kernel looks at what the softmax began with only through the merged result.
    *place, backend = reach
    run = launcher("look_ahead", backend).attend_backward
    grads: tuple[Tensor, ...] = run(grad, grad_lse, q, kv, bias, table, out, total, *place)
    return grads


def _fake_backward(grad: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in rest[:4])


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, grad_lse, q, kv, bias, table, _, _, seed, seed_lse, start, *ctx.reach = inputs
    ctx.save_for_backward(grad, grad_lse, q, kv, bias, table, seed, seed_lse, start)


def _second_gradient(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_lse, q, kv, bias, table, output, lse, start = ctx.saved_tensors
    *place, backend = ctx.reach

    def joined(out: Tensor, total: Tensor) -> Tensor:
        return torch.cat([out.flatten().to(total.dtype), total.flatten()])

    def forward(given: list[Any]) -> Tensor:
        q, kv, bias, table = given
        return joined(*reference.attend_with(q, kv, bias, table, output, lse, start, *place))

    given, seed = [q, kv, bias, table], joined(grad, grad_lse)
    to_seed, *found = second_derivative("look_ahead_attend", backend, forward, given, seed, list(grad_grads))
    to_grad: list[Tensor | None] = [None, None]
    if to_seed is not None:
        out, total = to_seed.split([grad.numel(), grad_lse.numel()])
        to_grad = [out.to(grad.dtype).view(grad.shape), total.view(grad_lse.shape)]
    # The results of the forward are functions of the other inputs, and were treated as such.
    return (*to_grad, *found, None, None, *_NO_SEEDS, *_NO_REACH)


def _flops(q: Any, kv: Any, *rest: Any, products: int = 3, **_: Any) -> int:
    """Of D features each: for a pair its score by content and by distance, and its share of the mix."""
    tokens, window = rest[5:7]
    (batch, rows, heads, size), keys = q, kv[1]
    memory, looks_back = rows - tokens, tokens * (keys - tokens) + tokens * (tokens + 1) // 2
    near = min(memory, window)  # the last rows of the memory see as many keys as there are behind them, to the first
    looks_ahead = near * (near + 1) // 2 + (memory - near) * window
    count: int = 2 * products * batch * heads * size * (looks_back + looks_ahead)
    return count


def _backward_flops(grad: Any, grad_lse: Any, q: Any, kv: Any, bias: Any, table: Any, *rest: Any, **_: Any) -> int:
    """The scores again, the gradient of a weight, and those of v, of k, of the table, and twice of q."""
    _, _, output, lse, *reach = rest
    return _flops(q, kv, bias, table, output, lse, *reach, products=8)


register(
    f"look_ahead_attend({_OPERANDS}, {_SEEDS}, {_REACH}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _gradient,
    _save,
    flops=_flops,
)
declare("look_ahead_attend", widest=(128, 64), triton=("cuda",))
register(
    f"look_ahead_attend_backward(Tensor grad, Tensor grad_lse, {_OPERANDS}, Tensor out, Tensor total, {_SEEDS}, "
    f"{_REACH}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _second_gradient,
    _save_backward,
    flops=_backward_flops,
)
