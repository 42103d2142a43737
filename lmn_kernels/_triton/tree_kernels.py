"""The kernels that build trees; `tree` launches them.

Launches differ only in who computes which rows of a level and how levels wait for each other:

- ``tree_fwd_kernel``, ``tree_bwd_kernel`` walk levels with the whole grid, which meets at a barrier
  between two levels (of a single level: no barrier, an ordinary launch);
- ``tree_block_fwd_kernel``, ``tree_block_bwd_kernel`` give a program a block of consecutive nodes of one
  sequence and all that stands above them, so that programs never wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_tiles import (
    PAIRED,
    as_sizes,
    block_of,
    children_of,
    grad_level,
    meet,
    merge_level,
    merge_tile,
    places_of,
    row_pointers,
    split_rows,
)

# Arguments that must not cost a compilation when they change: sizes of a batch, and what to do of it.
SIZES = ["tokens", "sequences", "length", "carried", "spare", "node_rows", "banks"]
WALK = [*SIZES, "first", "last", "base", "below", "table"]
BLOCK = [*SIZES, "first", "count", "blocks", "base", "below"]
WEIGHT = [*SIZES, "levels", "splits"]


@triton.jit(do_not_specialize=WALK)
def tree_fwd_kernel(
    p_x,  # [M, E]
    p_token,  # [S, E]
    p_table,  # [places of all levels, 2] rows of children
    p_weight,  # [G, TAPS, 2C, C]; [G, TAPS, C, C] with a scale
    p_bias,  # [G, C]
    p_scale,  # [2, G, C]
    p_nodes,  # [m, node_rows, E]
    p_counter,  # [1], zero
    tokens,
    sequences,
    length,
    carried,
    spare,
    node_rows,
    banks,
    first,
    last,
    base,
    below,
    table,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FEW: tl.constexpr,
    FEW_BM: tl.constexpr,
    FEW_BN: tl.constexpr,
    FEW_BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Levels ``first … last-1``, from below; tiles of [FEW_BM, FEW_BN] where a level has at most FEW rows."""
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    pointers = (p_x, p_token, p_table, p_weight, p_bias, p_scale, p_nodes)
    sizes = as_sizes(tokens, sequences, length, carried, spare, node_rows, banks)
    base, below, table = base.to(tl.int64), below.to(tl.int64), table.to(tl.int64)
    for level in range(first, last):
        places = places_of(level, sizes, CHILDREN)
        rows = places * (1 + level * (TAPS - 1))
        at = (level, base, below, table, 0)
        if FEW > 0 and rows <= FEW:
            merge_level(
                pointers, sizes, at, rows, i_program, programs,
                E, C, TAPS, HAS_SCALE, HAS_TOKEN, CHILDREN, FEW_BM, FEW_BN, FEW_BK, DOT, PRECISION,
            )  # fmt: skip
        else:
            merge_level(
                pointers, sizes, at, rows, i_program, programs,
                E, C, TAPS, HAS_SCALE, HAS_TOKEN, CHILDREN, BM, BN, BK, DOT, PRECISION,
            )  # fmt: skip
        below = base
        base += rows
        table += places
        if level + 1 < last:
            meet(p_counter, (level + 1 - first) * programs)


@triton.jit(do_not_specialize=WALK)
def tree_bwd_kernel(
    p_table,  # [places of all levels, 2] rows of children
    p_weight,  # as in tree_fwd_kernel
    p_scale,  # [2, G, C]
    p_total,  # [m, node_rows, E] gradients of the nodes, completed here
    p_grad_x,  # [M, E]
    p_grad_token,  # [S, E]
    p_counter,  # [1], zero
    tokens,
    sequences,
    length,
    carried,
    spare,
    node_rows,
    banks,
    first,
    last,
    base,
    below,
    table,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FEW: tl.constexpr,
    FEW_BM: tl.constexpr,
    FEW_BN: tl.constexpr,
    FEW_BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Levels ``last-1 … first`` send their gradients down; base, below and table are those of ``last-1``."""
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    pointers = (p_table, p_weight, p_scale, p_total, p_grad_x, p_grad_token)
    sizes = as_sizes(tokens, sequences, length, carried, spare, node_rows, banks)
    base, below, table = base.to(tl.int64), below.to(tl.int64), table.to(tl.int64)
    for step in range(0, last - first):
        level = last - 1 - step
        places = places_of(level, sizes, CHILDREN)
        rows = places * (1 + (level - 1) * (TAPS - 1))
        at = (level, base, below, table, 0)
        if FEW > 0 and rows <= FEW:
            grad_level(
                pointers, sizes, at, rows, i_program, programs,
                E, C, TAPS, HAS_SCALE, HAS_TOKEN, CHILDREN, FEW_BM, FEW_BN, FEW_BK, DOT, PRECISION,
            )  # fmt: skip
        else:
            grad_level(
                pointers, sizes, at, rows, i_program, programs,
                E, C, TAPS, HAS_SCALE, HAS_TOKEN, CHILDREN, BM, BN, BK, DOT, PRECISION,
            )  # fmt: skip
        base = below
        if level > 2:
            below -= places_of(level - 2, sizes, CHILDREN) * (1 + (level - 2) * (TAPS - 1))
        if level > first:
            table -= places_of(level - 1, sizes, CHILDREN)
            meet(p_counter, (step + 1) * programs)


@triton.jit(do_not_specialize=BLOCK)
def tree_block_fwd_kernel(
    p_x,  # [M, E]
    p_weight,  # as in tree_fwd_kernel
    p_bias,  # [G, C]
    p_scale,  # [2, G, C]
    p_nodes,  # [m, node_rows, E]
    tokens,
    sequences,
    length,
    carried,
    spare,
    node_rows,
    banks,
    first,
    count,
    blocks,
    base,
    below,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CHILDREN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``count`` levels from ``first`` on, of 2^SPAN nodes below them: sequences of equal length, a group each."""
    BANKS: tl.constexpr = C // E
    groups = banks // BANKS
    i_program = tl.program_id(0)
    i_block = (i_program // groups % blocks).to(tl.int64)
    sequence = (i_program // groups // blocks).to(tl.int64)
    bank0 = (i_program % groups).to(tl.int64) * BANKS
    pointers = (p_x, p_x, p_x, p_weight, p_bias, p_scale, p_nodes)
    sizes = as_sizes(tokens, sequences, length, carried, spare, node_rows, banks)
    base, below = base.to(tl.int64), below.to(tl.int64)
    for step in range(0, count):
        level = first + step
        height = 1 + level * (TAPS - 1)
        place0, places = block_of(level, SPAN - 1 - step, i_block, sequence, sizes)
        at = (level, base, below, base, place0)
        for row0 in range(0, places * height, BM):
            for bank in range(bank0, bank0 + BANKS):
                for col0 in range(0, E, BN):
                    merge_tile(
                        pointers, sizes, at, row0, places * height, bank, col0,
                        E, C, TAPS, HAS_SCALE, False, CHILDREN, BM, BN, BK, DOT, PRECISION,
                    )  # fmt: skip
        below = base
        base += places_of(level, sizes, PAIRED) * height
        tl.debug_barrier()


@triton.jit(do_not_specialize=BLOCK)
def tree_block_bwd_kernel(
    p_weight,  # as in tree_fwd_kernel
    p_scale,  # [2, G, C]
    p_total,  # [m, node_rows, E] gradients of the nodes, completed here
    p_grad_x,  # [M, E]
    tokens,
    sequences,
    length,
    carried,
    spare,
    node_rows,
    banks,
    first,
    count,
    blocks,
    base,
    below,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CHILDREN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The levels of `tree_block_fwd_kernel` from the top; base and below are those of the highest."""
    i_block = (tl.program_id(0) % blocks).to(tl.int64)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    pointers = (p_weight, p_weight, p_scale, p_total, p_grad_x, p_grad_x)
    sizes = as_sizes(tokens, sequences, length, carried, spare, node_rows, banks)
    base, below = base.to(tl.int64), below.to(tl.int64)
    for step in range(0, count):
        level = first + count - 1 - step
        under = 1 + (level - 1) * (TAPS - 1)
        place0, places = block_of(level, SPAN - count + step, i_block, sequence, sizes)
        at = (level, base, below, base, place0)
        grad_level(
            pointers, sizes, at, places * under, 0, 1,
            E, C, TAPS, HAS_SCALE, False, CHILDREN, BM, BN, BK, DOT, PRECISION,
        )  # fmt: skip
        base = below
        if level > 2:
            below -= places_of(level - 2, sizes, PAIRED) * (1 + (level - 2) * (TAPS - 1))
        tl.debug_barrier()


@triton.jit(do_not_specialize=WEIGHT)
def tree_bwd_kernel_weight(
    p_x,  # [M, E]
    p_token,  # [S, E]
    p_table,  # [places of all levels, 2] rows of children
    p_nodes,  # [m, node_rows, E]
    p_total,  # [m, node_rows, E] completed gradients of the nodes
    p_partial,  # [splits, G, TAPS, 2C, C] float32
    tokens,
    sequences,
    length,
    carried,
    spare,
    node_rows,
    banks,
    levels,
    splits,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of ``Σ child ⊗ grad of its parent`` over the split's share of the rows of every level."""
    BANKS: tl.constexpr = C // E
    INS: tl.constexpr = (E + BM - 1) // BM
    OUTS: tl.constexpr = (E + BN - 1) // BN
    TILES: tl.constexpr = TAPS * 2 * BANKS * INS * BANKS * OUTS
    sizes = as_sizes(tokens, sequences, length, carried, spare, node_rows, banks)
    groups = banks // BANKS
    i_tile, i_split = tl.program_id(0) % (TILES * groups), tl.program_id(0) // (TILES * groups)
    o_out = i_tile % OUTS * BN + tl.arange(0, BN)
    bank_out = i_tile // OUTS % BANKS
    o_in = i_tile // (OUTS * BANKS) % INS * BM + tl.arange(0, BM)
    group = i_tile // TILES
    bank_in = i_tile // (OUTS * BANKS * INS) % BANKS
    side = i_tile // (OUTS * BANKS * INS * BANKS) % 2
    tap = i_tile // (OUTS * BANKS * INS * BANKS * 2) % TAPS
    m_in, m_out = o_in < E, o_out < E
    b_acc = tl.zeros([BM, BN], tl.float32)
    base, below, table = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for level in range(1, levels + 1):
        places = places_of(level, sizes, CHILDREN)
        under = 1 + (level - 1) * (TAPS - 1)
        height = under + (TAPS - 1)
        first = level == 1
        p_child = p_nodes + (group * BANKS + bank_in) * (sizes[5] * E)
        p_grad = p_total + ((group * BANKS + bank_out) * sizes[5] + base + tap) * E
        # Low levels give every split its share; the single tiles of high ones go to one split after the other.
        share = tl.cdiv(places * under, splits * BK) * BK
        start = (i_split + level) % splits * share
        for row0 in range(start, tl.minimum(start + share, places * under), BK):
            o_row = row0 + tl.arange(0, BK)
            m_row = o_row < places * under
            place, entry = split_rows(o_row, under, TAPS)
            left, right = children_of(p_table, place, m_row, sizes, (level, base, below, table), under, CHILDREN)
            m_row &= left >= 0
            child = entry + tl.where(side == 0, left, right)
            p_row = row_pointers(p_x, p_token, p_child, child, tokens, first, E, HAS_TOKEN)
            b_child = tl.load(p_row[None, :] + o_in[:, None], mask=m_row[None, :] & m_in[:, None], other=0.0)
            p_row = p_grad + (place * height + entry) * E
            b_grad = tl.load(p_row[:, None] + o_out[None, :], mask=m_row[:, None] & m_out[None, :], other=0.0)
            b_acc = tl.dot(b_child.to(DOT), b_grad.to(DOT), b_acc, input_precision=PRECISION)
        below = base
        base += places * height
        table += places
    o_weight = (((i_split * groups + group).to(tl.int64) * TAPS + tap) * 2 + side) * C + bank_in * E + o_in
    o_weight = o_weight[:, None] * C + (bank_out * E + o_out)[None, :]
    tl.store(p_partial + o_weight, b_acc, mask=m_in[:, None] & m_out[None, :])
