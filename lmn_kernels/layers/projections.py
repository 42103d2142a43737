"""Single-vector attention as a module: its four projections (docs/definition.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_ref.checks import check_float, check_shape
from python_ref.step import Linear, attend_slots

from .parameters import is_plain_linear, joins_projections, known_by_weights, weight_and_bias
from .tensor_parallel import check_local, check_takes, own_heads, ranks_of


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

    def own_heads(self, heads: int, width: int) -> int:
        """How many of H heads q, k and v of ``width`` features each hold: all, or this rank's.

        Raises:
            ValueError: no whole number.
        """
        if width == self.embedding:
            return heads
        return own_heads("sva.q", self.q, width, heads, self.embedding // heads)

    def own_width(self) -> int:
        """Features of q, k and v each on this rank, as far as that can be said before they are called."""
        q: Any = self._modules["q"]
        return int(getattr(q, "out_features", self.embedding)) // ranks_of("sva.q", q, self.heads)

    def project_out(self, mixed: Tensor) -> Tensor:
        """``out_proj`` of what attention gave this rank's heads: ``[..., E]``."""
        if mixed.shape[-1] != self.embedding:
            check_takes("sva.out_proj", self.out_proj, mixed.shape[-1])
        y: Tensor = self.out_proj(mixed)
        if type(y) is not Tensor:
            check_local("sva.out_proj", y)
        return y

    def _project(self, x: Tensor, joins: bool | None, *names: str) -> Tensor:
        layers: list[Any] = [self._modules[name] for name in names]
        if not (joins_projections(self) if joins is None else joins):
            flat = x.flatten(0, -3) if x.dim() > 3 else x  # some adapters take four dimensions for an image
            parts = [layer(flat) for layer in layers]
            _check_parts(parts, names)
            return torch.cat(parts, -1).unflatten(0, x.shape[:-2]) if x.dim() > 3 else torch.cat(parts, -1)
        weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
        if all(bias is None for bias in biases):
            return F.linear(x, weight)
        pairs = zip(layers, biases, strict=True)
        return F.linear(x, weight, torch.cat([weight_and_bias(part).bias if b is None else b for part, b in pairs]))

    def forward(self, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention over a materialised memory tensor, for inspection and for code written for the original.

        Args:
            memory: ``[B, L, S, E]`` in the slot order of section 2, the current token first.
            valid: ``[B, L, S]`` or ``[L, S]`` bool, which slots hold something; all where None.

        Returns:
            ``[B, L, E]``.
        """
        if type(memory) is not Tensor:
            check_local("memory", memory, "give memory.to_local()")
        check_float("memory", memory)
        check_shape("memory", memory, (None, None, None, self.embedding), "[batch, length, slots, embedding]")
        places, modules = memory.shape[:2], self._modules
        rows = memory.flatten(0, 1)
        q, k, v = _through(modules["q"], rows), _through(modules["k"], rows[:, 0]), _through(modules["v"], rows)
        _check_parts((q, k, v), "qkv")
        if valid is not None:
            valid = valid.expand(*places, -1).flatten(0, 1)
        heads = self.own_heads(self.heads, q.shape[-1])
        mixed = attend_slots(k, q, v, valid, heads).unflatten(0, places)
        out: Any = modules["out_proj"]
        # For the price of a call of a module.
        return F.linear(mixed, out.weight, out.bias) if is_plain_linear(out) else self.project_out(mixed)


def _through(part: Any, x: Tensor) -> Tensor:
    """What a projection makes of x: called, unless its weights say all, for the price of a call of a module."""
    y: Tensor = F.linear(x, part.weight, part.bias) if is_plain_linear(part) else part(x)
    return y


def _check_parts(parts: Sequence[Tensor], names: Sequence[str]) -> None:
    """Whether what projections returned, q first, are plain tensors of one width."""
    width = parts[0].shape[-1]
    for name, part in zip(names, parts, strict=True):
        if type(part) is not Tensor:
            check_local(f"sva.{name}", part)
        if part.shape[-1] != width:
            raise ValueError(f"sva.{name}: expected {width} features, as many as of sva.q, got {part.shape[-1]}")
