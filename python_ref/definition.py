"""The definition: literal, slow, in any float dtype. Every test compares with this file.

Nothing here is clever on purpose: positions are visited one by one, nodes are Python objects, and no
code is shared with the implementations that are checked against it. Section numbers are those of the
definition in docs/definition.md, which follows the original code of arXiv 2501.07905.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor], Tensor]
"""``(left, right) → node``; each a stack ``[batch, height, bank, E]`` (height 1 without an expander)."""


def linear_merge(weight: Tensor, bias: Tensor) -> Merge:
    """Section 1: ``S_b(left, right) = [left ; right] W_b + c_b``; W ``[m, 2E, E]``, c ``[m, 1, E]``."""

    def merge(left: Tensor, right: Tensor) -> Tensor:
        pair = torch.cat([left, right], -1)
        return torch.einsum("nsmi,mij->nsmj", pair, weight) + bias.reshape(bias.shape[0], -1)

    return merge


def conv_merge(weight: Tensor, bias: Tensor, bank: int, groups: int) -> Merge:
    """Section 6: ``Conv1d(m·E, m·E, kernel 2, stride 2, groups)`` over the pair; W ``[m·E, m·E/groups, 2]``."""

    def merge(left: Tensor, right: Tensor) -> Tensor:
        batch, height = left.shape[:2]
        pair = torch.stack([left, right], -1).reshape(batch * height, -1, 2)
        node = torch.nn.functional.conv1d(pair, weight, bias, stride=2, groups=groups)
        return node.reshape(batch, height, bank, -1)

    return merge


def depthwise_separable_merge(left_scale: Tensor, right_scale: Tensor, weight: Tensor, bias: Tensor) -> Merge:
    """Section 6: ``(a ⊙ left + b ⊙ right) P + c`` per bank; a, b, c ``[m, E]``, P ``[m, E, E]``."""

    def merge(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("nsmi,mij->nsmj", left_scale * left + right_scale * right, weight) + bias

    return merge


def expander_merge(merge: Merge, weight: Tensor, bias: Tensor) -> Merge:
    """Section 6: both stacks pass one ``ConvTranspose1d(E, E, 1+k)`` along the stack before ``merge``."""

    def expand(stack: Tensor) -> Tensor:
        batch, height, bank, size = stack.shape
        columns = stack.permute(0, 2, 3, 1).reshape(batch * bank, size, height)
        columns = torch.nn.functional.conv_transpose1d(columns, weight, bias)
        return columns.reshape(batch, bank, size, -1).permute(0, 3, 1, 2)

    return lambda left, right: merge(expand(left), expand(right))


def visible_nodes(x: Tensor, merge: Merge, bank: int) -> list[list[Tensor]]:
    """Sections 1 and 2: for each position n the newest complete node of every level ≥ 1.

    Args:
        x: ``[B, L, E]``.
        merge: the summarizer.
        bank: m.

    Returns:
        A list over positions of lists over levels of stacks ``[B, height, m, E]``.
    """
    length = x.shape[1]
    complete: dict[tuple[int, int], Tensor] = {}
    for j in range(length):
        complete[0, j] = x[:, j, None, None, :].expand(-1, 1, bank, -1)
    for level in range(1, length.bit_length()):
        for j in range(length >> level):
            complete[level, j] = merge(complete[level - 1, 2 * j], complete[level - 1, 2 * j + 1])
    positions = range(1, length + 1)
    return [[complete[i, (n >> i) - 1] for i in range(1, n.bit_length())] for n in positions]


def memory(x: Tensor, merge: Merge, bank: int) -> Tensor:
    """Section 2: the memory tensor ``[B, L, S, E]``, zeros where 2^i > n.

    Slot order: x, then level by level, stack entry by stack entry, bank innermost.
    """
    nodes = visible_nodes(x, merge, bank)
    deepest = [stack.shape[1] for stack in nodes[-1]] if nodes else []
    rows = []
    for t, stacks in enumerate(nodes):
        slots = [x[:, t : t + 1]] + [stack.flatten(1, 2) for stack in stacks]
        slots += [x.new_zeros(x.shape[0], height * bank, x.shape[2]) for height in deepest[len(stacks) :]]
        rows.append(torch.cat(slots, 1))
    return torch.stack(rows, 1) if rows else x.new_zeros(x.shape[0], 0, 1, x.shape[2])


def attention(slots: Tensor, projections: dict[str, Tensor], heads: int) -> Tensor:
    """Section 4, for one position: ``slots [B, S, E]``, all valid, the current token first → ``[B, E]``."""
    batch, count, size = slots.shape
    head_size = size // heads
    q = slots @ projections["q.weight"].mT + projections["q.bias"]
    v = slots @ projections["v.weight"].mT + projections["v.bias"]
    k = slots[:, 0] @ projections["k.weight"].mT + projections["k.bias"]
    q = q.reshape(batch, count, heads, head_size)
    v = v.reshape(batch, count, heads, head_size)
    score = (q * k.reshape(batch, 1, heads, head_size)).sum(-1) / math.sqrt(head_size)
    weight = torch.softmax(score, 1)
    mixed = (weight[..., None] * v).sum(1).reshape(batch, size)
    return mixed @ projections["out_proj.weight"].mT + projections["out_proj.bias"]


def mix(x: Tensor, merge: Merge, bank: int, projections: dict[str, Tensor], heads: int) -> Tensor:
    """Sections 1, 2 and 4: attention over the memory of every position, ``[B, L, E]`` → ``[B, L, E]``."""
    rows = []
    for t, stacks in enumerate(visible_nodes(x, merge, bank)):
        slots = torch.cat([x[:, t : t + 1]] + [stack.flatten(1, 2) for stack in stacks], 1)
        rows.append(attention(slots, projections, heads))
    return torch.stack(rows, 1) if rows else torch.zeros_like(x)


class BitmaskMemory:
    """Section 3: the sequential form, one token at a time, driven by ``(n-1) XOR n``."""

    def __init__(self, merge: Merge, bank: int):
        self.merge = merge
        self.bank = bank
        self.position = 0
        self.newest: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        """Take the token ``x [B, E]`` and return the slots ``[B, S, E]`` that it may read."""
        changed = self.position ^ (self.position + 1)
        self.position += 1
        new = [x[:, None, None, :].expand(-1, 1, self.bank, -1)]
        for level in range(1, self.position.bit_length()):
            if changed >> level & 1:
                new.append(self.merge(self.newest[level - 1], new[level - 1]))
            else:
                new.append(self.newest[level])
        self.newest = new
        return torch.cat([x[:, None]] + [stack.flatten(1, 2) for stack in new[1:]], 1)
