"""Look-ahead attention (docs/lamemo-definition.md, sections 1 to 4 and 8) in blocks of queries.

The keys of a segment are K rows, the memory first, oldest first, then the T tokens. A *token row* attends to itself
and all that is before it. A *memory row*, where there are any, attends to what came after it: to the last W keys that
end with the first token of the segment, so far as they are behind it in the row order. Its softmax goes on from that
of earlier segments, of which output and log-sum-exp are given: an online softmax that does not begin at nothing.

    token row i, key j ≤ i:                   s_ij = ((q_i + u)·k_j + (q_i + v)·r_{i-j}) / √D
    memory row i, key max(i, M-W) < j ≤ M:    s_ij = ((q_i + u')·k_j + (q_i + v')·r'_{j-i}) / √D

A block of queries of some of the streams makes the scores of the keys in its reach by two products; that with the
table of distances is a band, of which a strided view is the part that belongs to each pair, so nothing is shifted or
gathered. Backward makes the scores again. The largest tensor is a block's, and fits a cache; the work is linear in the
memory's length for a given W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import compute_dtype

# Elements of the scores of a block, which are passed over about ten times, and its rows: more would be hidden ones
# (measured on two Zen cores, 2^15 to 2^21 and 32 to 128, heads of 8 and 64).
BLOCK_ELEMENTS = 1 << 19
LEAST_ROWS, MOST_ROWS = 16, 32


class _Block(NamedTuple):
    """Queries ``i0 … i1-1`` and the keys ``j0 … j1-1`` in their reach, by key row.

    ``low … high`` are the distances between them that mean something.
    """

    looks_ahead: bool
    i0: int
    i1: int
    j0: int
    j1: int
    low: int
    high: int


def _streams(q: Tensor, kv: Tensor) -> Iterator[slice]:
    """Streams that are taken together, where blocks of `MOST_ROWS` leave room for several."""
    step = max(1, BLOCK_ELEMENTS // (kv.shape[3] * kv.shape[1] * min(MOST_ROWS, q.shape[1])))
    for first in range(0, q.shape[0], step):
        yield slice(first, first + step)


def _blocks(q: Tensor, kv: Tensor, tokens: int, window: int) -> Iterator[_Block]:
    batch, keys, _, heads, _ = kv.shape
    memory, first = q.shape[1] - tokens, keys - tokens
    step = BLOCK_ELEMENTS // (batch * heads * keys)
    step = max(LEAST_ROWS, min(MOST_ROWS, step))
    for i0 in range(0, memory, step):
        i1 = min(i0 + step, memory)
        j0 = max(i0 + 1, first - window + 1)
        yield _Block(True, i0, i1, j0, first + 1, max(1, j0 - i1 + 1), first - i0)
    for i0 in range(first, keys, step):
        i1 = min(i0 + step, keys)
        yield _Block(False, i0, i1, 0, i1, 0, i1 - 1)


class _Operands:
    """q, k, v and the table by head, in the dtype of the computation.

    ``copies``: whether to leave strided views and writing in place to those who need not be transformed.
    """

    def __init__(
        self,
        q: Tensor,
        kv: Tensor,
        bias: Tensor,
        table: Tensor,
        start: Tensor | None,
        future_row: int,
        copies: bool = False,
    ):
        self.copies = copies
        self.dtype = compute_dtype(q.dtype)
        self.first_row = kv.shape[1] - q.shape[1]
        self.batch, self.heads, self.scale = q.shape[0], q.shape[2], q.shape[3] ** -0.5
        self.q, self.bias = self.by_head(q), bias.to(self.dtype)[:, :, None, None]
        self.k, self.v = (self.by_head(part).flatten(0, 1).contiguous() for part in kv.unbind(2))
        self._seen = self.k, self.v
        if start is not None:
            # What no token sees may be of any value, and a weight of zero does not silence a NaN.
            gone = (torch.arange(kv.shape[1], device=kv.device) < start[:, None]).repeat(self.heads, 1)[..., None]
            self._seen = self.k.masked_fill(gone, 0), self.v.masked_fill(gone, 0)
        self.future = table[future_row:].transpose(0, 1).to(self.dtype)
        # Distances fall as keys rise.
        self.past = table[: kv.shape[1]].flip(0).transpose(0, 1).to(self.dtype)
        self.start = start

    def by_head(self, x: Tensor) -> Tensor:
        """``[B, …, H, D]`` → ``[H, B, …, D]``."""
        return x.permute(2, 0, 1, 3).to(self.dtype)

    def queries(self, block: _Block) -> tuple[Tensor, Tensor]:
        """``(q + u)/√D [H·B, b, D]`` for the keys, ``(q + v)/√D [H, B·b, D]`` for the distances."""
        q, kind = self.q[:, :, block.i0 - self.first_row : block.i1 - self.first_row], 2 * block.looks_ahead
        content, position = ((q + self.bias[kind + n]) * self.scale for n in range(2))
        return content.flatten(0, 1), position.flatten(1, 2)

    def distances(self, block: _Block) -> slice:
        """Which columns of the table of the block's kind it reads."""
        if block.looks_ahead:
            return slice(block.low, block.high + 1)
        return slice(self.past.shape[1] - 1 - block.high, self.past.shape[1] - block.low)

    def table(self, block: _Block) -> Tensor:
        return (self.future if block.looks_ahead else self.past)[:, self.distances(block)]

    def keys(self, block: _Block) -> Tensor:
        """``[H·B, n, D]``, as `values`."""
        return (self.k if block.looks_ahead else self._seen[0])[:, block.j0 : block.j1]

    def values(self, block: _Block) -> Tensor:
        return (self.v if block.looks_ahead else self._seen[1])[:, block.j0 : block.j1]

    def scores(self, block: _Block, content: Tensor, position: Tensor) -> Tensor:
        """``[H·B, b, n]``, -inf where a query does not see a key."""
        band = torch.matmul(position, self.table(block).transpose(1, 2))
        band = band.reshape(content.shape[0], content.shape[1], band.shape[2])
        by_distance = (_copied_pairs if self.copies else _pairs)(band, block, block.low)
        score = torch.baddbmm(by_distance, content, self.keys(block).transpose(1, 2))
        i = torch.arange(block.i0, block.i1, device=score.device)[:, None]
        if block.looks_ahead:
            hidden = min(block.i1, block.j1) - block.j0
            if hidden > 0:
                j = torch.arange(block.j0, block.j0 + hidden, device=score.device)
                score[:, :, :hidden].masked_fill_(j <= i, -torch.inf)
        else:
            j = torch.arange(block.i0, block.j1, device=score.device)
            score[:, :, block.i0 :].masked_fill_(j > i, -torch.inf)
            if self.start is not None:
                j = torch.arange(block.j0, block.j1, device=score.device)
                gone = (j < self.start[:, None])[None, :, None]
                by_stream = score.unflatten(0, (self.heads, self.batch))
                by_stream = (by_stream.masked_fill if self.copies else by_stream.masked_fill_)(gone, -torch.inf)
                score = by_stream.flatten(0, 1)
        return score


def _pairs(band: Tensor, block: _Block, low: int) -> Tensor:
    """Of a band ``[N, b, columns]`` by query and distance the view ``[N, b, n]`` by query and key.

    Columns begin with the distance ``low`` where the block looks ahead, and with its highest where it does not. One
    query on, each key is one distance nearer or farther, so a row is one column shorter than the band's. Where a pair
    has no distance, the view shows another pair's; it is hidden in any case.
    """
    first = _first_column(block, low)
    count, rows, width = band.shape
    shape, strides = (count, rows, block.j1 - block.j0), (rows * width, width - 1, 1)
    return band.as_strided(shape, strides, band.storage_offset() + first)


def _first_column(block: _Block, low: int) -> int:
    """The column of a band at which the first query's first key stands."""
    return block.j0 - block.i0 - low if block.looks_ahead else block.high - block.i0 + block.j0


def _copied_pairs(band: Tensor, block: _Block, low: int) -> Tensor:
    """`_pairs` of a band of its own width, as a copy that any transform takes: of a column more, rows of one less."""
    first, (_, rows, width) = _first_column(block, low), band.shape
    flat = torch.nn.functional.pad(band, (0, 1)).flatten(1)[:, first : first + rows * width]
    pairs: Tensor = flat.unflatten(1, (rows, width))[..., : block.j1 - block.j0]
    return pairs


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
    """Attention of the token rows and, where q has them, of the memory rows.

    Args:
        q: ``[B, T, H, D]`` of the tokens, or ``[B, K, H, D]`` of memory and tokens.
        kv: ``[B, K, 2, H, D]`` keys and values.
        bias: ``[4, H, D]`` u, v, u', v'.
        table: ``[R, H, D]``: row a is r_a, row ``future_row + a`` is r'_a.
        output: ``[B, M, H, D]``, ``lse [B, M, H]``: what the memory rows' softmax begins with; None for nothing.
        start: ``[B]`` int64, keys before it do not exist for the tokens of a sequence; None for 0.
        tokens: T.
        window: W.
        future_row: see ``table``.

    Returns:
        ``out`` shaped and typed as q, and ``lse [B, rows, H]`` in float32 (float64 for float64).
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    total = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    for some in _streams(q, kv):
        begin, seed, seed_lse = (None if x is None else x[some] for x in (start, output, lse))
        operands = _Operands(q[some], kv[some], bias, table, begin, future_row)
        for rows, mixed, size in _attended(operands, seed, seed_lse, _blocks(q[some], kv[some], tokens, window)):
            out[some, rows] = mixed.to(out.dtype)
            total[some, rows] = size
    return out, total


def attend_with(
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
    """`attend` by plain autograd, any number of times, and under the transforms of torch.func: nothing in place."""
    operands = _Operands(q, kv, bias, table, start, future_row, copies=True)
    found = list(_attended(operands, output, lse, _blocks(q, kv, tokens, window)))  # by rising rows
    if not found:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=compute_dtype(q.dtype))
    return torch.cat([mixed for _, mixed, _ in found], 1).to(q.dtype), torch.cat([size for _, _, size in found], 1)


def _attended(
    operands: _Operands, output: Tensor | None, lse: Tensor | None, blocks: Iterable[_Block]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each block its rows, their results ``[B, b, H, D]`` and their log-sum-exp ``[B, b, H]``."""
    for block in blocks:
        rows = slice(block.i0 - operands.first_row, block.i1 - operands.first_row)
        score = operands.scores(block, *operands.queries(block))
        top = score.detach().amax(-1, keepdim=True)
        seed = None
        if block.looks_ahead and output is not None and lse is not None:
            seed = lse[:, rows].permute(2, 0, 1).flatten(0, 1)[..., None]
            top = torch.maximum(top, seed)
        weight = (score - top).exp_()
        size = weight.sum(-1, keepdim=True)
        mixed = torch.bmm(weight, operands.values(block))
        if seed is not None and output is not None:
            share = (seed - top).exp()
            size = size + share
            mixed = mixed + share * operands.by_head(output[:, rows]).flatten(0, 1)
        yield rows, _by_batch(mixed / size, operands), _by_batch(top + size.log(), operands)[..., 0]


def _by_batch(x: Tensor, operands: _Operands) -> Tensor:
    """``[H·B, b, D]`` → ``[B, b, H, D]``."""
    rows: Tensor = x.unflatten(0, (operands.heads, operands.batch)).permute(1, 2, 0, 3)
    return rows


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    tokens: int,
    window: int,
    future_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to q, kv, bias and table.

    Of a softmax that began with something these are those of an ordinary one, given the merged ``out`` and ``lse``
    (section 3): the weights say how little the new keys count.
    """
    wide = compute_dtype(q.dtype)
    grad_q, grad_kv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv))
    grad_bias, grad_table = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (bias, table))
    for some in _streams(q, kv):
        begin = None if start is None else start[some]
        operands = _Operands(q[some], kv[some], bias, table, begin, future_row)
        mean = (grad_out[some].to(wide) * out[some].to(wide)).sum(-1) - grad_lse[some].to(wide)
        blocks = _blocks(q[some], kv[some], tokens, window)
        to_kv, to_bias, (behind, ahead) = _backward(operands, blocks, grad_out[some], mean, lse[some], grad_q[some])
        grad_kv[some] = to_kv
        grad_bias += to_bias
        grad_table[: kv.shape[1]] += behind.transpose(0, 1).flip(0)
        grad_table[future_row:] += ahead.transpose(0, 1)
    return grad_q, grad_kv, grad_bias.to(bias.dtype), grad_table.to(table.dtype)


def _backward(
    o: _Operands, blocks: Iterable[_Block], grad_out: Tensor, mean: Tensor, lse: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Gradients of kv, bias and the two tables by head, from some streams; writes that of q.

    Args:
        mean: ``[B, rows, H]`` what a softmax takes off: <grad_out, out>, less the gradient of its normaliser.
    """
    grad_k, grad_v, grad_bias = torch.zeros_like(o.k), torch.zeros_like(o.v), torch.zeros_like(o.bias)
    tables = (torch.zeros_like(o.past), torch.zeros_like(o.future))
    for block in blocks:
        rows, keys = slice(block.i0 - o.first_row, block.i1 - o.first_row), slice(block.j0, block.j1)
        content, position = o.queries(block)
        grad = o.by_head(grad_out[:, rows]).flatten(0, 1)
        by_row = [x[:, rows].permute(2, 0, 1).flatten(0, 1)[..., None] for x in (lse, mean)]
        weight = o.scores(block, content, position).sub_(by_row[0]).exp_()
        grad_v[:, keys].baddbmm_(weight.transpose(1, 2), grad)
        grad_score = torch.bmm(grad, o.values(block).transpose(1, 2)).sub_(by_row[1]).mul_(weight)
        grad_k[:, keys].baddbmm_(grad_score.transpose(1, 2), content)
        to_content = torch.bmm(grad_score, o.keys(block)) * o.scale
        band = _band(grad_score, block)
        band = band.view(o.heads, position.shape[1], band.shape[2])
        tables[block.looks_ahead][:, o.distances(block)].baddbmm_(band.transpose(1, 2), position)
        to_position = torch.bmm(band, o.table(block)).mul_(o.scale)
        kind = 2 * block.looks_ahead
        grad_bias[kind] += to_content.unflatten(0, (o.heads, o.batch)).sum((1, 2))[:, None, None]
        grad_bias[kind + 1] += to_position.sum(1)[:, None, None]
        grad_q[:, rows] = _by_batch(to_content.add_(to_position.view(to_content.shape)), o).to(grad_q.dtype)
    return torch.stack([_by_batch(x, o) for x in (grad_k, grad_v)], 2), grad_bias[:, :, 0, 0], tables


def _band(grad_score: Tensor, block: _Block) -> Tensor:
    """A gradient by query and key, laid out by query and distance: what `_pairs` is a view of, with zeros between."""
    count, rows, keys = grad_score.shape
    # So wide that no two pairs share a place: with distances, below the lowest, that hidden pairs would have.
    width, distances = keys + rows - 1, block.high - block.low + 1
    band = grad_score.new_zeros(count, rows, width)
    _pairs(band, block, block.high - width + 1).copy_(grad_score)
    return band[:, :, width - distances :] if block.looks_ahead else band[:, :, :distances]


def merge(old: Tensor, old_lse: Tensor, new: Tensor, new_lse: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys made one (section 3), ``eps`` in the denominator as the original has it.

    Args:
        old, new: ``[B, M, H, D]`` outputs.
        old_lse, new_lse: ``[B, M, H]`` log-sum-exp of their scores.
        eps: 1e-6 for the original's numbers, 0 for the exact merge.

    Returns:
        The merged output, in the dtype of ``new``, and its log-sum-exp.
    """
    top = torch.maximum(old_lse, new_lse)
    a, b = (old_lse - top).exp(), (new_lse - top).exp()
    alpha = (a / (a + b + eps))[..., None]
    merged = alpha * old.to(alpha.dtype) + (1 - alpha) * new.to(alpha.dtype)
    return merged.to(new.dtype), torch.logaddexp(old_lse, new_lse)
