"""What a layer remembers between steps, so that a step of a small layer is arithmetic and not Python.

Finding out which backend serves, gathering parameters out of modules and crossing the dispatcher take several
times as long as the step of 32 features. A plan does it once, and is dropped as soon as one of the things that
it was made from is another one: a parameter, a module, a hook, the layer's backend. The environment is read
when it is made. It holds on to parts of the layer, never to the layer itself, which would keep it from being
freed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

from python_ref.layout import levels_in
from python_ref.step import Slots, StepWeights, TokenStep

from ..backend.transforms import autocasts, transformed
from ..states.memory import OFFSET, MemoryState
from .parameters import is_zeros

_new, _set = object.__new__, object.__setattr__


class StepPlan:
    """A layer's weights as the extension holds them (csrc/layer.cpp, ``Layer``), and where they came from.

    Args:
        owner: the layer.
        weights: its own.
        served: who takes the steps, ``"cpp"`` or ``"reference"``, which holds them in an `Interpreted`.
    """

    __slots__ = ("backend", "expand", "heads", "in_place", "native", "reference", "shape", "zeros")

    native: Any

    def __init__(self, owner: Any, weights: StepWeights, served: str):
        self.expand, self.heads, self.backend = weights.expand, weights.heads, owner.step_backend
        self.in_place, self.reference = served != "reference", TokenStep(weights, owner.bank)
        self.shape = owner.bank, owner.embedding
        # In the place of biases that are not there: these do not follow parameters to another dtype or device.
        self.zeros = next((t for t in (*weights.tensors, *weights.block) if is_zeros(t)), None)
        modules: list[Any] = list(owner.modules())[1:]
        # (dictionary, key, what was found there)
        sources = [
            (holder, name, value)
            for module in modules
            for holder in (module._modules, module._parameters)
            for name, value in holder.items()
        ]
        sources += [
            (module.__dict__, name, module.__dict__[name])
            for module in modules
            for name in (("training", "p") if isinstance(module, nn.Dropout) else ("eps",))
            if name in module.__dict__
        ]
        hooks = tuple(h for module in modules for h in (module._forward_hooks, module._forward_pre_hooks))
        # Of each module the class that it was of, and where a forward of its own would stand.
        plain = tuple((module, type(module), module.__dict__) for module in modules)
        found = tuple(owner._modules.items()), tuple(sources), hooks, plain
        if self.in_place:
            self.native = importlib.import_module("lmn_kernels._C").Layer(*weights, *found)
        else:
            self.native = Interpreted(self.reference, self.shape, weights.tensors[0], *found)

    @staticmethod
    def fits(owner: nn.Module, weights: StepWeights) -> bool:
        """Whether the weights are the layer's parameters themselves: what is made of them may change unseen.

        And whether a plan would serve at all: making one takes longer than a step.
        """
        below = list(owner.modules())[1:]
        if torch.is_grad_enabled() or any(m._forward_hooks or m._forward_pre_hooks for m in below):
            return False
        if any("forward" in module.__dict__ for module in below):
            return False
        own = {id(parameter) for parameter in owner.parameters()}
        tensors = *weights.tensors, *weights.block
        plain = (Tensor, nn.Parameter)
        return all((id(t) in own and type(t) in plain and not t.is_meta) or is_zeros(t) for t in tensors)

    def serves(self, owner: Any, x: Tensor, state: MemoryState) -> bool:
        """Whether nothing has changed, and nothing but plain tensors is involved, for which no gradient is recorded."""
        return (
            type(state) is MemoryState
            and not (every_module._global_forward_hooks or every_module._global_forward_pre_hooks)
            and self.native.ready(owner._modules, x, state.token)
            and (self.zeros is None or (x.dtype == self.zeros.dtype and x.device == self.zeros.device))
            and state.expand == self.expand
            and owner.step_backend == self.backend
            and owner.heads == self.heads
            and forward_ad._current_level < 0
        )

    def step(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        levels, bound = state.levels, state._bound + 1
        if (bound - OFFSET) >> (levels + 1):
            last = state.max_position + 1
            state = state.with_room(last)
            levels, bound = state.levels, last + OFFSET
        y, position, token, nodes, q, v = self.native.step(
            x_t, state.position, state.token, state.nodes, state.q, state.v
        )
        # Without the price of a constructor.
        new = _new(MemoryState)
        _set(new, "__dict__", {
            "position": position, "token": token, "nodes": nodes, "q": q, "v": v,
            "expand": self.expand, "levels": levels, "_bound": bound,
        })  # fmt: skip
        return y, new

    def fits_shapes(self, x_t: Tensor, state: MemoryState) -> bool:
        """Whether the shapes are those of the layer; the extension checks for itself."""
        return belong(x_t, state.slots(), *self.shape)

    def take(self, x_t: Tensor, state: MemoryState) -> MemoryState:
        """`step` without an output, of a token as the mixing sees it; q and v of new nodes are nobody's."""
        state = state.with_room(state.max_position + 1)
        return state.advanced(self.reference.take(x_t[:, 0], state.slots(), state.levels))

    def step_(self, x: Tensor, state: MemoryState, slots: Tensor | None) -> Tensor:
        y: Tensor = self.native.decode_(x, slots, state.position, state.token, state.nodes, state.q, state.v)
        state.note_tokens(x.shape[1])
        return y


def belong(x_t: Tensor, slots: Slots, bank: int, size: int) -> bool:
    """Whether a token and a state have a layer's shapes and kinds of dtype, and lie on one device."""
    position, token, nodes, q, v = slots
    shape, tokens = (*position.shape, *nodes.shape[1:2], bank, size), (*position.shape, size)
    same = shape == nodes.shape == q.shape == v.shape and tokens == token.shape
    mine = x_t.shape == (*position.shape, 1, size) and x_t.device == nodes.device
    kinds = position.dtype == torch.int64 and all(part.is_floating_point() for part in (token, nodes, q, v))
    return same and mine and kinds


class Interpreted:
    """What csrc/layer.cpp has as ``Layer``, for the reference: the same fields, the same questions."""

    __slots__ = ("children", "dtype", "hooks", "plain", "shape", "sources", "step_of", "weight")

    def __init__(
        self,
        step_of: TokenStep,
        shape: tuple[int, int],
        weight: Tensor,
        children: tuple[tuple[str, Any], ...],
        sources: tuple[tuple[dict[str, Any], str, Any], ...],
        hooks: tuple[dict[int, Any], ...],
        plain: tuple[tuple[Any, type, dict[str, Any]], ...],
    ):
        self.children, self.sources, self.hooks, self.plain = children, sources, hooks, plain
        self.step_of, self.shape, self.weight = step_of, shape, weight
        self.dtype = weight.dtype  # the eps of a norm that has none of its own goes by it

    def ready(self, modules: dict[str, Any], x: Any, token: Tensor) -> bool:
        """Whether nothing has changed, and x is a plain tensor of the layer's kind without gradients to record."""
        weight = self.weight
        if type(x) is not Tensor or torch.is_grad_enabled() or autocasts(weight.device.type) or transformed():
            return False
        if not x.dtype == weight.dtype == self.dtype or x.device != weight.device:
            return False
        if torch._C._len_torch_dispatch_stack():
            return False
        return (
            len(modules) == len(self.children)
            and all(modules.get(name) is child for name, child in self.children)
            and all(type(module) is kind and "forward" not in own for module, kind, own in self.plain)
            and all(holder.get(name) is value for holder, name, value in self.sources)
            and not any(self.hooks)
        )

    def step(self, x: Tensor, position: Tensor, token: Tensor, nodes: Tensor, q: Tensor, v: Tensor) -> tuple[Any, ...]:
        slots = Slots(position, token, nodes, q, v)
        if not belong(x, slots, *self.shape):
            raise ValueError("x_t, state: expected those of the layer")  # which has words for what is wrong
        y, slots = self.step_of(x[:, 0], slots, levels_in(nodes.shape[1], self.step_of.expand))
        return (y[:, None], *slots)
