"""Our attention by FlexAttention: the strongest form that PyTorch itself offers.

The roles are swapped: the query of FlexAttention is k of a token, its keys and values are q and v of all tokens
and nodes, put into post-order so that what a tile of positions reads lies close together. A slot is visible to the
positions from its last token on, for as many as it has tokens. The block mask is made by hand: asking the mask
for every pair would take L² of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from python_ref.layout import constant

from .compiled import compile_whole
from .problems import Problem

BLOCK = 128


@dataclass(frozen=True)
class Slots:
    """Where the keys come from, and who sees them.

    Attributes:
        row: ``[B, N]`` row of tokens followed by the nodes of every bank, in post-order.
        mask: which blocks of keys a block of positions reads.
    """

    row: Tensor
    mask: BlockMask


def slots(problem: Problem) -> Slots:
    """The keys of a problem."""
    shape, layout, device = problem.shape, problem.layout, problem.device
    per_level = [shape.length >> level for level in range(layout.levels + 1)]
    level = torch.repeat_interleave(constant(tuple(range(len(per_level))), device), constant(tuple(per_level), device))
    index = torch.cat([torch.arange(count, device=device) for count in per_level])
    last = (index + 1) << level
    order = torch.argsort(last * 64 + level)
    level, index, last = level[order], index[order], last[order]
    sequence = torch.arange(shape.batch, device=device)[:, None].expand(-1, len(level))
    row, _ = layout.node_row(level.expand_as(sequence), sequence, index.expand_as(sequence))
    # A token stands once, a node once for each bank, the banks side by side.
    banks = torch.arange(shape.bank, device=device)
    rows = torch.where(level[:, None] == 0, row[..., None], shape.tokens + banks * layout.rows + row[..., None])
    once = (level[:, None] > 0) | (banks == 0)
    start, stop = (value[:, None].expand_as(once)[once] for value in (last, last + (1 << level)))

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + 1
        return (start[key] <= position) & (position < stop[key])

    return Slots(rows[:, once], _block_mask(start, stop, shape.length, mask_mod))


def _block_mask(start: Tensor, stop: Tensor, length: int, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """Blocks of keys ``start, stop [N]``, each seen by the positions ``start ≤ n < stop``."""
    first, final = (start - 1) // BLOCK, (stop.clamp(max=length + 1) - 2) // BLOCK
    count = final - first + 1
    key = torch.repeat_interleave(torch.arange(len(start), device=start.device), count)
    within = torch.arange(len(key), device=start.device) - (count.cumsum(0) - count)[key]
    columns, tiles = -(-len(start) // BLOCK), -(-length // BLOCK)
    pairs = torch.unique((first[key] + within) * columns + key // BLOCK)
    tile, block = pairs // columns, pairs % columns
    number = torch.bincount(tile, minlength=tiles)
    place = torch.arange(len(pairs), device=start.device) - (number.cumsum(0) - number)[tile]
    blocks = torch.zeros(tiles, columns, dtype=torch.int32, device=start.device)
    blocks[tile, place] = block.int()
    return BlockMask.from_kv_blocks(
        number.int()[None, None], blocks[None, None], BLOCK_SIZE=BLOCK, mask_mod=mask_mod,
        seq_lengths=(length, len(start)),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return compile_whole(flex_attention)


def attention(problem: Problem, keys: Slots, token_qkv: Tensor, node_qv: Tensor) -> Tensor:
    """``[B·L, E]`` from q, k and v of tokens ``[B·L, 3E]`` and q and v of nodes ``[m, rows, 2E]``."""
    shape = problem.shape
    if not torch.is_grad_enabled():
        # The compiler looks at leaves all the same, and refuses on a CPU what it could not differentiate.
        token_qkv, node_qv = token_qkv.detach(), node_qv.detach()
    token_q, k, token_v = token_qkv.chunk(3, 1)
    node_q, node_v = node_qv.flatten(0, 1).chunk(2, 1)

    def gathered(token: Tensor, node: Tensor) -> Tensor:
        rows = torch.cat([token, node])[keys.row]
        return rows.unflatten(-1, (shape.heads, -1)).transpose(1, 2)

    query = k.view(shape.batch, shape.length, shape.heads, -1).transpose(1, 2)
    out = _compiled()(query, gathered(token_q, node_q), gathered(token_v, node_v), block_mask=keys.mask)
    return out.transpose(1, 2).reshape(shape.tokens, shape.embedding)
