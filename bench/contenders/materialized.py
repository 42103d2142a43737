"""The materialising form: the memory tensor of section 2 built, then projected slot by slot.

This is the arithmetic of the original module (q and v of every slot of every position, masks by
value), in the dtype of its input, written with the fewest passes that the form allows. It is the
baseline of every speed and memory ratio, never a path of the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def memory(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Memory tensor ``[B, L, 1 + m·D, E]`` of ``x [B, L, E]``; W ``[m, 2E, E]``, c ``[m, 1, E]``."""
    batch, length, size = x.shape
    bank = weight.shape[0]
    below = x[:, None].expand(-1, bank, -1, -1)
    levels = []
    for level in range(1, length.bit_length()):
        count = length >> level
        pair = below[:, :, : 2 * count].reshape(batch, bank, count, 2 * size)
        below = pair @ weight + bias
        spread = below.repeat_interleave(1 << level, dim=2)
        lead = (1 << level) - 1
        levels.append(F.pad(spread, (0, 0, lead, 0))[:, :, :length])
    if not levels:
        return x[:, :, None]
    upper = torch.stack(levels, 3).permute(0, 2, 3, 1, 4).reshape(batch, length, -1, size)
    return torch.cat([x[:, :, None], upper], 2)


def attention(slots: Tensor, projections: dict[str, Tensor], heads: int) -> Tensor:
    """Attention over a memory tensor, empty slots told by their zeros as the original does."""
    batch, length, count, size = slots.shape
    head_size = size // heads
    filled = slots != 0
    q = F.linear(slots, projections["q.weight"], projections["q.bias"]) * filled
    v = F.linear(slots, projections["v.weight"], projections["v.bias"]) * filled
    k = F.linear(slots[:, :, 0], projections["k.weight"], projections["k.bias"]) * filled[:, :, 0]
    q = q.view(batch, length, count, heads, head_size).transpose(2, 3)
    v = v.view(batch, length, count, heads, head_size).transpose(2, 3)
    k = k.view(batch, length, heads, head_size, 1)
    score = (q @ k).squeeze(-1) / math.sqrt(head_size)
    score = score.masked_fill(score == 0, -math.inf)
    mixed = (torch.softmax(score, -1)[..., None, :] @ v).reshape(batch, length, size)
    return F.linear(mixed, projections["out_proj.weight"], projections["out_proj.bias"])


def mix(x: Tensor, weight: Tensor, bias: Tensor, projections: dict[str, Tensor], heads: int) -> Tensor:
    """The mixing half of the original's block: ``[B, L, E]`` → ``[B, L, E]``."""
    return attention(memory(x, weight, bias), projections, heads)
