"""Single-vector attention over the memory of every position (docs/definition.md, section 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from python_ref import attention as reference
from python_ref.checks import check_device, check_float, check_no_tangent, check_positive, check_shape
from python_ref.layout import Layout, node_rows
from python_ref.precision import compute_dtype, no_autocast
from python_ref.sequences import Sequences

from ..backend.choice import declare, functional, resolve
from .flops import visible_slots
from .library import NO_WHERE, OPS, WHERE, Where, pack, register, second_derivative


def attend(
    token_qkv: Tensor, node_qv: Tensor, heads: int, sequences: Sequences, *, expand: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Single-vector attention of every token over its memory (section 4 of the definition).

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
        NotImplementedError: an input carries a forward-mode tangent.
        BackendError: the named backend cannot serve the call.
    """
    rows = node_rows(sequences, expand)
    check_float("token_qkv", token_qkv)
    heads = check_positive("heads", heads)
    check_shape("token_qkv", token_qkv, (sequences.tokens, None), "[tokens, 3·embedding]")
    size = token_qkv.shape[1] // 3
    if token_qkv.shape[1] != 3 * size or size % heads:
        raise ValueError(f"heads: expected a divisor of the embedding {token_qkv.shape[1] / 3:g}, got {heads}")
    check_float("node_qv", node_qv, token_qkv.dtype)
    check_device("node_qv", node_qv, token_qkv.device)
    check_shape("node_qv", node_qv, (None, rows, 2 * size), "[bank, rows, 2·embedding]")
    check_no_tangent("token_qkv", token_qkv)
    check_no_tangent("node_qv", node_qv)
    if functional(backend, "attend"):
        layout = Where(pack(sequences, expand, "reference")).layout(token_qkv.device)
        with no_autocast(token_qkv.device):
            return reference.attend_with(token_qkv, node_qv, heads, layout)
    served = resolve(backend, "attend", token_qkv.device, token_qkv.dtype, size // heads)
    out, lse = OPS.attend(token_qkv, node_qv, heads, *pack(sequences, expand, served))
    return out, lse


def _run(token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout, kernels: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = kernels.attend(token_qkv, node_qv, heads, layout)
    return results


def _fake(token_qkv: Tensor, node_qv: Tensor, heads: int, *packed: Any) -> tuple[Tensor, Tensor]:
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    lse = compute_dtype(token_qkv.dtype)
    return token_qkv.new_empty(tokens, size), token_qkv.new_empty(tokens, heads, dtype=lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    token_qkv, node_qv, ctx.heads, spans, *ctx.sizes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(token_qkv, node_qv, *output, spans)


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, spans = ctx.saved_tensors
    return (*OPS.attend_backward(grad, *tensors, ctx.heads, spans, *ctx.sizes), None, *NO_WHERE)


def _run_backward(
    grad: Tensor,
    token_qkv: Tensor,
    node_qv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    layout: Layout,
    kernels: Any,
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = kernels.attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout)
    return grads


def _fake_backward(grad: Tensor, token_qkv: Tensor, node_qv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return token_qkv.new_empty(token_qkv.shape), node_qv.new_empty(node_qv.shape)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, token_qkv, node_qv, _, _, ctx.heads, spans, *ctx.sizes = inputs
    ctx.save_for_backward(grad, token_qkv, node_qv, spans)


def _second_gradient(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, token_qkv, node_qv, spans = ctx.saved_tensors
    where = Where((spans, *ctx.sizes))
    layout = where.layout(token_qkv.device)

    def forward(given: list[Any]) -> Tensor:
        tokens, nodes = given
        return reference.attend_with(tokens, nodes, ctx.heads, layout)[0]

    found = second_derivative("attend", where.backend, forward, [token_qkv, node_qv], grad, list(grad_grads))
    # out and lse are functions of the other inputs, and were treated as such.
    return (*found, None, None, None, *NO_WHERE)


def _flops(token_qkv: Any, node_qv: Any, heads: int, *packed: Any, products: int = 2, **_: Any) -> int:
    """Of E features each: for a slot its score and its share of the mix."""
    where = Where(packed)
    count: int = 2 * products * (token_qkv[1] // 3) * visible_slots(where.sequences, node_qv[0], where.expand)
    return count


def _backward_flops(grad: Any, token_qkv: Any, node_qv: Any, out: Any, lse: Any, *rest: Any, **_: Any) -> int:
    """The scores again, the gradient of a weight, and those of q, k and v."""
    return _flops(token_qkv, node_qv, *rest, products=5)


declare("attend", widest=(256, 128), triton=("cuda",), cpp=("cpu",))
register(
    f"attend(Tensor token_qkv, Tensor node_qv, int heads, {WHERE}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _gradient,
    _save,
    "attention",
    flops=_flops,
)
register(
    f"attend_backward(Tensor grad, Tensor token_qkv, Tensor node_qv, Tensor out, Tensor lse, int heads, {WHERE}) "
    "-> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _second_gradient,
    _save_backward,
    "attention",
    flops=_backward_flops,
)
