"""Layers around the operations of flash-linear-attention: one product in, the operation, one product out.

Without the short convolution, norm and output gate of that library's own layers, which makes them faster, and
comparable with a mixing layer of ours that has none of these either. The sizes are those of the library's layers.
Nothing of it is imported until a layer is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Scales of log-linear attention: enough for the 2^17 tokens that its operation takes.
LEVELS = 19


@dataclass(frozen=True)
class Kind:
    """An operation.

    Attributes:
        path: module and function of flash-linear-attention.
        heads: heads of v for an embedding.
        groups: heads of q and k for that many heads of v.
        key, value: head sizes for an embedding.
        gates: gate values a token and head of v: ``"key"`` for one a key feature.
        extra: further values a token and head.
        recurrence: ``(q, k, v, g, extra) → out``, the definition.
        options: keywords of the function.
    """

    path: tuple[str, str]
    heads: Callable[[int], int]
    groups: Callable[[int], int]
    key: Callable[[int], int]
    value: Callable[[int], int]
    per_key: bool
    extra: int
    recurrence: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    options: dict[str, Any]


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, update: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The state ``[B, H, K, V]`` through time; ``update`` adds a token to a decayed one."""
    state = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype, device=q.device)
    out = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        state = update(state * (decay[..., None] if g.dim() == 4 else decay[..., None, None]), t)
        out.append((q[:, t, :, None] @ state)[:, :, 0] * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, _extra: Tensor) -> Tensor:
    """Gated linear attention, g ``[B, T, H, K]``, or ``[B, T, H]`` for the simple one: S ← exp(g)·S + kᵀv."""
    return _loop(q, k, v, g, lambda state, t: state + k[:, t, :, :, None] * v[:, t, :, None])


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule with normalised q and k: S ← S' + kᵀ·β·(v - k·S'), S' = exp(g)·S."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))

    def update(state: Tensor, t: int) -> Tensor:
        new = beta[:, t, :, :1] * (v[:, t] - (k[:, t, :, None] @ state)[:, :, 0])
        return state + k[:, t, :, :, None] * new[:, :, None]

    return _loop(q, k, v, g, update)


def log_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scales: Tensor) -> Tensor:
    """Log-linear attention: pair (t, s) decays by the gates between them and is scaled by its level in t.

    The level is 0 for s = t, and 1 + the highest bit in which t and s differ otherwise.
    """
    length = q.shape[1]
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    place = torch.arange(length, device=q.device)
    level = torch.tensor([[(t ^ s).bit_length() for s in range(length)] for t in range(length)], device=q.device)
    total = g.cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(place > place[:, None], -torch.inf).exp()
    scale = scales.transpose(1, 2).gather(-1, level.expand(*decay.shape))
    score = torch.einsum("bthk,bshk->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", score * decay * scale, v)


def _at_least_one(size: int) -> int:
    return max(1, size)


KINDS = {
    "gla": Kind(
        ("fla.ops.gla", "chunk_gla"), lambda e: 4, lambda h: h, lambda e: e // 8, lambda e: e // 4,
        True, 0, gated, {},
    ),
    "simple-gla": Kind(
        ("fla.ops.simple_gla", "chunk_simple_gla"), lambda e: _at_least_one(e // 128), lambda h: h,
        lambda e: min(e, 128), lambda e: min(e, 128), False, 0, gated, {},
    ),
    "gated-delta-rule": Kind(
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), lambda e: _at_least_one(e * 3 // 512), lambda h: h,
        lambda e: min(e, 128), lambda e: 2 * min(e, 128), False, 1, gated_delta, {"use_qk_l2norm_in_kernel": True},
    ),
    "log-linear": Kind(
        ("fla.ops.log_linear_attn", "chunk_log_linear_attn"), lambda e: _at_least_one(e // 64), lambda h: 1,
        lambda e: 64, lambda e: min(e, 64), False, LEVELS, log_linear, {},
    ),
}  # fmt: skip


class Layer(nn.Module):
    """``x [B, L, E]`` → ``[B, L, E]`` through an operation of a kind, or through its definition."""

    def __init__(self, kind: Kind, embedding: int):
        super().__init__()
        self.kind, heads = kind, kind.heads(embedding)
        self.heads, self.groups = heads, kind.groups(heads)
        self.key, self.value = kind.key(embedding), kind.value(embedding)
        gates = heads * (self.key if kind.per_key else 1)
        self.sizes = [self.groups * self.key] * 2 + [heads * self.value, gates, heads * kind.extra]
        self.project = nn.Linear(embedding, sum(self.sizes), bias=False)
        self.out = nn.Linear(heads * self.value, embedding, bias=False)

    def forward(self, x: Tensor, literally: bool = False) -> Tensor:
        q, k, v, g, extra = self.project(x).split(self.sizes, -1)
        q, k = (part.unflatten(-1, (self.groups, self.key)) for part in (q, k))
        v = v.unflatten(-1, (self.heads, self.value))
        # As that library's layers damp their gates; never above 0, in the logarithm.
        g = F.logsigmoid(g.unflatten(-1, (self.heads, -1))) / 16
        g = g if self.kind.per_key else g[..., 0]
        extra = torch.sigmoid(extra.unflatten(-1, (self.heads, -1))) if self.kind.extra else extra
        out = self.kind.recurrence(q, k, v, g, extra) if literally else self._chunked(q, k, v, g, extra)
        return self.out(out.flatten(2))

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, extra: Tensor) -> Tensor:
        module, function = self.kind.path
        operation = getattr(importlib.import_module(module), function)
        more = {1: {"beta": extra[..., 0]}, LEVELS: {"level_scales": extra}}.get(self.kind.extra, {})
        out = operation(q, k, v, g=g, **more, **self.kind.options)
        return out[0]
