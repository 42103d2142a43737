"""The definition of look-ahead attention (LaMemo), written from its formulas: dense, literal, slow on purpose.

Every pair of a query and a key has a score of its own, its distance looked up in the table. Plain autograd goes
through it. See `python_ref.look_ahead` for the rows, and docs/lamemo-definition.md, sections 2 to 4 and 8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    output: Tensor | None,
    lse: Tensor | None,
    start: Tensor | None,
    tokens: int,
    window: int,
    future_row: int,
) -> tuple[Tensor, Tensor]:
    """`python_ref.look_ahead.attend`, without blocks."""
    batch, keys = kv.shape[:2]
    rows, size = q.shape[1], q.shape[-1]
    i = torch.arange(keys - rows, keys, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)[None]
    looks_ahead = (i < keys - tokens).expand(-1, keys)
    first = keys - tokens
    seen = torch.where(looks_ahead, (j > i) & (j <= first) & (j > first - window), j <= i).expand(batch, -1, -1)
    if start is not None:
        seen = seen & (looks_ahead | (j >= start[:, None, None]))
    score = _scores(q, kv[:, :, 0], bias, table, (i - j).abs() + future_row * looks_ahead, looks_ahead[:, 0])
    score = (score * size**-0.5).masked_fill(~seen[:, None], -torch.inf)
    normaliser = torch.logsumexp(score, -1)
    out = torch.einsum("bhij,bjhd->bihd", (score - normaliser[..., None]).exp(), kv[:, :, 1])
    normaliser = normaliser.transpose(1, 2)
    if output is None or lse is None:
        return out, normaliser
    # What a memory row saw before is one more key, of score ``lse`` and value ``output``.
    memory = rows - tokens
    total = torch.cat([torch.logaddexp(lse, normaliser[:, :memory]), normaliser[:, memory:]], 1)
    out = out * (normaliser - total).exp()[..., None]
    before = output * (lse - total[:, :memory]).exp()[..., None]
    return torch.cat([out[:, :memory] + before, out[:, memory:]], 1), total


def _scores(q: Tensor, k: Tensor, bias: Tensor, table: Tensor, row: Tensor, looks_ahead: Tensor) -> Tensor:
    """``(q_i + u)·k_j + (q_i + v)·r_|i-j|``, ``[B, H, rows, K]``, by each row's own kind of u and v."""
    content, position = (torch.where(looks_ahead[:, None, None], bias[2 + n], bias[n]) for n in range(2))
    # Pairs that are not seen may have no row.
    relative = table[row.clamp(max=table.shape[0] - 1)]
    by_content = torch.einsum("bihd,bjhd->bhij", q + content, k)
    return by_content + torch.einsum("bihd,ijhd->bhij", q + position, relative)
