"""Building all nodes of a batch of sequences, level by level (section 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout, Level


class LinearMerge(NamedTuple):
    """A summarizer as a linear map of two stacks; every variant of section 6 is one.

    ``node[s] = Σ_κ pair[s-κ] · weight[κ] + bias`` with ``pair[s] = [left[s] ; right[s]]``, or with
    ``pair[s] = scale[0] ⊙ left[s] + scale[1] ⊙ right[s]`` where ``scale`` is given.

    Attributes:
        weight: ``[G, 1+k, 2C, C]`` (``[G, 1+k, C, C]`` with ``scale``): G groups of C = m·E/G features.
        bias: ``[G, C]``.
        scale: ``[2, G, C]`` of the depthwise-separable summarizer, or None.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None


class _Groups:
    """Conversions between nodes ``[m, P·h, E]`` and what the groups of a summarizer multiply."""

    def __init__(self, summarizer: LinearMerge, bank: int):
        self.groups = summarizer.weight.shape[0]
        self.bank = bank
        self.scale = summarizer.scale

    def split(self, nodes: Tensor) -> Tensor:
        """``[m, ..., E]`` → ``[G, ..., C]``."""
        if self.groups == self.bank:
            return nodes
        shape = nodes.shape[1:-1]
        return nodes.movedim(0, -2).reshape(self.groups, *shape, self.bank * nodes.shape[-1])

    def join(self, grouped: Tensor) -> Tensor:
        """``[G, ..., C]`` → ``[m, ..., E]``."""
        if self.groups == self.bank:
            return grouped
        banks: Tensor = grouped[0].unflatten(-1, (self.bank, -1)).movedim(-2, 0)
        return banks

    def pair(self, children: Tensor) -> Tensor:
        """Children ``[G, P, 2, h, C]`` → matrix ``[G, P·h, 2C]`` (``C`` with a scale)."""
        groups, places, _, height, size = children.shape
        if self.scale is not None:
            mixed = children * self.scale.transpose(0, 1)[:, None, :, None, :]
            return mixed.sum(2).reshape(groups, places * height, size)
        return children.transpose(2, 3).reshape(groups, places * height, 2 * size)

    def unpair(self, grad: Tensor, height: int) -> Tensor:
        """Gradient of `pair` with respect to the children."""
        if self.scale is not None:
            grad = grad.unflatten(1, (-1, height))[:, :, None]
            return grad * self.scale.transpose(0, 1)[:, None, :, None, :]
        sides: Tensor = grad.unflatten(1, (-1, height)).unflatten(-1, (2, -1)).transpose(2, 3)
        return sides


def _fold(taps: Tensor, height: int, expand: int) -> Tensor:
    """``[G, P·h, (1+k)·C]`` → ``[G, P, h+k, C]``: entry s sums tap κ of entry s-κ."""
    taps = taps.unflatten(1, (-1, height)).unflatten(-1, (1 + expand, -1))
    if expand == 0:
        return taps[..., 0, :]
    shifted = [torch.nn.functional.pad(taps[..., tap, :], (0, 0, tap, expand - tap)) for tap in range(1 + expand)]
    return torch.stack(shifted).sum(0)


def _unfold(grad: Tensor, height: int, expand: int) -> Tensor:
    """Gradient of `_fold`: ``[G, P, h+k, C]`` → ``[G, P·h, (1+k)·C]``."""
    if expand == 0:
        return grad.flatten(1, 2)
    return torch.cat([grad[:, :, tap : tap + height] for tap in range(1 + expand)], -1).flatten(1, 2)


def _children(source: Tensor, rows: Tensor | None, level: Level, layout: Layout) -> Tensor:
    """Children ``[m, P, 2, h, E]`` of the new nodes of a level.

    Args:
        source: ``[m, rows, E]``. Where sequences are of equal length: the level below, and the result
            is a view of it. Else: what ``rows`` counts.
        rows: ``[P, 2, h]`` rows of the children's stack entries, or None for equal lengths.
    """
    bank, _, size = source.shape
    if rows is not None:
        return source.index_select(1, rows.flatten()).reshape(bank, *rows.shape, size)
    pairs = source.reshape(bank, layout.sequences, -1, level.below, size)[:, :, : 2 * level.each]
    return pairs.reshape(bank, level.places, 2, level.below, size)


def _source(x: Tensor, nodes: Tensor, token: Tensor | None, level: Level, layout: Layout) -> Tensor:
    """What the children of a level are read from, ``[m, rows, E]``."""
    if level.number == 1:
        return (x if token is None else torch.cat([x, token])).expand(nodes.shape[0], -1, -1)
    return nodes if layout.spans is not None else nodes[:, level.read]


def _add_children_grad(
    grad_x: Tensor,
    grad_nodes: Tensor,
    grad_token: Tensor | None,
    grad: Tensor,
    rows: Tensor | None,
    level: Level,
    layout: Layout,
) -> None:
    """Add the gradient of `_children`, ``[m, P, 2, h, E]``, to that of what it read."""
    height, size = grad.shape[3:]
    if level.number == 1:
        grad = grad.sum(0, keepdim=True)
    if rows is None:
        target = grad_nodes[:, level.read] if level.number > 1 else grad_x[None]
        target = target.unflatten(1, (layout.sequences, -1, height))[:, :, : 2 * level.each]
        target += grad.reshape(grad.shape[0], layout.sequences, 2 * level.each, height, size)
        return
    rows, grad = rows.flatten(), grad.reshape(grad.shape[0], -1, size)
    if level.number > 1:
        grad_nodes.index_add_(1, rows, grad)
    elif grad_token is None:
        grad_x.index_add_(0, rows, grad[0])
    else:
        both = grad.new_zeros(layout.tokens + layout.sequences, size).index_add_(0, rows, grad[0])
        grad_x += both[: layout.tokens]
        grad_token += both[layout.tokens :]


def build_tree(
    x: Tensor, summarizer: LinearMerge, bank: int, token: Tensor | None, carried: Tensor | None, layout: Layout
) -> Tensor:
    """All nodes of all sequences (section 1), and the carried ones behind them.

    Args:
        x: ``[M, E]`` tokens.
        summarizer: the linear map that merges two nodes.
        bank: m.
        token: ``[S, E]`` newest token before each sequence (continued chunks), or None.
        carried: ``[S, R, m, E]`` newest nodes of levels 1, 2, … before each sequence, or None.
        layout: the rows.

    Returns:
        ``[m, layout.rows, E]``; rows that hold no node are zero or finite, the null row is zero.
    """
    expand = layout.expand
    groups = _Groups(summarizer, bank)
    weight = summarizer.weight.transpose(1, 2).flatten(2)
    nodes = x.new_empty(bank, layout.rows, x.shape[1])
    nodes[:, layout.unused_base :] = 0
    if carried is not None:
        nodes[:, layout.carry_base : layout.null_row] = carried.flatten(0, 1).transpose(0, 1)
    for level in layout.built:
        rows = None if layout.spans is None else layout.child_rows(level)
        source = _source(x, nodes, token, level, layout)
        pair = groups.pair(groups.split(_children(source, rows, level, layout)))
        target = nodes[:, level.rows]
        if expand == 0 and groups.groups == bank:
            torch.baddbmm(summarizer.bias[:, None], pair, weight, out=target)
        else:
            merged = _fold(torch.bmm(pair, weight), level.below, expand) + summarizer.bias[:, None, None]
            target.copy_(groups.join(merged.flatten(1, 2)))
    return nodes


def build_tree_backward(
    grad_nodes: Tensor,
    x: Tensor,
    nodes: Tensor,
    summarizer: LinearMerge,
    token: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `build_tree` with respect to x, weight, bias, scale, token and carried.

    From the top level down: a node's gradient is its own plus what its parent sends. The weight
    gradient accumulates over the levels in that fixed order.
    """
    expand, bank = layout.expand, nodes.shape[0]
    groups = _Groups(summarizer, bank)
    weight = summarizer.weight.transpose(1, 2).flatten(2)
    total = grad_nodes.clone(memory_format=torch.contiguous_format)
    grad_x = x.new_zeros(x.shape)
    # Sums over all nodes are kept in float32 at least; each is rounded once, at the end.
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_weight = torch.zeros_like(weight, dtype=wide)
    grad_bias = torch.zeros(summarizer.bias.shape, dtype=wide, device=x.device)
    grad_scale = None if summarizer.scale is None else grad_bias.new_zeros(summarizer.scale.shape)
    grad_token = None if token is None else token.new_zeros(token.shape)
    for level in reversed(layout.built):
        height = level.below
        rows = None if layout.spans is None else layout.child_rows(level)
        source = _source(x, nodes, token, level, layout)
        children = groups.split(_children(source, rows, level, layout))
        pair = groups.pair(children)
        grad = groups.split(total[:, level.rows])
        grad_bias += grad.sum(1, dtype=wide)
        taps = _unfold(grad.unflatten(1, (-1, height + expand)), height, expand)
        grad_weight += torch.bmm(pair.transpose(1, 2), taps)
        grad_pair = torch.bmm(taps, weight.transpose(1, 2))
        if grad_scale is not None:
            split = grad_pair.unflatten(1, (-1, height))[:, :, None]
            grad_scale += (children * split).sum((1, 3), dtype=wide).transpose(0, 1)
        grad_children = groups.join(groups.unpair(grad_pair, height))
        _add_children_grad(grad_x, total, grad_token, grad_children, rows, level, layout)
    grad_weight = x.new_empty(summarizer.weight.shape).copy_(grad_weight.unflatten(2, (1 + expand, -1)).transpose(1, 2))
    grad_bias = grad_bias.to(x.dtype)
    grad_scale = None if grad_scale is None else grad_scale.to(x.dtype)
    grad_carried = None
    if layout.carried_levels is not None:
        rows = total[:, layout.carry_base : layout.null_row].transpose(0, 1)
        grad_carried = x.new_empty(rows.shape).copy_(rows).view(layout.sequences, layout.carry_rows, bank, x.shape[1])
    return grad_x, grad_weight, grad_bias, grad_scale, grad_token, grad_carried


def merge_stacks(summarizer: LinearMerge, left: Tensor, right: Tensor) -> Tensor:
    """One merge, differentiable any number of times: two stacks ``[P, h, m, E]`` → ``[P, h+k, m, E]``."""
    places, height, bank, _ = left.shape
    expand = summarizer.weight.shape[1] - 1
    if not expand and summarizer.scale is None:
        count, _, _, size = summarizer.weight.shape
        sides = (left, right)
        if count != bank:
            sides = left.reshape(places, height, count, size), right.reshape(places, height, count, size)
        pair = torch.cat(sides, -1).flatten(0, 1).transpose(0, 1)
        node = torch.baddbmm(summarizer.bias.unsqueeze(1), pair, summarizer.weight.squeeze(1))
        return node.transpose(0, 1).reshape(left.shape)
    groups = _Groups(summarizer, bank)
    pair = groups.pair(groups.split(torch.stack([left, right], 1).permute(3, 0, 1, 2, 4)))
    taps = torch.bmm(pair, summarizer.weight.transpose(1, 2).flatten(2))
    merged = _fold(taps, height, expand) + summarizer.bias[:, None, None]
    return groups.join(merged).permute(1, 2, 0, 3)


def expand_stack(stack: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution along the stack of a node (section 6).

    Args:
        stack: ``[P, h, m, E]``.
        weight: ``[E, E, 1 + k]``, that of `torch.nn.ConvTranspose1d`; bias: ``[E]``.

    Returns:
        ``[P, h + k, m, E]``.
    """
    # As a matrix product: a convolution would be rounded to TF32 on a GPU by its own, other switch.
    taps = torch.einsum("phmi,iok->kphmo", stack, weight)
    k = len(taps) - 1
    shifted = [torch.nn.functional.pad(tap, (0, 0, 0, 0, i, k - i)) for i, tap in enumerate(taps)]
    return torch.stack(shifted).sum(0) + bias


def build_tree_with(
    merge: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    bank: int,
    token: Tensor | None,
    carried: Tensor | None,
    layout: Layout,
) -> Tensor:
    """`build_tree` for any summarizer, by plain autograd, linear in memory.

    Args:
        merge: ``(left, right) → node`` on stacks ``[P, h, m, E]`` → ``[P, h+k, m, E]``.

    Shapes are those of `build_tree`.
    """
    size, levels = x.shape[1], []
    below = (x if token is None else torch.cat([x, token])).expand(bank, -1, -1)
    tail = x.new_zeros(bank, layout.rows - layout.unused_base, size)
    if carried is not None:
        lead = layout.carry_base - layout.unused_base
        tail = torch.cat([tail[:, :lead], carried.flatten(0, 1).transpose(0, 1), tail[:, -1:]], 1)
    for level in layout.built:
        rows = None if layout.spans is None else layout.child_rows(level)
        if rows is not None and level.number > 1:
            # ``below`` holds one level, then everything that stands behind the new nodes.
            slot = level.read
            rows = torch.where(rows < slot.stop, rows - slot.start, rows - layout.unused_base + slot.stop - slot.start)
        stacks = _children(below, rows, level, layout).permute(1, 2, 3, 0, 4)
        node = merge(stacks[:, 0], stacks[:, 1])
        expected = (stacks.shape[0], level.height, bank, size)
        if tuple(node.shape) != expected:
            raise ValueError(f"summarizer: expected a node of shape {expected}, got {tuple(node.shape)}")
        levels.append(node.permute(2, 0, 1, 3).reshape(bank, node.shape[0] * node.shape[1], size))
        below = levels[-1] if rows is None else torch.cat([levels[-1], tail], 1)
    if not levels and torch.is_grad_enabled():
        # No block is complete. A merge of nothing gives the summarizer's parameters a gradient of zero.
        nothing = x.new_zeros(0, 1, bank, size)
        levels.append(merge(nothing, nothing).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat([*levels, tail], 1)
