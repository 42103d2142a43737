"""One token per row (section 3): the bitmask rule, and attention over the cached slots.

A state holds, per row, the position n, the newest token, and the newest node of levels 1 … D with its
q and v. The invariant: the rows of level i hold ``node(i, (n >> i) - 1)`` and count once 2^i ≤ n. On a
new token, level i is summarised again iff bit i of ``(n-1) XOR n`` is set, that is iff 2^i divides n.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .layout import stack_height
from .precision import no_autocast


def update(
    x: Tensor,
    position: Tensor,
    token: Tensor,
    nodes: Tensor,
    merge: Callable[[Tensor, Tensor], Tensor],
    expand: int,
    chain: int,
) -> list[tuple[Tensor, Tensor]]:
    """Summarise again what the new tokens complete.

    Args:
        x: ``[B, E]`` the new tokens.
        position: ``[B]`` int64, n after them.
        token: ``[B, E]`` the tokens before them.
        nodes: ``[B, R, m, E]`` the newest nodes before them, level after level.
        merge: two stacks ``[B, h, m, E]`` → ``[B, h+k, m, E]``.
        expand: k.
        chain: highest level that any row may complete; what is above stays.

    Returns:
        For levels 1 … chain: ``changed [B]`` and the level's stack ``[B, 1+i·k, m, E]``.
    """
    bank, base, levels = nodes.shape[2], 0, []
    left = token[:, None, None, :].expand(-1, 1, bank, -1)
    new = x[:, None, None, :].expand(-1, 1, bank, -1)
    crossed = (position - 1) ^ position
    for level in range(1, chain + 1):
        height = stack_height(level, expand)
        old = nodes[:, base : base + height]
        changed = (crossed >> level & 1).bool()
        new = torch.where(changed[:, None, None, None], merge(left, new), old)
        levels.append((changed, new))
        left, base = old, base + height
    return levels


def attend_slots(k: Tensor, q: Tensor, v: Tensor, valid: Tensor, heads: int) -> Tensor:
    """Section 4 for one position per row.

    Args:
        k: ``[B, E]`` of the current token.
        q, v: ``[B, S, E]`` of the slots.
        valid: ``[B, S]``, at least one True in each row.
        heads: H.

    Returns:
        ``[B, E]`` in the dtype of ``k``; computed in float32 at least.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    q, v = (part.to(wide).unflatten(-1, (heads, -1)) for part in (q, v))
    with no_autocast(k.device):
        score = torch.einsum("bshd,bhd->bhs", q, k.to(wide).unflatten(-1, (heads, -1))) * q.shape[-1] ** -0.5
        weight = torch.softmax(score.masked_fill(~valid[:, None], -math.inf), -1)
        return torch.einsum("bhs,bshd->bhd", weight, v).flatten(1).to(k.dtype)
