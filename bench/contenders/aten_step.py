"""The step as a Python loop of ATen operations with cached q and v: what one would write without the extension.

Batch 1, the linear summarizer, weights packed beforehand, one product for q, k and v, one for the banks of a
level and one for q and v of all new nodes; the attention reads views of the cached rows, as products and a
softmax, or by PyTorch's fused attention. Baselines of `bench.runs.decode`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmn_kernels import LogarithmicMixing, MemoryState

from .streams import PARTS, Projections


class AtenStep:
    """A layer's parameters packed for the loop, and a state of its own.

    Args:
        fused: whether the attention is one call of ``scaled_dot_product_attention``.
    """

    def __init__(self, layer: LogarithmicMixing, state: MemoryState, fused: bool):
        self.fused = fused
        sva, summarizer = layer.sva, layer.summarizer
        self.heads, self.bank, self.size = layer.heads, layer.bank, layer.embedding
        projections = Projections(layer)
        self.qkv, self.out = projections.qkv, projections.out
        self.qv = tuple(torch.cat([getattr(part, name) for part in (sva.q, sva.v)]) for name in PARTS)
        merge = summarizer.merge()  # type: ignore
        self.weight, self.bias = merge.weight[:, 0], merge.bias[:, None]
        # Of one bank: as a matrix that torch multiplies with a vector without turning it first.
        self.row = merge.weight[0, 0].T.contiguous(), merge.bias[0]
        self.position = int(state.position[0])
        dtype = sva.q.weight.dtype
        self.token = state.token.to(dtype)
        self.nodes = list(state.nodes[0].to(dtype).unbind(0))  # [m, E] of each level
        # Slot 0 is the token itself.
        self.q, self.v = (F.pad(part[0].to(dtype).flatten(0, 1), (0, 0, 1, 0)) for part in (state.q, state.v))

    def __call__(self, x: Tensor) -> Tensor:
        """``x [1, E]`` → ``y [1, E]``."""
        self.position += 1
        crossed, level, bank = self.position & -self.position, 1, self.bank
        left, new, fresh = self.token, x, []
        if not crossed & 1:
            left, new = left.expand(bank, -1), new.expand(bank, -1)
        while crossed >> level:
            pair = torch.cat([left, new], 1)
            one = self.bank == 1
            new = F.linear(pair, *self.row) if one else torch.baddbmm(self.bias, pair[:, None], self.weight)[:, 0]
            left, self.nodes[level - 1] = self.nodes[level - 1], new
            fresh.append(new)
            level += 1
        if fresh:
            q, v = F.linear(torch.cat(fresh), *self.qv).chunk(2, 1)
            self.q[1 : 1 + len(q)], self.v[1 : 1 + len(v)] = q, v
        self.token = x
        q, k, v = F.linear(x, *self.qkv).chunk(3, 1)
        self.q[:1], self.v[:1] = q, v
        slots = 1 + bank * (self.position.bit_length() - 1)
        query = self.q[:slots].view(slots, self.heads, -1).transpose(0, 1)
        value = self.v[:slots].view(slots, self.heads, -1).transpose(0, 1)
        if self.fused:
            # The roles are swapped against ordinary attention: one key asks all slots.
            mixed = F.scaled_dot_product_attention(k.view(1, self.heads, 1, -1), query[None], value[None])
        else:
            score = torch.bmm(query, k.view(self.heads, -1, 1)) * query.shape[-1] ** -0.5
            weight = torch.softmax(score, 1)
            mixed = torch.bmm(weight.transpose(1, 2), value)
        return F.linear(mixed.reshape(1, -1), *self.out)
