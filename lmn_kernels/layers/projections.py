"""Single-vector attention as a module: its four projections (docs/definition.md, section 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_ref.checks import check_float, check_shape
from python_ref.step import Linear, attend_slots

from .parameters import is_plain_linear, joins_projections, known_by_weights, weight_and_bias


@known_by_weights
class SingleVectorAttention(nn.Module):
    """The projections q, k, v and out_proj, under the original's names.

    Args:
        embedding: E.
        heads: H, a divisor of E.
        bias: whether the projections have one.

    Attributes:
        head_dim: D = E / H.
        scale: √D, by which scores are divided.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out_proj: nn.Linear

    def __init__(
        self,
        embedding: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        if embedding % heads:
            raise ValueError(f"heads: expected a divisor of embedding={embedding}, got {heads}")
        self.embedding = embedding
        self.heads = heads
        for name in ("q", "k", "v", "out_proj"):
            self.add_module(name, nn.Linear(embedding, embedding, bias=bias, device=device, dtype=dtype))

    @property
    def head_dim(self) -> int:
        return self.embedding // self.heads

    @property
    def scale(self) -> float:
        return math.sqrt(self.head_dim)

    def token_qkv(self, x: Tensor, joins: bool | None = None) -> Tensor:
        """q, k and v of tokens, by one product where their weights may be joined: ``[..., E]`` → ``[..., 3E]``."""
        return self._project(x, joins, "q", "k", "v")

    def node_qv(self, nodes: Tensor, joins: bool | None = None) -> Tensor:
        """q and v of nodes, by one product where their weights may be joined: ``[..., E]`` → ``[..., 2E]``."""
        return self._project(nodes, joins, "q", "v")

    def step_tensors(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Weight and bias of q, k, v and out_proj."""
        q, k, v, out = (weight_and_bias(self._modules[name]) for name in ("q", "k", "v", "out_proj"))
        return q, k, v, out

    def _project(self, x: Tensor, joins: bool | None, *names: str) -> Tensor:
        layers: list[Any] = [self._modules[name] for name in names]
        if not (joins_projections(self) if joins is None else joins):
            return torch.cat([layer(x) for layer in layers], -1)
        weight, bias = torch.cat([layer.weight for layer in layers]), None
        if any(layer.bias is not None for layer in layers):
            bias = torch.cat([weight_and_bias(layer).bias for layer in layers])
        return F.linear(x, weight, bias)

    def forward(self, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention over a materialised memory tensor, for inspection and for code written for the original.

        Args:
            memory: ``[B, L, S, E]`` in the slot order of section 2, the current token first.
            valid: ``[B, L, S]`` or ``[L, S]`` bool, which slots hold something; all where None.

        Returns:
            ``[B, L, E]``.
        """
        check_float("memory", memory)
        check_shape("memory", memory, (None, None, None, self.embedding), "[batch, length, slots, embedding]")
        places, modules = memory.shape[:2], self._modules
        rows = memory.flatten(0, 1)
        q, k, v = _through(modules["q"], rows), _through(modules["k"], rows[:, 0]), _through(modules["v"], rows)
        if valid is not None:
            valid = valid.expand(*places, -1).flatten(0, 1)
        return _through(modules["out_proj"], attend_slots(k, q, v, valid, self.heads).unflatten(0, places))


def _through(part: Any, x: Tensor) -> Tensor:
    """What a projection makes of x: called, unless its weights say all, for the price of a call of a module."""
    y: Tensor = F.linear(x, part.weight, part.bias) if is_plain_linear(part) else part(x)
    return y
