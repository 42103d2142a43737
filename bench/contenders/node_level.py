"""Our network with ATen operations alone: every node projected once, then q and v of every slot gathered.

What one would write in PyTorch knowing that q and v depend on the node alone. It needs no projection of the
[B, L, S, E] memory, but still moves as many bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .problems import Problem


def tree(problem: Problem) -> Tensor:
    """All nodes ``[m, rows, E]``, level by level, a batched product each; rows as `python_ref.layout` has them."""
    shape, summarizer = problem.shape, problem.summarizer
    below = problem.x.flatten(0, 1).expand(shape.bank, -1, -1)
    length, levels = shape.length, []
    while length > 1:
        whole = below.view(shape.bank, shape.batch, length, -1)[:, :, : length & ~1]
        below = torch.baddbmm(summarizer.bias, whole.reshape(shape.bank, -1, 2 * shape.embedding), summarizer.weight)
        levels.append(below)
        length >>= 1
    nodes = torch.cat(levels, 1) if levels else below[:, :0]
    return F.pad(nodes, (0, 0, 0, problem.layout.rows - nodes.shape[1]))


def attention(problem: Problem, token_qkv: Tensor, node_qv: Tensor) -> Tensor:
    """``[B·L, E]`` from q, k and v of tokens ``[B·L, 3E]`` and q and v of nodes ``[m, rows, 2E]``."""
    shape, layout = problem.shape, problem.layout

    def tables() -> tuple[Tensor, Tensor]:
        sequence = torch.arange(shape.batch, device=problem.device)[:, None].expand(-1, shape.length)
        position = torch.arange(1, shape.length + 1, device=problem.device).expand(shape.batch, -1)
        row, exists = layout.slots(sequence, position, layout.levels)
        return row.flatten(), exists.view(shape.tokens, 1, -1)

    row, exists = layout.keep("node level", tables)
    head = shape.embedding // shape.heads
    slots = node_qv.index_select(1, row).view(shape.bank, shape.tokens, -1, 2, shape.heads, head)
    # [2, tokens, heads, slots of all banks, d]
    slots = slots.permute(3, 1, 4, 0, 2, 5).flatten(3, 4)
    q, k, v = token_qkv.view(shape.tokens, 3, shape.heads, head).unbind(1)
    query = torch.cat([q[:, :, None], slots[0]], 2)
    value = torch.cat([v[:, :, None], slots[1]], 2)
    score = (query @ k[..., None])[..., 0] / math.sqrt(head)
    absent = F.pad(~exists.repeat(1, 1, shape.bank), (1, 0))
    weight = torch.softmax(score.masked_fill(absent, -math.inf), -1)
    return (weight[:, :, None] @ value).reshape(shape.tokens, shape.embedding)


def layer(problem: Problem) -> Tensor:
    """The mixing layer ``[B, L, E]``."""
    sva = problem.layer.sva
    nodes = tree(problem)
    mixed = attention(problem, sva.token_qkv(problem.x.flatten(0, 1)), sva.node_qv(nodes))
    return sva.out_proj(mixed).view_as(problem.x)
