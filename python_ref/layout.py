"""Where every node of a batch of sequences lives.

One layout serves equal-length batches, right- and left-padded batches, packed documents and chunks
that continue from a state. The tokens of all sequences are the rows of one matrix ``x [M, E]``; a
sequence is a *span* ``(start, length, offset)``: its tokens are the rows ``start … start+length-1``
of x and the positions ``n = offset+1 … offset+length`` of the sequence (positions count from 1, as
in section 1 of docs/definition.md).

The nodes of one bank are the rows of one matrix, level after level, and within a level sequence
after sequence. A node of level i takes ``1 + i·expand`` rows: the stack of the expander, a single
row without one. Behind the new nodes stand the nodes that the sequences carried in (continued
chunks), and at the very end the *null row*, which is zero and stands for every node that is absent.

``position n`` reads, at level i, ``node(i, (n >> i) - 1)``. All tables below are integer tensors that
follow from the spans by arithmetic alone: they are built on the device that holds the spans, and no
value is ever read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .sequences import Sequences

Made = TypeVar("Made")


def level_count(position: int) -> int:
    """Levels that hold a complete block once ``position`` tokens were seen: ⌊log2 position⌋."""
    # Comparisons, not bit_length: a traced length then stays a symbol within its power of two.
    levels = 0
    while position >> (levels + 1):
        levels += 1
    return levels


def stack_height(level: int, expand: int) -> int:
    """Rows that one node of ``level`` takes (section 6, expander)."""
    return 1 + level * expand


def state_rows(levels: int, expand: int) -> int:
    """Rows that the newest nodes of levels 1 … ``levels`` take."""
    return levels + expand * (levels * (levels + 1) // 2)


def levels_in(rows: int, expand: int) -> int:
    """The way back from `state_rows`."""
    levels = 0
    while state_rows(levels, expand) < rows:
        levels += 1
    return levels


def last_position(levels: int) -> int:
    """The last position of which a state of so many levels can hold the memory."""
    return (2 << levels) - 1


def node_rows(sequences: Sequences, expand: int) -> int:
    """Rows of a node matrix: a bound that needs neither tables nor levels, so that it can be traced.

    Fresh sequences have fewer nodes than tokens, and Σ_i ⌊M/2^i⌋·(1+i·k) ≤ (1+2k)·M. A continued one
    completes at most one node more at each carried level, and 2^(1-r) more at the r-th level above.
    """
    rows, carried = (1 + 2 * expand) * sequences.tokens + 1, sequences.carried_levels
    if carried is not None:
        slack = state_rows(carried, expand) + 2 * stack_height(carried + 1, expand) + 2 * expand
        rows += sequences.count * (slack + state_rows(carried, expand))
    return rows


def _level_nodes(level: int, sequences: Sequences) -> int:
    """Upper bound on the new nodes of a level over all sequences, whatever their spans."""
    tokens, count, carried = sequences.tokens, sequences.count, sequences.carried_levels
    if carried is None:
        return tokens >> level
    if level <= carried:
        return (tokens >> level) + count
    # An offset is below 2^(carried+1).
    return (tokens + (count << (carried + 1))) >> level


@dataclass(frozen=True)
class TileTable:
    """Which tokens and nodes the tiles of 2^k consecutive positions hold (aligned on n, not on t).

    Attributes:
        width: positions in a tile.
        token_row: ``[G, width]`` row of x at each place; 0 where ``token_valid`` is False.
        token_valid: ``[G, width]`` whether the place belongs to a sequence.
        key_row: ``[G, K]`` row of the node matrix for each key of a tile; the null row where absent.
        key_valid: ``[G, K]`` whether that node exists.
        visible: ``[width, K]`` whether a place may read a key that exists; the same for all tiles.
    """

    width: int
    token_row: Tensor
    token_valid: Tensor
    key_row: Tensor
    key_valid: Tensor
    visible: Tensor


class Level(NamedTuple):
    """The new nodes of one level ≥ 1.

    Attributes:
        number: i.
        places: upper bound on the new nodes of all sequences, whatever their spans; at least 1.
        each: new nodes of each sequence, of equal lengths.
        height: rows that a node takes.
        below: rows that a node of the level below takes.
        rows: rows of the new nodes in the node matrix.
        read: rows of the level below: of x for level 1.
    """

    number: int
    places: int
    each: int
    height: int
    below: int
    rows: slice
    read: slice


class Layout:
    """Row arithmetic of one batch of sequences.

    Args:
        sequences: the batch.
        expand: k of the expander, 0 without one.
        device: where the tables are built.
        kept: whether the layout outlives a call, and its tables with it.

    Attributes:
        tokens, sequences, spans, carried_levels: those of the batch.
        equal_length: tokens of each sequence where ``spans`` is None.
        levels: D, ⌊log2 max_position⌋; ``built``: those of them that have new nodes.
        level_nodes, level_rows, level_base, heights: by level, 0 for the tokens: upper bound on the new nodes, their
            rows, the first of these, and rows of a node.
        rows: of a node matrix, the null row last.
    """

    def __init__(self, sequences: Sequences, expand: int, device: torch.device, kept: bool = False):
        tokens, count, spans = sequences.tokens, sequences.count, sequences.spans
        self.kept = kept
        self.tokens = tokens
        self.sequences = count
        self.expand = expand
        self.device = device
        self.spans = spans
        self.carried_levels = sequences.carried_levels
        self.levels = level_count(sequences.max_position)
        self.equal_length = tokens // count if spans is None and count else 0
        self.rows = node_rows(sequences, expand)
        self.null_row = self.rows - 1
        self.carry_rows = 0 if self.carried_levels is None else state_rows(self.carried_levels, expand)
        self.carry_base = self.null_row - count * self.carry_rows
        self.level_nodes, self.level_rows, self.heights, self.built = [tokens], [slice(0, tokens)], [1], []
        base = 0
        for level in range(1, self.levels + 1):
            each = self.equal_length >> level
            nodes = count * each if spans is None else _level_nodes(level, sequences) * (count > 0)
            height = stack_height(level, expand)
            rows = slice(base, base + nodes * height)
            if nodes:
                self.built.append(Level(level, nodes, each, height, height - expand, rows, self.level_rows[-1]))
            self.level_nodes.append(nodes)
            self.level_rows.append(rows)
            self.heights.append(height)
            base = rows.stop
        self.level_base = [rows.start for rows in self.level_rows]
        self.unused_base = base
        self._memo: dict[Hashable, Any] = {}

    def keep(self, key: Hashable, build: Callable[[], Made]) -> Made:
        """What ``build`` makes, made once for this layout."""
        if key not in self._memo:
            self._memo[key] = build()
            if self.kept and self.device.type == "cuda":
                # A later call may come on another stream, which nothing orders behind this one.
                torch.cuda.current_stream(self.device).synchronize()
        made: Made = self._memo[key]
        return made

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``start, length, offset [S]``, ``first [D+1, S]`` (index of the first new node of each level)
        and ``place [D+1, S+1]`` (running count of new nodes before a sequence)."""
        return self.keep("tables", self._build_tables)

    def _build_tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.spans is None:
            index = torch.arange(self.sequences, device=self.device)
            start = index * self.equal_length
            length = torch.full_like(index, self.equal_length)
            offset = torch.zeros_like(index)
        else:
            start, length, offset = self.spans.unbind(1)
        shift = torch.arange(self.levels + 1, device=self.device)[:, None]
        first = offset >> shift
        count = ((offset + length) >> shift) - first
        place = torch.nn.functional.pad(count.cumsum(1), (1, 0))
        return start, length, offset, first, place

    def node_row(self, level: Tensor, sequence: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row of ``node(level, index)`` of a sequence, and whether that node exists here.

        Level 0 counts rows of x, followed by the carried tokens of the sequences (one each).
        """
        start, length, offset, first_table, place_table = self.tables()
        heights = 1 + level * self.expand
        first = first_table[level, sequence]
        fresh = index - first
        end = (offset + length)[sequence] >> level
        bases = constant(tuple(self.level_base), self.device)
        new_row = bases[level] + (place_table[level, sequence] + fresh) * heights
        new_row = torch.where(level == 0, start[sequence] + fresh, new_row)
        exists = (fresh >= 0) & (index < end)
        if self.carried_levels is None:
            absent = torch.where(level == 0, 0, self.null_row)
            return torch.where(exists, new_row, absent), exists
        # The carried rows of level i stand behind those of levels 1 … i-1: Σ (1 + l·k).
        below = (level - 1) + self.expand * (level * (level - 1) // 2)
        carried_row = self.carry_base + sequence * self.carry_rows + below
        carried_row = torch.where(level == 0, self.tokens + sequence, carried_row)
        carried = (fresh == -1) & (index >= 0) & (level <= self.carried_levels)
        row = torch.where(exists, new_row, torch.where(carried, carried_row, self.null_row))
        row = torch.where((level == 0) & ~(exists | carried), 0, row)
        return row, exists | carried

    def children(self, level: int) -> Tensor:
        """``[P, 2]`` rows of the left and right child of every new node of a level (section 1).

        Places beyond the last node of the last sequence have two absent children (row 0 at level 0, else
        the null row); what is computed from them is never read, and sends nothing to a real node.
        """
        _, _, _, first, place = self.tables()
        number = torch.arange(self.level_nodes[level], device=self.device)
        sequence = torch.searchsorted(place[level, 1:].contiguous(), number, right=True)
        sequence = sequence.clamp(max=max(self.sequences - 1, 0))
        index = first[level, sequence] + number - place[level, sequence]
        below = torch.full_like(number, level - 1)
        left, _ = self.node_row(below, sequence, 2 * index)
        right, _ = self.node_row(below, sequence, 2 * index + 1)
        rows = torch.stack([left, right], 1)
        real = number < place[level, -1]
        return torch.where(real[:, None], rows, 0 if level == 1 else self.null_row)

    def child_rows(self, level: Level) -> Tensor:
        """``[P, 2, h]`` rows of the stack entries of `children`; of equal lengths they lie in order."""
        rows = self.children(level.number)[..., None]
        if level.below == 1:
            return rows
        return rows + torch.arange(level.below, device=rows.device) * (rows != self.null_row)

    def slots(self, sequence: Tensor, position: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Rows of the memory of ``position n`` of a sequence (section 2).

        Args:
            sequence, position: ``[...]`` int64, of one shape.
            levels: levels of the memory; those above 2^i > n are absent.

        Returns:
            ``row, exists [..., state_rows(levels)]``: every stack entry of levels 1 … ``levels``.
        """
        level, entry = _stack_entries(range(1, levels + 1), self.expand, self.device)
        index = (position[..., None] >> level) - 1
        known = level.clamp(max=self.levels).expand_as(index)
        row, exists = self.node_row(known, sequence[..., None].expand_as(index), index)
        exists = exists & (level <= self.levels)
        return torch.where(exists, row + entry, self.null_row), exists

    def newest_token(self) -> tuple[Tensor, Tensor]:
        """``row, exists [S]`` of each sequence's newest token; the carried tokens follow the rows of x."""
        _, length, offset, _, _ = self.tables()
        sequence = torch.arange(self.sequences, device=self.device)
        return self.node_row(torch.zeros_like(length), sequence, offset + length - 1)

    def tiles(self, width: int) -> TileTable:
        """The tile table for tiles of ``width`` (a power of two) positions."""
        return self.keep(("tiles", width), lambda: self._build_tiles(width))

    def tile_list(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tiles of all sequences, sequence after sequence.

        Returns:
            ``sequence, base, real [G]``: the sequence of a tile, its first position (a multiple of
            ``width``), and whether it is a tile at all (G is a bound where lengths are not known here);
            and ``before [S+1]``, the running count of tiles before a sequence.
        """
        _, length, offset, _, _ = self.tables()
        shift = width.bit_length() - 1
        first = (offset + 1) >> shift
        count = torch.where(length > 0, ((offset + length) >> shift) - first + 1, 0)
        before = torch.nn.functional.pad(count.cumsum(0), (1, 0))
        if self.tokens == 0 or self.sequences == 0:
            total = 0
        elif self.spans is None:
            total = self.sequences * ((self.equal_length >> shift) + 1)
        else:
            total = (self.tokens >> shift) + self.sequences * (1 if self.carried_levels is None else 2)
        number = torch.arange(total, device=self.device)
        sequence = torch.searchsorted(before[1:].contiguous(), number, right=True)
        real = sequence < self.sequences
        sequence = sequence.clamp(max=max(self.sequences - 1, 0))
        base = (first[sequence] + number - before[sequence]) << shift
        return sequence, base, real, before

    def tile_keys(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """``level, slot, entry [K]`` of the keys of any tile, by rising level.

        Below the tile's own level a tile has ``width >> level`` nodes, at its level and above it one:
        key (level, slot) of the tile at ``base`` is ``node(level, (base >> level) - 1 + slot)``.
        """
        slots = [(level, slot) for level in range(1, self.levels + 1) for slot in range(max(width >> level, 1))]
        keys = tuple((level, slot, e) for level, slot in slots for e in range(stack_height(level, self.expand)))
        table = constant(keys, self.device).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def _build_tiles(self, width: int) -> TileTable:
        start, length, offset, _, _ = self.tables()
        shift = width.bit_length() - 1
        sequence, base, real, _ = self.tile_list(width)
        place = torch.arange(width, device=self.device)
        n = base[:, None] + place
        begin = offset[sequence][:, None]
        token_valid = (n > begin) & (n <= begin + length[sequence][:, None]) & real[:, None]
        token_row = torch.where(token_valid, start[sequence][:, None] + n - begin - 1, 0)

        level, slot, entry = self.tile_keys(width)
        index = (base[:, None] >> level) + slot - 1
        row, exists = self.node_row(level.expand_as(index), sequence[:, None].expand_as(index), index)
        exists = exists & real[:, None]
        key_row = torch.where(exists, row + entry, self.null_row)
        visible = (level >= shift) | ((place[:, None] >> level) == slot)
        return TileTable(width, token_row, token_valid, key_row, exists, visible)


def _stack_entries(levels: Iterable[int], expand: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Level and stack entry of every row of a list of nodes given by their levels."""
    pairs = tuple((i, e) for i in levels for e in range(stack_height(i, expand)))
    table = constant(pairs, device).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """An int64 tensor of Python integers; kept on a GPU, where every such copy would wait for the device."""
    # What is made under a transform of torch.func belongs to it.
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return torch.tensor(values, dtype=torch.int64, device=device)
    return _constant(values, device)


@lru_cache(maxsize=256)
def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_LAYOUTS: dict[tuple[Any, ...], Layout] = {}
_LAYOUTS_KEPT = 16


def make_layout(sequences: Sequences, expand: int, device: torch.device) -> Layout:
    """A `Layout`; that of an equal-length batch depends on sizes alone and is kept."""
    if sequences.spans is not None:
        return Layout(sequences, expand, device)
    key = (sequences.tokens, sequences.count, sequences.max_position, expand, device)
    layout = _LAYOUTS.get(key)
    if layout is None:
        if len(_LAYOUTS) >= _LAYOUTS_KEPT:
            if device.type == "cuda":
                # Freed tables may be read by work still queued on any stream.
                torch.cuda.synchronize(device)
            _LAYOUTS.clear()
        layout = _LAYOUTS[key] = Layout(sequences, expand, device, kept=True)
    return layout
