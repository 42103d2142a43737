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

from python_ref.step import StepWeights

from ..states.memory import OFFSET, MemoryState

_new, _set = object.__new__, object.__setattr__


class StepPlan:
    """A layer's weights as the extension holds them (csrc/layer.cpp, ``Layer``), and where they came from."""

    __slots__ = ("backend", "expand", "heads", "native")

    native: Any

    def __init__(self, owner: nn.Module, weights: StepWeights, backend: str):
        self.expand, self.heads, self.backend = weights.expand, weights.heads, backend
        modules: list[Any] = list(owner.modules())[1:]
        # (dictionary, key, what was found there)
        sources = [
            (holder, name, value)
            for module in modules
            for holder in (module._modules, module._parameters)
            for name, value in holder.items()
        ]
        sources += [(module.__dict__, "eps", module.eps) for module in modules if "eps" in module.__dict__]
        hooks = tuple(h for module in modules for h in (module._forward_hooks, module._forward_pre_hooks))
        # Of each module the class that it was of, and where a forward of its own would stand.
        plain = tuple((module, type(module), module.__dict__) for module in modules)
        extension = importlib.import_module("lmn_kernels._C")
        self.native = extension.Layer(*weights, tuple(owner._modules.items()), tuple(sources), hooks, plain)

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
        return all(id(t) in own and type(t) in (Tensor, nn.Parameter) for t in (*weights.tensors, *weights.block))

    def serves(self, owner: Any, x: Tensor, state: MemoryState) -> bool:
        """Whether nothing has changed, and nothing but plain tensors is involved, for which no gradient is recorded."""
        return (
            type(state) is MemoryState
            and not (every_module._global_forward_hooks or every_module._global_forward_pre_hooks)
            and self.native.ready(owner._modules, x, state.token)
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

    def step_(self, x: Tensor, state: MemoryState, slots: Tensor | None) -> Tensor:
        y: Tensor = self.native.decode_(x, slots, state.position, state.token, state.nodes, state.q, state.v)
        state.note_tokens(x.shape[1])
        return y
