"""What the forms of a mixing layer share: its parts, and the checks of what a caller hands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from python_ref.around import Around
from python_ref.checks import check_device, check_float, check_shape

from ..backend.transforms import autocasts
from ..states.memory import MemoryState
from .parameters import is_plain_linear, parameter
from .projections import SingleVectorAttention
from .summarizers import Expander, LinearMapSummarizer


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


def weight_of(layer: MixingParts) -> Tensor | None:
    """A parameter that has the layer's dtype and device; None where its parts fetch theirs when they are called."""
    q = layer._modules["sva"]._modules.get("q")
    if q is not None and is_plain_linear(q):
        return parameter(q, "weight")
    return next((p for p in layer.parameters() if p.is_floating_point() and not p.is_meta), None)


def check_input(layer: MixingParts, x: Tensor) -> None:
    """Whether x is ``[B, L, E]`` on the layer's device and in its dtype (or a region of autocast casts it)."""
    check_float("x", x)
    check_shape("x", x, (None, None, layer.embedding), "[batch, length, embedding]")
    weight = weight_of(layer)
    if weight is None:
        return
    check_device("x", x, weight.device)
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"x: expected dtype {weight.dtype} of the layer (or torch.autocast), got {x.dtype}")


def fit(layer: MixingParts, state: object, batch: int, tokens: int, device: torch.device) -> MemoryState:
    """The state with room for ``tokens`` more, where it is one of this layer's and of ``batch`` rows."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
    state.check_for(batch, layer.embedding, layer.bank, layer.expand, device)
    return state.with_room(state.max_position + tokens)


def merge_stacks_of(layer: MixingParts) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's own merge: stacks ``[P, h, m, E]`` of two nodes → the stack ``[P, h+k, m, E]`` of their summary."""
    summarizer, expander = layer.summarizer, layer.expander
    if expander is None:
        return summarizer
    return lambda left, right: summarizer(expander(left), expander(right))


def linear_map_of(layer: MixingParts) -> LinearMapSummarizer | None:
    """The summarizer, where its map and the expander's are all there is to a merge; else both must be called."""
    modules = layer._modules
    summarizer, expander = modules.get("summarizer"), modules.get("expander")
    if not isinstance(summarizer, LinearMapSummarizer) or summarizer.must_be_called():
        return None
    if expander is not None and (not isinstance(expander, Expander) or expander.must_be_called()):
        return None
    return summarizer
