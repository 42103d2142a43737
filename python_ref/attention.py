"""Single-vector attention over the memory of every position (section 4).

Keys and values of a slot depend on its node alone, so they are projected once per node. Positions are
taken in tiles aligned on n: within a tile of 2^k positions, level i < k has 2^(k-i) nodes that no other
tile reads, and every higher level has exactly one. A tile is thus a small dense attention problem of
which a fixed pattern is visible, and nothing of size B·L·log L·E ever exists. Tiles are processed in
blocks that fit a cache; the backward pass recomputes the weights from the saved log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import Layout, TileTable
from .precision import compute_dtype

# Elements of a block's largest tensor. Smaller blocks lose more to the fixed cost of an operation than
# they gain from the cache (measured on two Zen 4 cores, 2^17 to 2^22).
BLOCK_ELEMENTS = 1 << 21


def tile_width(levels: int) -> int:
    """Positions in a tile: 16, and never fewer than the levels that one tile shares.

    A narrow tile scores fewer invisible pairs; the bound keeps what is gathered for the shared levels
    at most one row a position, so linear in L.
    """
    width = 16
    while levels - width.bit_length() + 2 > width:
        width *= 2
    return width


def _block_tiles(tiles: TileTable, bank: int, heads: int, head_size: int) -> int:
    keys = bank * tiles.key_row.shape[1]
    largest = heads * max(tiles.width * keys, (keys + tiles.width) * head_size)
    return max(1, BLOCK_ELEMENTS // largest)


class _Block:
    """Operands of one block of G tiles.

    ``token_qkv`` and ``node_qv`` are read as matrices of head-sized rows, so that one gather yields
    operands ``[G·H, places, d]`` that a batched matrix product takes as they are.
    """

    def __init__(
        self,
        tiles: TileTable,
        rows: slice,
        node_rows: int,
        bank: int,
        heads: int,
        null_token: int,
        dtype: torch.dtype,
    ):
        self.dtype = dtype  # of what it computes
        head = torch.arange(heads, device=tiles.token_row.device)[:, None]
        self.heads, self.width = heads, tiles.width
        self.valid = tiles.token_valid[rows][:, None, :].expand(-1, heads, -1).flatten(0, 1)[..., None]
        self.token = tiles.token_row[rows][:, None, :]
        self.head = head
        # Places without a token write to a row of their own, which is dropped.
        target = torch.where(tiles.token_valid[rows][:, None, :], self.token, null_token)
        self.target = (target * heads + head).flatten()
        banks = torch.arange(bank, device=head.device)[:, None] * node_rows
        key = (tiles.key_row[rows][:, None, :] + banks).flatten(1)
        self.key = (key[:, None, :] * (2 * heads) + head).flatten()
        hidden = ~(tiles.visible & tiles.key_valid[rows][:, None, :])
        self.hidden = hidden.repeat(1, 1, bank)[:, None]

    def tokens(self, table: Tensor, part: int = 0, parts: int = 1) -> Tensor:
        """The token's row ``part`` of ``table [M·parts·H, d]``: ``[G·H, width, d]``, arbitrary where no token is."""
        rows = (self.token * (parts * self.heads) + (part * self.heads + self.head)).flatten()
        return table.index_select(0, rows).view(*self.valid.shape[:2], -1).to(self.dtype)

    def keys(self, table: Tensor, part: int) -> Tensor:
        """q (part 0) or v (part 1) of the nodes, ``[G·H, m·K, d]``."""
        rows = table.index_select(0, self.key + part * self.heads)
        return rows.view(self.valid.shape[0], -1, table.shape[1]).to(self.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of tokens ``[G·H, width, d]`` over rows of ``nodes``, and the log-sum-exp of their scores.

        Returns:
            ``[G·H·width, d]`` and ``[G·H·width]``, which belong to the rows ``target``.
        """
        k = k * k.shape[-1] ** -0.5
        score = self.scores((q * k).sum(-1, keepdim=True), self.keys(nodes, 0), k)
        top = score.detach().amax(-1, keepdim=True)
        weight = (score - top).exp()
        total = weight.sum(-1, keepdim=True)
        mixed = torch.bmm(weight[..., 1:], self.keys(nodes, 1)) + weight[..., :1] * v
        return (mixed / total).flatten(0, 1), (top + total.log()).flatten()

    def add_to_keys(self, table: Tensor, part: int, value: Tensor) -> None:
        table.index_add_(0, self.key + part * self.heads, value.flatten(0, 1))

    def scores(self, own: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """``[G·H, width, 1 + m·K]``: the token's own score first, -inf where a key is not visible."""
        score = torch.bmm(k, q.transpose(1, 2))
        grouped = score.unflatten(0, (-1, self.heads)).masked_fill(self.hidden, -math.inf)
        return torch.cat([own, grouped.flatten(0, 1)], -1)


def _blocks(token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout, dtype: torch.dtype) -> Iterator[_Block]:
    tokens, head_size = layout.tokens, token_qkv.shape[-1] // (3 * heads)
    bank, rows, _ = node_qv.shape
    tiles = layout.tiles(tile_width(layout.levels))
    step = _block_tiles(tiles, bank, heads, head_size)
    for first in range(0, tiles.token_row.shape[0], step):
        yield _Block(tiles, slice(first, first + step), rows, bank, heads, tokens, dtype)


def attend(token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attention of every token over its memory.

    Args:
        token_qkv: ``[M, 3·E]`` q, k, v of the tokens.
        node_qv: ``[m, layout.rows, 2·E]`` q, v of the nodes.
        heads: H.
        layout: the rows.

    Returns:
        ``out [M, E]`` in the dtype of ``token_qkv`` and ``lse [M, H]``, the log of the sum of the
        exponentiated scores, in float32 (float64 for float64); both 0 where no span holds the row.
    """
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    head_size = size // heads
    token_table, node_table = token_qkv.reshape(-1, head_size), node_qv.reshape(-1, head_size)
    out = token_qkv.new_zeros((tokens + 1) * heads, head_size)
    wide = compute_dtype(token_qkv.dtype)
    lse = torch.zeros((tokens + 1) * heads, dtype=wide, device=token_qkv.device)
    for block in _blocks(token_qkv, node_qv, heads, layout, wide):
        q, k, v = (block.tokens(token_table, part, 3) for part in range(3))
        mixed, total = block.mix(q, k, v, node_table)
        out.index_copy_(0, block.target, mixed.to(out.dtype))
        lse.index_copy_(0, block.target, total)
    return out[: tokens * heads].view(tokens, size), lse[: tokens * heads].view(tokens, heads)


def attend_with(token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """`attend` by plain autograd, any number of times, and under the transforms of torch.func: nothing in place."""
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    token_table, node_table = (table.reshape(-1, size // heads) for table in (token_qkv, node_qv))
    wide = compute_dtype(token_qkv.dtype)
    targets, outs, totals = [], [token_table[:0].to(wide)], [token_table[:0, 0].to(wide)]
    for block in _blocks(token_qkv, node_qv, heads, layout, wide):
        q, k, v = (torch.where(block.valid, block.tokens(token_table, part, 3), 0) for part in range(3))
        mixed, total = block.mix(q, k, v, node_table)
        targets.append(block.target)
        outs.append(mixed)
        totals.append(total)
    places, places_of = (tokens + 1) * heads, torch.cat(targets) if targets else layout.tables()[0][:0]
    out = outs[0].new_zeros(places, size // heads).index_copy(0, places_of, torch.cat(outs))
    lse = outs[0].new_zeros(places).index_copy(0, places_of, torch.cat(totals).detach())
    out, lse = out[: tokens * heads].reshape(tokens, size), lse[: tokens * heads].reshape(tokens, heads)
    return out.to(token_qkv.dtype), lse


def attend_backward(
    grad_out: Tensor, token_qkv: Tensor, node_qv: Tensor, out: Tensor, lse: Tensor, heads: int, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Gradients of `attend` with respect to ``token_qkv`` and ``node_qv``.

    Args:
        grad_out: ``[M, E]``.
        out, lse: as `attend` returned them.
    """
    tokens, size = grad_out.shape
    head_size = size // heads
    token_table, node_table = token_qkv.reshape(-1, head_size), node_qv.reshape(-1, head_size)
    grad_table, out_table = grad_out.reshape(-1, head_size), out.reshape(-1, head_size)
    grads = token_qkv.new_zeros(3, (tokens + 1) * heads, head_size)
    # A node's gradient is summed over the tiles that read it, in float32 at least.
    wide = compute_dtype(node_qv.dtype)
    grad_nodes = torch.zeros(node_table.shape, dtype=wide, device=node_qv.device)
    scale = head_size**-0.5
    for block in _blocks(token_qkv, node_qv, heads, layout, wide):
        # A place without a token must send nothing to the nodes, whatever its row holds.
        q, k, v = (torch.where(block.valid, block.tokens(token_table, part, 3), 0) for part in range(3))
        k = k * scale
        grad = torch.where(block.valid, block.tokens(grad_table), 0)
        node_q, node_v = block.keys(node_table, 0), block.keys(node_table, 1)
        score = block.scores((q * k).sum(-1, keepdim=True), node_q, k)
        weight = (score - torch.where(block.valid, block.tokens(lse.reshape(-1, 1)), 0)).exp()
        grad_weight = torch.cat([(grad * v).sum(-1, keepdim=True), torch.bmm(grad, node_v.transpose(1, 2))], -1)
        # Σ_s weight_s · grad_weight_s, the mean that the softmax takes off, is <grad, out>.
        mean = (grad * torch.where(block.valid, block.tokens(out_table), 0)).sum(-1, keepdim=True)
        grad_score = weight * (grad_weight - mean)
        to_own, to_nodes = grad_score[..., :1], grad_score[..., 1:]
        block.add_to_keys(grad_nodes, 0, torch.bmm(to_nodes.transpose(1, 2), k))
        block.add_to_keys(grad_nodes, 1, torch.bmm(weight[..., 1:].transpose(1, 2), grad))
        parts = (to_own * k, (torch.bmm(to_nodes, node_q) + to_own * q) * scale, weight[..., :1] * grad)
        for target, value in zip(grads, parts, strict=True):
            target.index_copy_(0, block.target, value.to(target.dtype).flatten(0, 1))
    grad_tokens = torch.cat(grads[:, : tokens * heads].view(3, tokens, size).unbind(), 1)
    return grad_tokens, grad_nodes.to(node_qv.dtype).view(node_qv.shape)
