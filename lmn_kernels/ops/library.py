"""The only file that registers operations: schemas, implementations, shape rules, gradients.

An operation of the parallel form takes the name of a resolved backend and calls that backend's function, so
that what runs is what `choice.resolve` said. Gradients are operations too; they can be differentiated again
on the reference, and raise elsewhere. Those of the sequential form are the reference here; the extension
(csrc/register.cpp) takes their place on the CPU and on CUDA once it is loaded, which `step` asks for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from python_ref import attention as ref_attention
from python_ref import look_ahead as ref_look_ahead
from python_ref import step as ref_step
from python_ref import tree as ref_tree
from python_ref.layout import Layout, make_layout, node_rows
from python_ref.precision import compute_dtype, no_autocast
from python_ref.sequences import Sequences

_LIBRARY = torch.library.Library("lmn_kernels", "DEF")

# (first row, length, offset) of each sequence or None, and sizes: see python_ref.sequences.Sequences.
_WHERE = "Tensor? spans, SymInt sequences, SymInt max_position, int? carried_levels, int expand, str backend"

_LIBRARY.define(
    f"build_tree(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? token, Tensor? carried, {_WHERE}) "
    "-> Tensor"
)
_LIBRARY.define(
    "build_tree_backward(Tensor grad, Tensor x, Tensor nodes, Tensor weight, Tensor bias, Tensor? scale, "
    f"Tensor? token, Tensor? carried, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(f"attend(Tensor token_qkv, Tensor node_qv, int heads, {_WHERE}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attend_backward(Tensor grad, Tensor token_qkv, Tensor node_qv, Tensor out, Tensor lse, int heads, {_WHERE}) "
    "-> (Tensor, Tensor)"
)

# Rows, start, T, W and where the second table begins: see python_ref.look_ahead.
_REACH = "Tensor? start, SymInt tokens, SymInt window, SymInt future_row, str backend"
_LIBRARY.define(
    f"look_ahead_attend(Tensor q, Tensor kv, Tensor bias, Tensor table, Tensor? output, Tensor? lse, {_REACH}) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "look_ahead_attend_backward(Tensor grad, Tensor grad_lse, Tensor q, Tensor kv, Tensor bias, Tensor table, "
    f"Tensor out, Tensor total, Tensor? output, Tensor? lse, {_REACH}) -> (Tensor, Tensor, Tensor, Tensor)"
)

# One token or several of each row into a pool of states (python_ref.step). No gradients.
_STEP = "Tensor[] weights, str summarizer, int heads, int expand, Tensor[] block, float[] eps"
_SLOTS = "Tensor(a!) position, Tensor(b!) token, Tensor(c!) nodes, Tensor(d!) q, Tensor(e!) v"
_LIBRARY.define(f"update_(Tensor x, Tensor? slots, {_SLOTS}, {_STEP}) -> ()")
_LIBRARY.define(f"decode_(Tensor x, Tensor? slots, {_SLOTS}, {_STEP}) -> Tensor")
_LIBRARY.define(
    f"step(Tensor x, Tensor position, Tensor token, Tensor nodes, Tensor q, Tensor v, {_STEP}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def pack(sequences: Sequences, expand: int, backend: str) -> tuple[Any, ...]:
    """The arguments that `_WHERE` names."""
    levels = sequences.carried_levels
    return sequences.spans, sequences.count, sequences.max_position, levels, expand, backend


def _unpack(tokens: int, where: tuple[Any, ...]) -> tuple[Sequences, int]:
    """The batch that `pack` packed, and k."""
    spans, count, max_position, levels, expand, _ = where
    return Sequences(tokens, count, max_position, spans, levels), expand


def _layout(tokens: int, where: tuple[Any, ...], device: torch.device) -> Layout:
    return make_layout(*_unpack(tokens, where), device)


def _fresh_layout(tokens: int, where: tuple[Any, ...], device: torch.device) -> Layout:
    """A layout that is not kept: its tables may be those of a trace."""
    return Layout(*_unpack(tokens, where), device)


def _bank(x: Tensor, weight: Tensor) -> int:
    return weight.shape[0] * weight.shape[3] // x.shape[1]


def _module(name: str, backend: str) -> ModuleType:
    """The module of a backend that implements the operations of ``tree``, ``attention`` or ``look_ahead``.

    Triton and its kernels are imported at the first call that needs them.
    """
    return importlib.import_module(f"python_ref.{name}" if backend == "reference" else f"lmn_kernels._{backend}.{name}")


def _build_tree(x, weight, bias, scale, token, carried, *where):
    merge = ref_tree.LinearMerge(weight, bias, scale)
    layout = _layout(x.shape[0], where, x.device)
    return _module("tree", where[-1]).build_tree(x, merge, _bank(x, weight), token, carried, layout)


def _build_tree_backward(grad, x, nodes, weight, bias, scale, token, carried, *where):
    merge = ref_tree.LinearMerge(weight, bias, scale)
    layout = _layout(x.shape[0], where, x.device)
    grads = _module("tree", where[-1]).build_tree_backward(grad, x, nodes, merge, token, layout)
    return tuple(x.new_empty(0) if part is None else part for part in grads)


def _attend(token_qkv, node_qv, heads, *where):
    layout = _layout(token_qkv.shape[0], where, token_qkv.device)
    return _module("attention", where[-1]).attend(token_qkv, node_qv, heads, layout)


def _attend_backward(grad, token_qkv, node_qv, out, lse, heads, *where):
    layout = _layout(token_qkv.shape[0], where, token_qkv.device)
    return _module("attention", where[-1]).attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout)


def _look_ahead_attend(q, kv, bias, table, output, lse, start, tokens, window, future_row, backend):
    run = _module("look_ahead", backend).attend
    return run(q, kv, bias, table, output, lse, start, tokens, window, future_row)


def _look_ahead_attend_backward(grad, grad_lse, q, kv, bias, table, out, total, output, lse, *reach):
    # A kernel looks at what the softmax began with only through the merged result.
    return _module("look_ahead", reach[-1]).attend_backward(grad, grad_lse, q, kv, bias, table, out, total, *reach[:-1])


def _update_(x, slots, position, token, nodes, q, v, weights, summarizer, heads, expand, block, eps):
    _refuse_gradients(x, token, nodes, q, v, *weights, *block)
    state, around = ref_step.Slots(position, token, nodes, q, v), ref_step.Around(block, eps)
    ref_step.run_(x, slots, state, weights, summarizer, heads, expand, around, attends=False)


def _decode_(x, slots, position, token, nodes, q, v, weights, summarizer, heads, expand, block, eps):
    _refuse_gradients(x, token, nodes, q, v, *weights, *block)
    state, around = ref_step.Slots(position, token, nodes, q, v), ref_step.Around(block, eps)
    return ref_step.run_(x, slots, state, weights, summarizer, heads, expand, around, attends=True)


def _step(x, position, token, nodes, q, v, *rest):
    state = [part.clone(memory_format=torch.contiguous_format) for part in (position, token, nodes, q, v)]
    return (_decode_(x, None, *state, *rest), *state)


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("the step's operations record no gradients: call them under torch.no_grad()")


def _outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation computes in the dtypes it is given: what autocast casts is cast before (`under_autocast`)."""

    def run(first: Tensor, *rest: Any) -> Any:
        with no_autocast(first.device):
            return implementation(first, *rest)

    return run


def _build_tree_fake(x, weight, bias, scale, token, carried, *where):
    return x.new_empty(_bank(x, weight), node_rows(*_unpack(x.shape[0], where)), x.shape[1])


def _build_tree_backward_fake(grad, x, nodes, weight, bias, scale, token, carried, *where):
    like = (x, weight, bias, scale, token, carried)
    return tuple(x.new_empty(0 if part is None else part.shape) for part in like)


def _attend_fake(token_qkv, node_qv, heads, *where):
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    lse = compute_dtype(token_qkv.dtype)
    return token_qkv.new_empty(tokens, size), token_qkv.new_empty(tokens, heads, dtype=lse)


def _attend_backward_fake(grad, token_qkv, node_qv, out, lse, heads, *where):
    return token_qkv.new_empty(token_qkv.shape), node_qv.new_empty(node_qv.shape)


def _look_ahead_attend_fake(q, *rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _look_ahead_attend_backward_fake(grad, grad_lse, q, kv, bias, table, *rest):
    return tuple(part.new_empty(part.shape) for part in (q, kv, bias, table))


def _update_fake(x, *rest):
    return None


def _decode_fake(x, *rest):
    return x.new_empty(x.shape)


def _step_fake(x, position, token, nodes, q, v, *rest):
    return tuple(part.new_empty(part.shape) for part in (x, position, token, nodes, q, v))


for _name, _implementation, _fake in (
    ("build_tree", _build_tree, _build_tree_fake),
    ("build_tree_backward", _build_tree_backward, _build_tree_backward_fake),
    ("attend", _attend, _attend_fake),
    ("attend_backward", _attend_backward, _attend_backward_fake),
    ("look_ahead_attend", _look_ahead_attend, _look_ahead_attend_fake),
    ("look_ahead_attend_backward", _look_ahead_attend_backward, _look_ahead_attend_backward_fake),
    ("update_", _update_, _update_fake),
    ("decode_", _decode_, _decode_fake),
    ("step", _step, _step_fake),
):
    _LIBRARY.impl(_name, _outside_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmn_kernels::{_name}", _fake, lib=_LIBRARY)

_OPS = torch.ops.lmn_kernels
# By name, also where the extension has taken the reference's place.
STEP_REFERENCE = {
    name: _outside_autocast(run) for name, run in (("update_", _update_), ("decode_", _decode_), ("step", _step))
}
_NO_WHERE, _NO_REACH = (None,) * 6, (None,) * 5


def _save_tree(ctx, inputs, output):
    x, weight, bias, scale, token, carried, spans, *sizes = inputs
    ctx.save_for_backward(x, output, weight, bias, scale, token, carried, spans)
    ctx.sizes = sizes


def _tree_gradient(ctx, grad):
    x, nodes, weight, bias, scale, token, carried, spans = ctx.saved_tensors
    grads = _OPS.build_tree_backward(grad, x, nodes, weight, bias, scale, token, carried, spans, *ctx.sizes)
    given = (x, weight, bias, scale, token, carried)
    return (*(None if like is None else g for like, g in zip(given, grads, strict=True)), *_NO_WHERE)


def _save_attend(ctx, inputs, output):
    token_qkv, node_qv, heads, spans, *sizes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(token_qkv, node_qv, *output, spans)
    ctx.heads, ctx.sizes = heads, sizes


def _attend_gradient(ctx, grad, _):
    token_qkv, node_qv, out, lse, spans = ctx.saved_tensors
    grads = _OPS.attend_backward(grad, token_qkv, node_qv, out, lse, ctx.heads, spans, *ctx.sizes)
    return (*grads, None, *_NO_WHERE)


def _save_look_ahead(ctx, inputs, output):
    *tensors, start, tokens, window, future_row, backend = inputs
    ctx.save_for_backward(*tensors, start, *output)
    ctx.reach = tokens, window, future_row, backend


def _look_ahead_gradient(ctx, grad, grad_lse):
    q, kv, bias, table, output, lse, start, out, total = ctx.saved_tensors
    grads = _OPS.look_ahead_attend_backward(
        grad, grad_lse, q, kv, bias, table, out, total, output, lse, start, *ctx.reach
    )
    return (*grads, None, None, *_NO_REACH)


def _second_derivative(
    operation: str,
    backend: str,
    function: Callable[[list[Any]], Tensor],
    inputs: list[Tensor | None],
    grad: Tensor,
    grad_grads: list[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``<∂function/∂inputs · grad, grad_grads>`` with respect to grad and inputs.

    The forward is run again by plain autograd, which keeps it rarely used code without formulas of
    its own.
    """
    if backend != "reference":
        raise RuntimeError(f"{operation}: second derivatives need backend='reference', got {backend!r}")
    further = torch.is_grad_enabled()

    def tracked(tensor: Tensor) -> Tensor:
        # An alias: in the graph, so that the result can be differentiated again, yet nobody's ancestor.
        return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        given = [None if t is None else tracked(t) for t in inputs]
        seed, leaves = tracked(grad), [t for t in given if t is not None]
        result = function(given)
        # A sequence of one token has no node above it, and so no derivative of one.
        first: list[Tensor | None] = [None] * len(leaves)
        if result.requires_grad:
            first = list(torch.autograd.grad(result, leaves, seed, create_graph=True, allow_unused=True))
        wanted = [gg for t, gg in zip(given, grad_grads, strict=True) if t is not None]
        pairs = [
            (g, gg)
            for g, gg in zip(first, wanted, strict=True)
            if gg is not None and g is not None and g.grad_fn is not None
        ]
        if not pairs:
            return [None] * (1 + len(inputs))
        weights, vectors = [g for g, _ in pairs], [gg for _, gg in pairs]
        found = torch.autograd.grad(weights, [seed, *leaves], vectors, allow_unused=True, create_graph=further)
    second = iter(found[1:])
    return [found[0], *(None if t is None else next(second) for t in given)]


def _save_tree_backward(ctx, inputs, output):
    grad, x, nodes, weight, bias, scale, token, carried, spans, *sizes = inputs
    ctx.save_for_backward(grad, x, weight, bias, scale, token, carried, spans)
    ctx.sizes = sizes


def _tree_second_gradient(ctx, *grad_grads):
    grad, x, weight, bias, scale, token, carried, spans = ctx.saved_tensors
    layout = _fresh_layout(x.shape[0], (spans, *ctx.sizes), x.device)

    def forward(given):
        x, weight, bias, scale, token, carried = given
        merge = ref_tree.LinearMerge(weight, bias, scale)
        return ref_tree.build_tree_with(
            lambda left, right: ref_tree.merge_stacks(merge, left, right), x, _bank(x, weight), token, carried, layout
        )

    given = [x, weight, bias, scale, token, carried]
    grad, *grads = _second_derivative("build_tree", ctx.sizes[-1], forward, given, grad, list(grad_grads))
    # The nodes are a function of the other inputs, and were treated as one.
    return (grad, grads[0], None, *grads[1:], *_NO_WHERE)


def _save_attend_backward(ctx, inputs, output):
    grad, token_qkv, node_qv, _, _, heads, spans, *sizes = inputs
    ctx.save_for_backward(grad, token_qkv, node_qv, spans)
    ctx.heads, ctx.sizes = heads, sizes


def _attend_second_gradient(ctx, *grad_grads):
    grad, token_qkv, node_qv, spans = ctx.saved_tensors
    layout = _fresh_layout(token_qkv.shape[0], (spans, *ctx.sizes), token_qkv.device)

    def forward(given):
        token_qkv, node_qv = given
        return ref_attention.attend(token_qkv, node_qv, ctx.heads, layout)[0]

    found = _second_derivative("attend", ctx.sizes[-1], forward, [token_qkv, node_qv], grad, list(grad_grads))
    # out and lse are functions of the other inputs, and were treated as such.
    return (*found, None, None, None, *_NO_WHERE)


def _save_look_ahead_backward(ctx, inputs, output):
    grad, grad_lse, q, kv, bias, table, _, _, output, lse, start, *reach = inputs
    ctx.save_for_backward(grad, grad_lse, q, kv, bias, table, output, lse, start)
    ctx.reach = reach


def _look_ahead_second_gradient(ctx, *grad_grads):
    grad, grad_lse, q, kv, bias, table, output, lse, start = ctx.saved_tensors

    def joined(out: Tensor, total: Tensor) -> Tensor:
        return torch.cat([out.flatten().to(total.dtype), total.flatten()])

    def forward(given):
        q, kv, bias, table = given
        return joined(*ref_look_ahead.attend(q, kv, bias, table, output, lse, start, *ctx.reach[:-1]))

    given, seed = [q, kv, bias, table], joined(grad, grad_lse)
    to_seed, *found = _second_derivative("look_ahead_attend", ctx.reach[-1], forward, given, seed, list(grad_grads))
    to_grad: list[Tensor | None] = [None, None]
    if to_seed is not None:
        out, total = to_seed.split([grad.numel(), grad_lse.numel()])
        to_grad = [out.to(grad.dtype).view(grad.shape), total.view(grad_lse.shape)]
    # The results of the forward are functions of the other inputs, and were treated as such.
    return (*to_grad, *found, None, None, None, None, *_NO_REACH)


for _name, _formula, _save in (
    ("build_tree", _tree_gradient, _save_tree),
    ("attend", _attend_gradient, _save_attend),
    ("look_ahead_attend", _look_ahead_gradient, _save_look_ahead),
    ("build_tree_backward", _tree_second_gradient, _save_tree_backward),
    ("attend_backward", _attend_second_gradient, _save_attend_backward),
    ("look_ahead_attend_backward", _look_ahead_second_gradient, _save_look_ahead_backward),
):
    torch.library.register_autograd(f"lmn_kernels::{_name}", _formula, setup_context=_save, lib=_LIBRARY)
