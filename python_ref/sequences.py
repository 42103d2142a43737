"""The descriptor of a batch: which rows of x belong to which sequence, and from which position on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_device, check_ids, check_positive, check_shape, check_tensor, concrete


class Order(NamedTuple):
    """Rows of a batch with a row's tokens in front, in their order, and what a mask hides behind them.

    Attributes:
        row: ``[M]`` int64: the row of x that stands at each place.
        place: ``[M]`` int64: the place at which each row of x stands.
    """

    row: Tensor
    place: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Order:
        """That of ``mask [B, L]`` bool; nothing is read back, and nothing sorted."""
        batch, length = mask.shape
        tokens, hidden = mask.cumsum(1) - 1, (~mask).cumsum(1) - 1
        place = torch.where(mask, tokens, mask.sum(1, keepdim=True) + hidden)
        place = (place + torch.arange(batch, device=mask.device)[:, None] * length).flatten()
        return cls(torch.zeros_like(place).scatter(0, place, torch.arange(batch * length, device=mask.device)), place)

    def take(self, x: Tensor) -> Tensor:
        """Rows of ``x [B, L, E]`` in this order."""
        return x.flatten(0, 1).index_select(0, self.row).view(x.shape)

    def put_back(self, y: Tensor) -> Tensor:
        """Rows that `take` put in order, ``[B, L, E]``, where they were."""
        return y.flatten(0, 1).index_select(0, self.place).view(y.shape)


@dataclass(frozen=True)
class Sequences:
    """Sequences as spans of the rows of ``x [M, E]``.

    Build one with `equal`, `padded`, `masked`, `gapped` or `packed`; `after` moves it behind a state.

    Attributes:
        tokens: M.
        count: S, the number of sequences.
        max_position: upper bound on the last position of any sequence; decides how many levels exist.
        spans: ``[S, 3]`` int64 (first row, length, offset), or None for S fresh sequences of M/S tokens.
            The offset is the number of tokens that a sequence saw before.
        carried_levels: levels of carried nodes, or None where the sequences start from nothing.
        order: where given, spans count the rows of ``order.take(x)``, of `in_order`; operations take no others.
    """

    tokens: int
    count: int
    max_position: int
    spans: Tensor | None = None
    carried_levels: int | None = None
    order: Order | None = None

    @classmethod
    def equal(cls, count: int, length: int) -> Sequences:
        """``count`` sequences of ``length`` tokens, one after the other."""
        return cls(count * length, count, length)

    @classmethod
    def padded(cls, count: int, length: int, lengths: Tensor) -> Sequences:
        """Right-padded rows of ``length`` tokens; ``lengths [count]`` int32 or int64, 0 … length."""
        check_ids("lengths", lengths, (count,), 0, length)
        lengths = lengths.to(torch.int64)
        start = torch.arange(count, device=lengths.device) * length
        return cls(count * length, count, length, torch.stack([start, lengths, torch.zeros_like(start)], 1))

    @classmethod
    def masked(cls, mask: Tensor) -> Sequences:
        """Left- or right-padded rows: ``mask [B, L]`` is True (or nonzero) on one run of tokens per row.

        Raises:
            TypeError: a floating mask.
            ValueError: a row's tokens are not consecutive (checked where it costs no synchronisation).
        """
        mask = _as_bool(mask)
        batch, length = mask.shape
        if concrete(mask) and _has_gaps(mask):
            raise ValueError("attention_mask: expected one run of tokens per row, got a row with gaps")
        start = mask.int().argmax(1) if length else torch.zeros(batch, device=mask.device)
        start = start.to(torch.int64) + torch.arange(batch, device=mask.device) * length
        spans = torch.stack([start, mask.sum(1), torch.zeros_like(start)], 1)
        return cls(batch * length, batch, length, spans)

    @classmethod
    def gapped(cls, mask: Tensor) -> Sequences:
        """Rows of which ``mask [B, L]`` is True (or nonzero) on the tokens, wherever these stand.

        Where that would be a synchronisation or break a trace, nobody looks for gaps, and there always is an order.

        Raises:
            TypeError: a floating mask.
        """
        mask = _as_bool(mask)
        if concrete(mask) and not _has_gaps(mask):
            return cls.masked(mask)
        padded = cls.padded(mask.shape[0], mask.shape[1], mask.sum(1))
        return replace(padded, order=Order.of(mask))

    def in_order(self) -> Sequences:
        """The same sequences in rows that `Order.take` has put in order."""
        return replace(self, order=None)

    @classmethod
    def packed(cls, tokens: int, cu_seqlens: Tensor, max_length: int | None = None) -> Sequences:
        """Documents back to back: document s is rows ``cu_seqlens[s] … cu_seqlens[s+1]-1``.

        Args:
            tokens: rows of x; those from ``cu_seqlens[-1]`` on are padding.
            cu_seqlens: ``[S+1]`` int32 or int64, ascending, from 0.
            max_length: upper bound on a document's length; saves levels that no document reaches.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected shape [documents + 1], got {list(cu_seqlens.shape)}")
        check_ids("cu_seqlens", cu_seqlens, cu_seqlens.shape, 0, tokens)
        bounds = cu_seqlens.to(torch.int64)
        length = bounds.diff()
        if concrete(cu_seqlens):
            if int(bounds[0]) != 0:
                raise ValueError(f"cu_seqlens: expected to start at 0, got {int(bounds[0])}")
            if length.numel() and int(length.min()) < 0:
                raise ValueError("cu_seqlens: expected ascending values, got a descent")
            if max_length is not None and length.numel() and int(length.max()) > max_length:
                raise ValueError(f"max_length: expected at least {int(length.max())}, got {max_length}")
        spans = torch.stack([bounds[:-1], length, torch.zeros_like(length)], 1)
        longest = tokens if max_length is None else min(max_length, tokens)
        return cls(tokens, cu_seqlens.shape[0] - 1, longest, spans)

    @classmethod
    def of(
        cls,
        x: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Sequences:
        """The batch ``x [B, L, …]``, by at most one description of what in it is padding or a document.

        Raises:
            TypeError, ValueError: there are two, or the one does not fit; the message names it.
        """
        batch, length = x.shape[:2]
        masks = {"lengths": lengths, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        given = {name: value for name, value in masks.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: expected at most one of them, got {len(given)}")
        for name, value in given.items():
            check_tensor(name, value)
            check_device(name, value, x.device)
        if max_length is not None:
            if cu_seqlens is None:
                raise ValueError(f"max_length: expected None without cu_seqlens, got {max_length!r}")
            max_length = check_positive("max_length", max_length, 0)
        if lengths is not None:
            return cls.padded(batch, length, lengths)
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, (batch, length), "[batch, length]")
            return cls.gapped(attention_mask)
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"x: expected shape [1, tokens, embedding] with cu_seqlens, got {list(x.shape)}")
            return cls.packed(length, cu_seqlens, max_length)
        return cls.equal(batch, length)

    def after(self, position: Tensor, max_position: int, levels: int) -> Sequences:
        """The same tokens, each sequence continuing at ``position [S]`` behind nodes of ``levels`` levels."""
        if self.spans is None:
            length = self.tokens // self.count if self.count else 0
            index = torch.arange(self.count, device=position.device)
            spans = torch.stack([index * length, torch.full_like(index, length), position], 1)
        else:
            spans = torch.cat([self.spans[:, :2], position[:, None]], 1)
        return Sequences(self.tokens, self.count, self.max_position + max_position, spans, levels)

    def is_token(self) -> Tensor | None:
        """``[M]`` bool, False on rows of padding; None where every row is a token."""
        if self.spans is None:
            return None
        return self.rows_of(torch.ones_like(self.spans[:, 0], dtype=torch.bool))

    def rows_of(self, chosen: Tensor) -> Tensor:
        """``[M]`` bool: rows of x that are tokens of the sequences ``chosen [S]`` bool."""
        if self.spans is None:
            return chosen.repeat_interleave(self.tokens // self.count if self.count else 0)
        start, length, _ = self.spans.unbind(1)
        # Up where a span begins, down behind its end: a row inside exactly one span sums to 1.
        step = chosen.to(torch.int64)
        edge = torch.zeros(self.tokens + 1, dtype=torch.int64, device=start.device)
        edge = edge.index_add(0, start, step).index_add(0, start + length, -step)
        return edge.cumsum(0)[: self.tokens] > 0


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape [batch, length], got {list(mask.shape)}")
    if mask.is_floating_point():
        # An additive mask means the opposite: 0 where a token is.
        raise TypeError(f"attention_mask: expected bool or integers, nonzero at tokens, got {mask.dtype}")
    return mask.to(torch.bool)


def _has_gaps(mask: Tensor) -> bool:
    """Whether tokens of a row stand apart; reads a value."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return bool(((mask & ~before).sum(1) > 1).any())
