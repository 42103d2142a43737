"""How an operation is registered with PyTorch: a schema, its implementation, its rule of shapes, its gradient.

`register` takes one operation, and each module beside this one registers its own. An operation of the parallel form
takes the name of a resolved backend and calls that backend's launcher, so that what runs is what
`backend.choice.resolve` said. Gradients are operations too. Those of the reference and of the extension can be
differentiated again, on the reference; Triton's raise. Operations of the sequential form are the reference here; the
extension (csrc/register.cpp) takes their place on the CPU and on CUDA once it is loaded, which `ops.step` asks for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from python_ref.layout import Layout, make_layout
from python_ref.precision import no_autocast
from python_ref.sequences import Sequences

from ..backend import extension
from ..backend.choice import BackendError
from .flops import Formula, count_with

_LIBRARY = torch.library.Library("lmn_kernels", "DEF")

OPS = torch.ops.lmn_kernels

# How a schema says which rows belong together (`python_ref.sequences`), k of the expander, and who computes.
WHERE = (
    "Tensor? spans, SymInt tokens, SymInt sequences, SymInt max_position, int? carried_levels, int expand, str backend"
)
# The gradients of what `WHERE` names: there are none.
NO_WHERE = (None,) * 7


def pack(sequences: Sequences, expand: int, backend: str) -> tuple[Any, ...]:
    """The arguments that `WHERE` names.

    Raises:
        ValueError: the sequences are those of rows in another order.
    """
    if sequences.order is not None:
        raise ValueError("sequences: expected those of rows in order (order.take, in_order), got ones with an order")
    sizes = sequences.tokens, sequences.count, sequences.max_position, sequences.carried_levels
    return (sequences.spans, *sizes, expand, backend)


class Where:
    """What `pack` packed."""

    def __init__(self, packed: Sequence[Any]):
        spans, tokens, count, max_position, levels, self.expand, self.backend = packed
        self.sequences = Sequences(tokens, count, max_position, spans, levels)

    def layout(self, device: torch.device) -> Layout:
        """A layout that is not kept: its tables may be those of a trace."""
        return Layout(self.sequences, self.expand, device)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    module: str | None = None,
    *,
    flops: Formula,
) -> Callable[..., Any]:
    """Declare an operation, and the reference or a launcher as its implementation on every device.

    Args:
        schema: ``name(arguments) -> results``.
        implementation: computes in the dtypes it is given: what autocast casts is cast before (`under_autocast`).
            Where ``module`` is given, its schema ends with `WHERE`, and it takes a `Layout` and the `launcher` in the
            place of that.
        fake: results of the right shape and dtype.
        gradient, save: those of `torch.library.register_autograd`; an operation without them has no gradient.
        module: where each backend computes a batch of sequences: see `launcher`.
        flops: how much arithmetic it is: see `ops.flops`.

    Returns:
        The implementation, also where the extension takes its place.
    """

    def run(first: Tensor, *rest: Any) -> Any:
        if module is not None:
            where = Where(rest[-len(NO_WHERE) :])
            kernels = launcher(module, where.backend)
            layout = make_layout(where.sequences, where.expand, first.device)
            rest = (*rest[: -len(NO_WHERE)], layout, kernels)
        if not torch._C._is_any_autocast_enabled():
            return implementation(first, *rest)
        with no_autocast(first.device):
            return implementation(first, *rest)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmn_kernels::{name}", fake, lib=_LIBRARY)
    if gradient is not None:
        torch.library.register_autograd(f"lmn_kernels::{name}", gradient, setup_context=save, lib=_LIBRARY)
    count_with(name, flops)
    return run


def launcher(name: str, backend: str) -> ModuleType:
    """The module of a backend that implements the operations of ``tree``, ``attention`` or ``look_ahead``.

    Triton and its kernels are imported at the first call that needs them, and so is the extension.

    Raises:
        BackendError: the extension cannot be loaded; a traced program may have been made where it could.
    """
    if backend == "cpp" and (reason := extension.obstacle("cpu")) is not None:
        raise BackendError(f"backend='cpp' cannot serve {name}: {reason}")
    return importlib.import_module(f"python_ref.{name}" if backend == "reference" else f"lmn_kernels._{backend}.{name}")


def second_derivative(
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

    Raises:
        RuntimeError: the first derivative was neither the reference's nor the extension's.
    """
    if backend not in ("reference", "cpp"):
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
