"""Integer tables that the attention kernels read: which tile is where, and what a tile may read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from python_ref.layout import Layout, constant


class AttendTables(NamedTuple):
    """Tables of one layout and tile width; G tiles, S sequences, D levels, K keys.

    Attributes:
        spans: ``[S, 3]`` int64 start, length, offset.
        level_row: ``[S, D+1]`` int64: the first stack entry of ``node(i, j)`` of a sequence is row
            ``level_row[s, i] + j·(1 + i·expand)``.
        tile: ``[G, 2]`` int64 sequence and first position; sequence -1 where there is no tile.
        key: ``[3, K']`` int32 level, slot, entry, K' a multiple of 64; level -1 behind the last key.
        keys: K.
        owned_keys: keys whose node no other tile reads; they come first.
        shared: ``[P, 4]`` int64 for every stack entry of a node that several tiles read: its row, its
            number among the shared keys, first tile, end of tiles.
    """

    spans: Tensor
    level_row: Tensor
    tile: Tensor
    key: Tensor
    keys: int
    owned_keys: int
    shared: Tensor


def attend_tables(layout: Layout, width: int) -> AttendTables:
    """The tables, made once for a layout."""
    return layout.keep(("attend", width), lambda: _build(layout, width))


def _build(layout: Layout, width: int) -> AttendTables:
    start, length, offset, first, place = tables = layout.tables()
    sequence, base, real, before = layout.tile_list(width)
    level, slot, entry = layout.tile_keys(width)
    bases = constant(tuple(layout.level_base), layout.device)
    shift = width.bit_length() - 1
    height = 1 + torch.arange(layout.levels + 1, device=layout.device) * layout.expand
    level_row = bases[:, None] + (place[:, :-1] - first) * height[:, None]
    key = pad(torch.stack([level, slot, entry]), (0, -len(level) % 64), value=-1)
    return AttendTables(
        torch.stack([start, length, offset], 1),
        level_row.T.contiguous(),
        torch.stack([torch.where(real, sequence, -1), base], 1),
        key.to(torch.int32),
        len(level),
        # A node of the tile's own level has one tile to itself, too.
        sum((width >> i) * layout.heights[i] for i in range(1, min(shift, layout.levels) + 1)),
        _shared(layout, tables, width, before),
    )


def _shared(layout: Layout, tables: tuple[Tensor, ...], width: int, before: Tensor) -> Tensor:
    """The ``shared`` table: ``node(i, j)`` is read by the tiles of positions (j+1)·2^i … (j+2)·2^i - 1."""
    _, _, offset, first, place = tables
    shift = width.bit_length() - 1
    sequences = torch.arange(layout.sequences, device=layout.device)
    rows, number = [], 0
    for level in range(shift + 1, layout.levels + 1):
        height = layout.heights[level]
        count = torch.arange(layout.level_nodes[level], device=layout.device)
        sequence = torch.searchsorted(place[level, 1:].contiguous(), count, right=True)
        sequence = sequence.clamp(max=max(layout.sequences - 1, 0))
        index = first[level, sequence] + count - place[level, sequence]
        row = layout.level_base[level] + count * height
        used = count < place[level, -1]
        if layout.carried_levels is not None and level <= layout.carried_levels:
            carried = first[level] - 1
            below = (level - 1) + layout.expand * (level * (level - 1) // 2)
            row = torch.cat([row, layout.carry_base + sequences * layout.carry_rows + below])
            used = torch.cat([used, carried >= 0])
            index, sequence = torch.cat([index, carried]), torch.cat([sequence, sequences])
        first_tile = (offset[sequence] + 1) >> shift
        begin, end = before[sequence], before[sequence + 1]
        low = torch.minimum((((index + 1) << level) >> shift) - first_tile + begin, end)
        high = torch.minimum((((index + 2) << level) >> shift) - first_tile + begin, end)
        low = torch.where(used, torch.maximum(low, begin), 0)
        high = torch.where(used, torch.maximum(high, begin), 0)
        for entry in range(height):
            rows.append(torch.stack([row + entry, torch.full_like(row, number + entry), low, high], 1))
        number += height
    return torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.int64, device=layout.device)
