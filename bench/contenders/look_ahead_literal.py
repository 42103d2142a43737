"""LaMemo's layer as its formulas stand (docs/lamemo-definition.md, section 8), the way the public code computes it.

Every pair of a row and a distance has a score in memory: T by K of them for the segment's rows, M by M for the
memory's, brought to their keys by the shift trick. Gradients are autograd's. Alpha is without an epsilon, so that it
merges exactly.

Tensors are by head: B batch, H heads, K = M + T rows of which the last T are the segment, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from python_ref.precision import compute_dtype


def attend(
    q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor, bias: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of memory and segment, the memory's merged with what it found before.

    Args:
        q, k, v: ``[B, H, K, D]``.
        left: ``[H, K, D]``: row a is r of distance a.
        right: ``[H, M, D]``: row a - 1 is r of distance a.
        bias: ``[4, H, D]``: u and v of the segment's rows, u and v of the memory's.
        output: ``[B, H, M, D]``, ``lse [B, H, M]``: of earlier segments.

    Returns:
        ``out [B, H, K, D]`` and its log-sum-exp ``[B, H, K]``, float32 at least.
    """
    memory = output.shape[2]
    merged, merged_lse = _memory_rows(q[:, :, :memory], k, v, right, bias[2:], output, lse)
    out, total = _segment_rows(q[:, :, memory:], k, v, left, bias[:2])
    return torch.cat([merged, out], 2), torch.cat([merged_lse, total], 2)


def _scores(q: Tensor, k: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """By key and by row of the table."""
    u, v = bias[:, :, None]
    return torch.einsum("bhid,bhjd->bhij", q + u, k), torch.einsum("bhid,hcd->bhic", q + v, table)


def _segment_rows(q: Tensor, k: Tensor, v: Tensor, left: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = q.shape
    keys = k.shape[2]
    # Column c is distance K-1-c; shifted, entry (i, j) is distance M + i - j.
    content, position = _scores(q, k, left.flip(1), bias)
    padded = F.pad(position, (1, 0)).view(batch, heads, keys + 1, tokens)
    score = (content + padded[:, :, 1:].reshape(position.shape)) * size**-0.5
    later = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu(keys - tokens + 1)
    score = score.masked_fill(later, -torch.inf)
    # Only the next segment reads it, without a gradient.
    total = torch.logsumexp(_wide(score.detach()), -1)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(score, -1), v), total


def _memory_rows(
    q: Tensor, k: Tensor, v: Tensor, right: Tensor, bias: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, memory, size = q.shape
    window = min(k.shape[2] - memory, memory)
    first = memory + 1 - window
    content, position = _scores(q, k[:, :, first : memory + 1], right, bias)
    # Column c is distance c + 1; shifted, entry (i, c) is distance c - i + 1, of key c + 1.
    padded = F.pad(position, (0, 1)).view(batch, heads, memory + 1, memory)
    shifted = padded[:, :, :memory, memory - window :]
    score = (content + shifted) * size**-0.5
    behind = torch.ones(memory, window, dtype=torch.bool, device=q.device).tril(-first)
    score = score.masked_fill(behind, -torch.inf)
    found = torch.einsum("bhij,bhjd->bhid", torch.softmax(score, -1), v[:, :, first : memory + 1])
    new = torch.logsumexp(_wide(score), -1)
    top = torch.maximum(lse, new)
    before, now = (lse - top).exp(), (new - top).exp()
    alpha = (before / (before + now))[..., None]
    merged = alpha * output + (1 - alpha) * found
    return merged.to(found.dtype), torch.logaddexp(lse, new)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def layer(
    x: Tensor, distances: Tensor, bias: Tensor, weights: Mapping[str, Tensor], heads: int, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The post-norm layer around `attend`.

    Args:
        x: ``[B, K, E]``.
        distances: ``[K, E]`` sinusoids, row a of distance a.
        bias, output, lse: as `attend` takes them.
        weights: those of `lmn_kernels.LookAheadMemoryLayer`, by their names there.
        heads: H.

    Returns:
        ``y [B, K, E]``, and what `attend` returns.
    """
    memory = output.shape[2]

    def by_head(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (heads, -1)).transpose(-3, -2)

    q = by_head(F.linear(x, weights["dec_attn.q_net.weight"]))
    k, v = (by_head(part) for part in F.linear(x, weights["dec_attn.kv_net.weight"]).chunk(2, -1))
    # The public code has both tables, and projects each.
    left, right = (
        by_head(F.linear(part, weights["dec_attn.r_net.weight"])) for part in (distances, distances[1 : memory + 1])
    )
    out, total = attend(q, k, v, left, right, bias, output, lse)
    rows = [
        _around(part, mixed.transpose(1, 2).flatten(2), weights)
        for part, mixed in zip(_split(x, memory, 1), _split(out, memory, 2), strict=True)
    ]
    # As the next layer begins.
    return torch.cat(rows, 1), out, total


def _split(x: Tensor, memory: int, dim: int) -> list[Tensor]:
    return list(x.split([memory, x.shape[dim] - memory], dim))


def _around(x: Tensor, mixed: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What follows attention: ``LN(x + mixed Wo)``, then the feed-forward with its own residual and norm."""

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], weights[f"{name}.layer_norm.weight"], weights[f"{name}.layer_norm.bias"])

    y = norm(x + F.linear(mixed, weights["dec_attn.o_net.weight"]), "dec_attn")
    up, down = (
        (weights[f"pos_ff.CoreNet.{place}.weight"], weights[f"pos_ff.CoreNet.{place}.bias"]) for place in (0, 3)
    )
    return norm(y + F.linear(torch.relu(F.linear(y, *up)), *down), "pos_ff")
