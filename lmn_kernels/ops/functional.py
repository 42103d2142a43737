"""The public operations: tree construction, single-vector attention, look-ahead attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from python_ref.checks import check_device, check_float, check_ids, check_positive, check_shape
from python_ref.layout import node_rows, state_rows
from python_ref.precision import compute_dtype
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge

from ..backend.choice import resolve
from .library import _OPS, pack


def build_tree(
    x: Tensor,
    merge: LinearMerge,
    sequences: Sequences,
    *,
    token: Tensor | None = None,
    carried: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every node of the summary tree of every sequence (specification, sections 1 and 6).

    ``node(i, j) = S(node(i-1, 2j), node(i-1, 2j+1))``, for complete blocks only.

    Args:
        x: ``[M, E]`` tokens, a floating dtype; any strides.
        merge: the summarizer as a linear map, in the dtype of x: ``weight [G, 1+k, 2C, C]``,
            ``bias [G, C]``, ``scale [2, G, C]`` or None; for m banks G = m and C = E, or G = 1 and C = m·E.
        sequences: which rows form a sequence.
        token: ``[S, E]`` the token before each sequence; with ``carried``, where the sequences continue.
        carried: ``[S, R, m, E]`` the newest nodes of levels 1, 2, … before each sequence.
        backend: ``"auto"``, ``"reference"``, or the name of a kernel implementation.

    Returns:
        ``[m, rows, E]``, the nodes of each bank level by level (`python_ref.layout` has the rows).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or the name of the backend is wrong.
        NotImplementedError: an input carries a forward-mode tangent.
        BackendError: the named backend cannot serve the call.
    """
    check_float("x", x)
    check_shape("x", x, (sequences.tokens, None), "[tokens, embedding]")
    size = x.shape[1]
    check_shape("merge.weight", merge.weight, (None, None, None, None), "[groups, 1 + expand, in, out]")
    groups, taps, _, features = merge.weight.shape
    rows = features if merge.scale is not None else 2 * features
    check_shape("merge.weight", merge.weight, (groups, taps, rows, features), "[groups, 1 + expand, in, out]")
    if features != size and (groups != 1 or features % size):
        raise ValueError(
            f"merge.weight: expected {size} features a group, or one group of a multiple, got {groups} of {features}"
        )
    check_shape("merge.bias", merge.bias, (groups, features), "[groups, features]")
    if merge.scale is not None:
        check_shape("merge.scale", merge.scale, (2, groups, features), "[2, groups, features]")
    if (token is None) != (carried is None) or (token is None) != (sequences.carried_levels is None):
        raise ValueError("token, carried: expected both with sequences that continue, and neither else")
    if token is not None and carried is not None:
        check_shape("token", token, (sequences.count, size), "[sequences, embedding]")
        rows = state_rows(sequences.carried_levels or 0, taps - 1)
        shape = (sequences.count, rows, groups * features // size, size)
        check_shape("carried", carried, shape, "[sequences, rows, bank, embedding]")
    for name, value in (("merge.weight", merge.weight), ("merge.bias", merge.bias), ("merge.scale", merge.scale),
                        ("token", token), ("carried", carried)):  # fmt: skip
        if value is not None:
            _refuse_tangent(name, value)
            check_float(name, value, x.dtype)
            check_device(name, value, x.device)
    _refuse_tangent("x", x)
    where = pack(sequences, taps - 1, resolve(backend, "build_tree", x.device, x.dtype))
    return _OPS.build_tree(x, merge.weight, merge.bias, merge.scale, token, carried, *where)


def attend(
    token_qkv: Tensor, node_qv: Tensor, heads: int, sequences: Sequences, *, expand: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Single-vector attention of every token over its memory (specification, section 4).

    ``out_n = Σ_s softmax_s(q_s · k_n / √d) · v_s`` over the token itself and the last complete block of
    every level and bank: q and v come from the slots, k from the current token.

    Args:
        token_qkv: ``[M, 3·E]`` q, k and v of the tokens, a floating dtype; any strides.
        node_qv: ``[m, rows, 2·E]`` q and v of the nodes, rows as `build_tree` lays them out.
        heads: H, a divisor of E.
        sequences: which rows form a sequence.
        expand: k of the expander.
        backend: ``"auto"``, ``"reference"``, or the name of a kernel implementation.

    Returns:
        ``out [M, E]`` in the dtype of ``token_qkv``, and ``lse [M, H]`` in float32 (float64 for
        float64), not differentiable. Both are 0 on rows that no sequence holds.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, ``heads`` or the name of the backend is wrong.
        BackendError: the named backend cannot serve the call.
    """
    check_float("token_qkv", token_qkv)
    check_positive("heads", heads)
    check_shape("token_qkv", token_qkv, (sequences.tokens, None), "[tokens, 3·embedding]")
    size = token_qkv.shape[1] // 3
    if token_qkv.shape[1] != 3 * size or size % heads:
        raise ValueError(f"heads: expected a divisor of the embedding {token_qkv.shape[1] / 3:g}, got {heads}")
    check_float("node_qv", node_qv, token_qkv.dtype)
    check_device("node_qv", node_qv, token_qkv.device)
    rows = node_rows(sequences, expand)
    check_shape("node_qv", node_qv, (None, rows, 2 * size), "[bank, rows, 2·embedding]")
    _refuse_tangent("token_qkv", token_qkv)
    _refuse_tangent("node_qv", node_qv)
    served = resolve(backend, "attend", token_qkv.device, token_qkv.dtype, size // heads)
    where = pack(sequences, expand, served)
    out, lse = _OPS.attend(token_qkv, node_qv, heads, *where)
    return out, lse


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
    check_positive("tokens", tokens)
    check_shape("kv", kv, (batch, None, 2, heads, size), "[batch, keys, 2, heads, head size]")
    keys = kv.shape[1]
    if tokens > keys:
        raise ValueError(f"tokens: expected at most the {keys} keys of kv, got {tokens}")
    if rows != tokens and rows != keys:
        raise ValueError(f"q: expected {tokens} rows of the tokens or all {keys} of the keys, got {rows}")
    memory = rows - tokens
    check_shape("bias", bias, (4, heads, size), "[kinds, heads, head size]")
    check_shape("table", table, (None, heads, size), "[distances, heads, head size]")
    check_positive("future_row", future_row, 0)
    if 0 < future_row < keys:
        raise ValueError(f"future_row: expected 0, or {keys} or more to begin behind the other table, got {future_row}")
    needed = max(keys, future_row + memory + 1)
    if table.shape[0] < needed:
        raise ValueError(f"table: expected at least {needed} rows, got {table.shape[0]}")
    window = tokens if window is None else window
    check_positive("window", window)
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
            _refuse_tangent(name, value)
    served = resolve(backend, "look_ahead_attend", q.device, q.dtype, size)
    out, total = _OPS.look_ahead_attend(q, kv, bias, table, output, lse, start, tokens, window, future_row, served)
    return out, total


def _refuse_tangent(name: str, tensor: Tensor) -> None:
    """The operations have no forward-mode derivative, and the dispatcher would drop a tangent without a word."""
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name}: expected a tensor without a forward-mode tangent; use backward mode")


def under_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of an active ``torch.autocast`` region, as `torch.nn.functional.linear` takes it."""
    kind = tensor.device.type
    if autocasts(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def autocasts(device_type: str) -> bool:
    """Whether a ``torch.autocast`` region is active for a type of device; some (meta) have none."""
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which the step's operations know nothing."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
