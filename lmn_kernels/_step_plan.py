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

from torch import Tensor, nn

from .decoding import StepWeights
from .state import MemoryState


class StepPlan:
    """A layer's weights as the extension holds them (csrc/register.cpp, ``Layer``), and where they came from."""

    __slots__ = ("backend", "children", "expand", "hooks", "native", "sources")

    native: Any

    def __init__(self, owner: nn.Module, weights: StepWeights, backend: str):
        self.native = importlib.import_module("lmn_kernels._C").Layer(*weights)
        self.expand, self.backend = weights.expand, backend
        modules: list[Any] = list(owner.modules())[1:]
        self.children = tuple(owner._modules.items())
        # (dictionary, key, what was found there)
        self.sources = tuple(
            (holder, name, value)
            for module in modules
            for holder in (module._modules, module._parameters)
            for name, value in holder.items()
        ) + tuple((module.__dict__, "eps", module.eps) for module in modules if "eps" in module.__dict__)
        self.hooks = tuple(h for module in modules for h in (module._forward_hooks, module._forward_pre_hooks))

    @staticmethod
    def fits(owner: nn.Module, weights: StepWeights) -> bool:
        """Whether the weights are the layer's parameters themselves: what is made of them may change unseen."""
        own = {id(parameter) for parameter in owner.parameters()}
        return all(id(tensor) in own for tensor in (*weights.tensors, *weights.block))

    def serves(self, owner: Any, x: Tensor, state: MemoryState) -> bool:
        """Whether nothing has changed, and nothing but plain tensors is involved, for which no gradient is recorded."""
        return (
            type(state) is MemoryState
            and self.native.ready(owner._modules, self.children, self.sources, self.hooks, x, state.token)
            and state.expand == self.expand
            and owner.step_backend == self.backend
        )

    def step(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        last = state.max_position + 1
        if last >> (state.levels + 1):
            state = state.with_room(last)
        y, position, token, nodes, q, v = self.native.step(
            x_t, state.position, state.token, state.nodes, state.q, state.v
        )
        return y, MemoryState.of({
            "position": position, "token": token, "nodes": nodes, "q": q, "v": v,
            "expand": self.expand, "levels": state.levels, "max_position": last,
        })  # fmt: skip

    def step_(self, x: Tensor, state: MemoryState, slots: Tensor | None) -> Tensor:
        y = self.native.decode_(x, slots, state.position, state.token, state.nodes, state.q, state.v)
        state.note_tokens(x.shape[1])
        return y
