"""What the forms of a mixing layer share: its parts, and the checks of what a caller hands in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from python_ref.around import Around
from python_ref.checks import check_device, check_float, check_shape
from python_ref.tree import merge_stacks

from ..backend.transforms import autocasts, recomputes_reentrantly
from ..states.memory import MemoryState
from .parameters import TENSORS, Road, projects_nodes
from .projections import SingleVectorAttention
from .summarizers import Expander
from .tensor_parallel import check_local, is_dtensor


class MixingParts(Protocol):
    """A mixing layer as its forms see it; see `lmn_kernels.LogarithmicMixing`."""

    embedding: int
    heads: int
    bank: int
    backend: str
    step_backend: str
    lean: bool
    summarizer: Callable[[Tensor, Tensor], Tensor]
    expander: Expander | None
    sva: SingleVectorAttention
    _modules: Any

    @property
    def expand(self) -> int: ...

    def parameters(self) -> Any: ...

    def init_state(self, batch_size: int) -> MemoryState: ...

    def around(self) -> Around:
        """What surrounds the mixing, as the layer's modules compute it."""
        ...

    def around_tensors(self) -> tuple[tuple[Tensor, ...], tuple[float, ...]] | None:
        """The same as `StepWeights` has it; None where only the modules know."""
        ...


def make_dropout(rate: float) -> nn.Module | None:
    """A module that drops at a rate; None where that is 0.

    Raises:
        ValueError: the rate is no number in 0 … 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout: expected a number in 0 … 1, got {rate!r}")
    return nn.Dropout(rate) if rate else None


def check_input(layer: MixingParts, x: Tensor, weight: Tensor | None) -> None:
    """Whether x is ``[B, L, E]`` on the device of a weight and in its dtype (or a region of autocast casts it)."""
    if type(x) is not Tensor:
        check_local("x", x, "give the layer x.to_local(), the same on every rank of a tensor-parallel group")
    check_float("x", x)
    check_shape("x", x, (None, None, layer.embedding), "[batch, length, embedding]")
    if weight is None:
        return
    if not x.is_meta and (type(weight) not in TENSORS or weight.is_meta):
        check_at_hand(layer._modules)
    check_device("x", x, weight.device)
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"x: expected dtype {weight.dtype} of the layer (or torch.autocast), got {x.dtype}")


def check_at_hand(modules: dict[str, Any], above: str = "") -> None:
    """Whether every weight is there, or its module has what fetches it when it is called.

    Raises:
        RuntimeError: a wrapper of the layer as a whole fetches them, and was not called.
    """
    for name, module in modules.items():
        if module is None or module._forward_pre_hooks or "forward" in module.__dict__:
            continue
        for own, weight in module._parameters.items():
            if weight is not None and (weight.is_meta or is_dtensor(weight)):
                kept = "meta" if weight.is_meta else "sharded"
                raise RuntimeError(
                    f"{above}{name}.{own}: expected a weight at hand, got a {kept} one. "
                    "Where a wrapper (FSDP2, offloading) fetches the weights when the layer is called, call the layer: "
                    "layer(x, return_state=True), layer(x_t, state=state, return_state=True); or tell FSDP2 of the "
                    "method: register_fsdp_forward_method(layer, 'step')"
                )
        check_at_hand(module._modules, f"{above}{name}.")


def fit(layer: MixingParts, state: object, batch: int, tokens: int, device: torch.device, road: Road) -> MemoryState:
    """The state with room for ``tokens`` more, where it is one of this layer's and of ``batch`` rows."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
    check_local("state", state.nodes, "give a state of to_local() of each tensor")
    # Of projections that are called, the width is known when they are.
    width = layer.embedding if road.joins else state.q.shape[-1]
    state.check_for(batch, layer.embedding, layer.bank, layer.expand, device, width)
    return state.with_room(state.max_position + tokens)


def check_recomputation(*states: MemoryState | None) -> None:
    """Whether gradients that flow through states, given or to be returned, reach what they are of.

    A reentrant checkpoint differentiates the tensors among its arguments and results alone, and cuts a state out of the
    graph without a word.

    Raises:
        RuntimeError: this is the recomputation of one.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not recomputes_reentrantly():
        return
    if any(tensor.requires_grad for state in states if state is not None for tensor in state.slots()):
        raise RuntimeError(
            "torch.utils.checkpoint: expected use_reentrant=False around a layer that takes or returns a state, got "
            "use_reentrant=True, under which no gradient flows through states"
        )


def check_own_memory() -> None:
    """Whether a memory that a layer keeps may move on: a recomputation would take the tokens a second time.

    Raises:
        RuntimeError: gradients are recorded within a backward pass.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                "torch.utils.checkpoint: expected a layer with parallelize=True, or one that is given its state, got "
                "one that keeps its own memory, which the recomputation would move on again"
            )


def merge_stacks_of(layer: MixingParts, road: Road) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's own merge: stacks ``[P, h, m, E]`` of two nodes → the stack ``[P, h+k, m, E]`` of their summary."""
    summarizer: Any = layer.summarizer
    expander = layer.expander
    if expander is None:
        return partial(merge_stacks, summarizer.merge()) if road.merges else summarizer
    return lambda left, right: summarizer(expander(left), expander(right))


def node_qv_of(layer: MixingParts, nodes: Tensor, road: Road) -> Tensor:
    """q and v of nodes ``[..., E]`` → ``[..., 2E]``, for a state; NaN where the attention is called and has its own.

    Of one that hooks alone make a module to call there are q and v: the hooks may be gone at the next step.
    """
    if road.attends or projects_nodes(layer.sva):
        return layer.sva.node_qv(nodes, road.joins)
    return nodes.new_full((*nodes.shape[:-1], 2 * width_of(layer)), torch.nan)


def width_of(layer: MixingParts) -> int:
    """Features of q and v in the layer's states: E, or those of this rank's heads."""
    sva = layer._modules["sva"]
    return sva.own_width() if isinstance(sva, SingleVectorAttention) else layer.embedding
