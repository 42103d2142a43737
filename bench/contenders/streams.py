"""What a token costs elsewhere: attention over a KV cache, a recomputed prefix, GRU and LSTM, a token at a time.

Batch 1. Each has ``__call__(x [1, E]) → [1, E]``, advances by one token a call, and ``start(n)`` puts it behind n
made-up tokens without the work of reading them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState

PARTS = ("weight", "bias")


def made_up(layer: LogarithmicMixing, position: Tensor, last: int, dtype: torch.dtype | None = None) -> MemoryState:
    """A pool of random nodes that stands at ``position [P]`` and has room up to ``last``."""
    empty = layer.init_state(len(position), max_position=last, dtype=dtype)
    drawn: dict[str, Any] = {name: torch.randn_like(getattr(empty, name)) for name in ("token", "nodes", "q", "v")}
    return empty.replace(position=position, max_position=last, **drawn)


class Projections:
    """q, k, v and the output of a mixing layer, packed: the attention of the same size has the same ones."""

    def __init__(self, layer: LogarithmicMixing):
        sva = layer.sva
        self.heads = layer.heads
        self.qkv = tuple(torch.cat([getattr(part, name) for part in (sva.q, sva.k, sva.v)]) for name in PARTS)
        self.out = sva.out_proj.weight, sva.out_proj.bias

    def split(self, x: Tensor) -> Tensor:
        """``x [T, E]`` → ``[3, H, T, d]``."""
        return F.linear(x, *self.qkv).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)

    def merge(self, mixed: Tensor) -> Tensor:
        """``[H, T, d]`` → ``[T, E]``."""
        return F.linear(mixed.transpose(0, 1).flatten(1), *self.out)


class CachedAttention:
    """Attention over a cache of keys and values.

    Args:
        capacity: tokens that the cache holds.
        fused: whether the attention is one call of ``scaled_dot_product_attention``, or two products and a softmax.
        dtype: of the cache and of the attention; that of the layer where None. On a CPU float32 may be faster.
    """

    def __init__(self, layer: LogarithmicMixing, capacity: int, fused: bool = True, dtype: torch.dtype | None = None):
        self.fused = fused
        self.projections = Projections(layer)
        weight = layer.sva.q.weight
        shape = (2, layer.heads, capacity, layer.embedding // layer.heads)
        self.cache = torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device)
        self.count = 0

    def start(self, n: int) -> None:
        if not self.count:
            torch.manual_seed(2)
            self.cache[:, :, :n].normal_()
        self.count = n

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.projections.split(x).to(self.cache.dtype).unbind(0)
        self.cache[0, :, self.count], self.cache[1, :, self.count] = k[:, 0], v[:, 0]
        self.count += 1
        keys, values = self.cache[:, :, : self.count]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q[None], keys[None], values[None])[0]
        else:
            score = torch.bmm(q, keys.mT) * q.shape[-1] ** -0.5
            mixed = torch.bmm(torch.softmax(score, -1), values)
        return self.projections.merge(mixed.to(x.dtype))

    def definition(self, x: Tensor) -> Tensor:
        """What the next call should return, by its formula in float64; the cache stays as it is."""
        weight, bias = (part.double() for part in self.projections.qkv)
        qkv = F.linear(x.double(), weight, bias).to(x.dtype).double()
        q, k, v = qkv.view(3, self.projections.heads, 1, -1).unbind(0)
        keys, values = (
            torch.cat([part[:, : self.count].double(), new], 1) for part, new in zip(self.cache, (k, v), strict=True)
        )
        mixed = torch.softmax(q @ keys.mT / math.sqrt(q.shape[-1]), -1) @ values
        weight, bias = (part.double() for part in self.projections.out)
        return F.linear(mixed.transpose(0, 1).flatten(1), weight, bias)


class RecomputedAttention:
    """Attention that reads its whole prefix again for every token, as the paper's comparison does."""

    def __init__(self, layer: LogarithmicMixing):
        self.projections = Projections(layer)
        self.prefix = layer.sva.q.weight.new_zeros(0, layer.embedding)

    def __call__(self, x: Tensor) -> Tensor:
        self.prefix = torch.cat([self.prefix, x])
        q, k, v = self.projections.split(self.prefix)[:, None]
        return self.projections.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0])[-1:]


class Recurrent:
    """A GRU or an LSTM of one layer."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], embedding: int, dtype: torch.dtype):
        torch.manual_seed(3)
        self.dtype = dtype
        self.module = kind(embedding, embedding, batch_first=True).to(dtype)
        self.state: Tensor | tuple[Tensor, Tensor] | None = None

    def start(self, n: int) -> None:
        """Nothing to do: no token costs more than another."""

    def __call__(self, x: Tensor) -> Tensor:
        y, self.state = self.module(x[None].to(self.dtype), self.state)
        return y[0].to(x.dtype)


class BitmaskStream:
    """The paper's own sequential algorithm, literally, on a block's parameters (sections 3 to 5 of the definition).

    A list of the newest node of each level; for each token the memory tensor is put together and every slot of it
    projected to its q and v, slots being masked by their value. Nothing of a slot is kept between tokens.

    Batches of any size: ``x [B, 1, E]``.
    """

    def __init__(self, block: LogarithmicMemory):
        self.block = block
        self.position, self.newest = 0, list[Tensor]()

    def memory(self, x: Tensor) -> Tensor:
        """The next token → its slots ``[B, 1, S, E]``."""
        summarizer: Any = self.block.summarizer
        changed = self.position ^ (self.position + 1)
        self.position += 1
        new = [x[:, None].repeat(1, self.block.bank, 1, 1)]
        for level in range(1, self.position.bit_length()):
            if changed >> level & 1:
                pair = torch.cat([self.newest[level - 1], new[level - 1]], -1)
                new.append(torch.einsum("bmti,mij->bmtj", pair, summarizer.weight) + summarizer.bias)
            else:
                new.append(self.newest[level])
        self.newest = new
        if len(new) == 1:
            return x[:, :, None]
        nodes = torch.stack(new[1:], -2).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return torch.cat([x[:, :, None], nodes], 2)

    def attention(self, memory: Tensor) -> Tensor:
        """``[B, 1, S, E]`` → ``[B, 1, E]``."""
        sva = self.block.sva
        here = memory != 0
        q, v = ((part(memory) * here).unflatten(-1, (sva.heads, -1)).transpose(2, 3) for part in (sva.q, sva.v))
        k = (sva.k(memory[:, :, 0]) * here[:, :, 0]).unflatten(-1, (sva.heads, -1))
        score = torch.einsum("blhsd,blhd->blhs", q, k) / math.sqrt(q.shape[-1])
        weight = torch.softmax(torch.where(score == 0, -math.inf, score), -1)
        y: Tensor = sva.out_proj(torch.einsum("blhs,blhsd->blhd", weight, v).flatten(2))
        return y

    def __call__(self, x: Tensor) -> Tensor:
        """The block: ``[B, 1, E]`` → ``[B, 1, E]``."""
        block: Any = self.block
        x = x + self.attention(self.memory(block.norm1(x)))
        y: Tensor = x + block.feedforward(block.norm2(x))
        return y
