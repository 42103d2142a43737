"""Tree construction (docs/definition.md, sections 1 and 6)."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor

from python_ref import tree as reference
from python_ref.checks import check_device, check_float, check_no_tangent, check_shape
from python_ref.layout import Layout, node_rows, stack_height, state_rows
from python_ref.precision import no_autocast
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge

from ..backend.choice import declare, functional, resolve
from .flops import nodes
from .library import NO_WHERE, OPS, WHERE, Where, pack, register, second_derivative


def build_tree(
    x: Tensor,
    merge: LinearMerge,
    sequences: Sequences,
    *,
    token: Tensor | None = None,
    carried: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every node of the summary tree of every sequence (sections 1 and 6 of the definition).

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
    _check(x, merge, sequences, token, carried)
    if functional(backend, "build_tree"):
        plain = Where(pack(sequences, merge.weight.shape[1] - 1, "reference"))
        with no_autocast(x.device):
            return _by_autograd(x, merge, token, carried, plain)
    where = pack(sequences, merge.weight.shape[1] - 1, resolve(backend, "build_tree", x.device, x.dtype))
    nodes: Tensor = OPS.build_tree(x, *merge, token, carried, *where)
    return nodes


def _check(x: Tensor, merge: LinearMerge, sequences: Sequences, token: Tensor | None, carried: Tensor | None) -> None:
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
    for name, value in (
        ("merge.weight", merge.weight),
        ("merge.bias", merge.bias),
        ("merge.scale", merge.scale),
        ("token", token),
        ("carried", carried),
    ):
        if value is not None:
            check_float(name, value, x.dtype)
            check_device(name, value, x.device)
            check_no_tangent(name, value)
    check_no_tangent("x", x)


# What the operation and its gradient take of a tree, in their order.
_TREE = "Tensor weight, Tensor bias, Tensor? scale, Tensor? token, Tensor? carried"


def _bank(x: Tensor, weight: Tensor) -> int:
    return weight.shape[0] * weight.shape[3] // x.shape[1]


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    token: Tensor | None,
    carried: Tensor | None,
    layout: Layout,
    kernels: Any,
) -> Tensor:
    merge, bank = LinearMerge(weight, bias, scale), _bank(x, weight)
    nodes: Tensor = kernels.build_tree(x, merge, bank, token, carried, layout)
    return nodes


def _by_autograd(x: Tensor, merge: LinearMerge, token: Tensor | None, carried: Tensor | None, where: Where) -> Tensor:
    """The reference's tree by plain functions alone, for second derivatives and the transforms of torch.func."""

    def merged(left: Tensor, right: Tensor) -> Tensor:
        return reference.merge_stacks(merge, left, right)

    return reference.build_tree_with(merged, x, _bank(x, merge.weight), token, carried, where.layout(x.device))


def _fake(x: Tensor, weight: Tensor, bias: Tensor, scale: Any, token: Any, carried: Any, *packed: Any) -> Tensor:
    where = Where(packed)
    return x.new_empty(_bank(x, weight), node_rows(where.sequences, where.expand), x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, spans = inputs[: -len(NO_WHERE) + 1]
    ctx.sizes = inputs[-len(NO_WHERE) + 1 :]
    ctx.save_for_backward(*tensors, spans, output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tree, spans, nodes = ctx.saved_tensors
    grads = OPS.build_tree_backward(grad, x, nodes, *tree, spans, *ctx.sizes)
    return (*(None if like is None else g for like, g in zip((x, *tree), grads, strict=True)), *NO_WHERE)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    nodes: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    token: Tensor | None,
    carried: Tensor | None,
    layout: Layout,
    kernels: Any,
) -> tuple[Tensor, ...]:
    merge = LinearMerge(weight, bias, scale)
    grads = kernels.build_tree_backward(grad, x, nodes, merge, token, layout)
    return tuple(x.new_empty(0) if part is None else part for part in grads)


def _fake_backward(grad: Tensor, x: Tensor, nodes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0 if part is None else part.shape) for part in (x, *rest[:5]))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, nodes, *tree, spans = inputs[: -len(NO_WHERE) + 1]
    ctx.sizes = inputs[-len(NO_WHERE) + 1 :]
    ctx.save_for_backward(grad, x, *tree, spans)


def _second_gradient(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, *tree, spans = ctx.saved_tensors
    where = Where((spans, *ctx.sizes))

    def forward(given: list[Any]) -> Tensor:
        x, weight, bias, scale, token, carried = given
        return _by_autograd(x, LinearMerge(weight, bias, scale), token, carried, where)

    found = second_derivative("build_tree", where.backend, forward, [x, *tree], grad, list(grad_grads))
    grad, to_x, *to_tree = found
    # The nodes are a function of the other inputs, and were treated as one.
    return (grad, to_x, None, *to_tree, *NO_WHERE)


def _flops(x: Any, weight: Any, bias: Any, scale: Any, token: Any, carried: Any, *packed: Any, **_: Any) -> int:
    where = Where(packed)
    heights = (stack_height(below, where.expand) for below, _ in enumerate(nodes(where.sequences)))
    count: int = 2 * math.prod(weight) * sum(map(operator.mul, nodes(where.sequences), heights))
    return count


def _backward_flops(grad: Any, x: Any, nodes: Any, *rest: Any, **_: Any) -> int:
    """The gradients of both factors of every product."""
    return 2 * _flops(x, *rest)


register(f"build_tree(Tensor x, {_TREE}, {WHERE}) -> Tensor", _run, _fake, _gradient, _save, "tree", flops=_flops)
declare("build_tree", triton=("cuda",), cpp=("cpu",))
register(
    f"build_tree_backward(Tensor grad, Tensor x, Tensor nodes, {_TREE}, {WHERE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _second_gradient,
    _save_backward,
    "tree",
    flops=_backward_flops,
)
