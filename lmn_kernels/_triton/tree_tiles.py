"""What the kernels of `tree_kernels` are made of: rows and children of a level, tiles of its products.

A level is a product: its rows are (place, stack entry) pairs, its columns the features of a bank.

Tuples that the helpers hand on: ``sizes`` = (rows of x, sequences, length of each, carried levels, see
`places_of`, rows of a bank's nodes, banks); ``at`` = (level, first row of the level, first row of the
level below, first row of the table for the level, first place that the program owns). Whatever becomes an
address is int64 from the start.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How the children of a place are found: two neighbours of the level below; the same, but a sequence may
# leave a node without a parent behind its pairs; by a table.
PAIRED, EQUAL, TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def as_sizes(tokens, sequences, length, carried, spare, node_rows, banks):
    return (
        tokens.to(tl.int64),
        sequences.to(tl.int64),
        length.to(tl.int64),
        carried.to(tl.int64),
        spare.to(tl.int64),
        node_rows.to(tl.int64),
        banks.to(tl.int64),
    )


@triton.jit
def places_of(level, sizes, CHILDREN: tl.constexpr):
    """Places of a level ≥ 1, as `python_ref.layout.Layout.level_nodes` counts them."""
    tokens, sequences, length, carried, spare = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    if CHILDREN == TABLE:
        above = (tokens + spare) >> level
        return tl.where(level <= carried, (tokens >> level) + sequences, above)
    return sequences * (length >> level)


@triton.jit
def split_rows(o_row, height, TAPS: tl.constexpr):
    """Place and stack entry of rows."""
    if TAPS == 1:
        return o_row, o_row * 0
    return o_row // height, o_row % height


@triton.jit
def children_of(p_table, place, m_row, sizes, at, under, CHILDREN: tl.constexpr):
    """First rows of the left and the right child of places; -1 where a place holds no node."""
    level, below, table = at[0], at[2], at[3]
    if CHILDREN == TABLE:
        p_pair = p_table + (table + place) * 2
        return tl.load(p_pair, mask=m_row, other=-1), tl.load(p_pair + 1, mask=m_row, other=-1)
    left = 2 * place
    if CHILDREN == EQUAL:
        # Behind the pairs of a sequence its level may hold one node more, which has no parent yet.
        each = sizes[2] >> level
        left += place // each * ((sizes[2] >> (level - 1)) - 2 * each)
    left = tl.where(level == 1, 0, below) + left * under
    return left, left + under


@triton.jit
def row_pointers(p_x, p_token, p_nodes, row, tokens, first, E: tl.constexpr, HAS_TOKEN: tl.constexpr):
    """Where rows of the level below a level begin: in x (then the carried tokens) or in a node matrix."""
    p_row = tl.where(first, p_x, p_nodes) + row * E
    if HAS_TOKEN:
        p_row = tl.where(first & (row >= tokens), p_token + (row - tokens) * E, p_row)
    return p_row


@triton.jit
def merge_tile(
    pointers,
    sizes,
    at,
    row0,
    rows,
    bank,
    col0,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Nodes: rows ``row0 …`` (of ``rows``, counted from the first place owned) and columns of a bank."""
    p_x, p_token, p_table, p_weight, p_bias, p_scale, p_nodes = pointers
    level, base, place0 = at[0], at[1], at[4]
    node_rows, banks = sizes[5], sizes[6]
    BANKS: tl.constexpr = C // E
    SIDES: tl.constexpr = 1 if HAS_SCALE else 2
    STEPS: tl.constexpr = (E + BK - 1) // BK
    DEPTH: tl.constexpr = SIDES * C
    first = level == 1
    under = 1 + (level - 1) * (TAPS - 1)
    height = under + (TAPS - 1)
    o_row = row0 + tl.arange(0, BM)
    m_row = o_row < rows
    place, entry = split_rows(o_row, height, TAPS)
    left, right = children_of(p_table, place0 + place, m_row, sizes, at, under, CHILDREN)
    m_row &= left >= 0
    p_left = row_pointers(p_x, p_token, p_nodes, left, sizes[0], first, E, HAS_TOKEN)
    p_right = row_pointers(p_x, p_token, p_nodes, right, sizes[0], first, E, HAS_TOKEN)
    bank_stride = tl.where(first, 0, node_rows * E)
    group = bank // BANKS
    o_col = col0 + tl.arange(0, BN)
    m_col = o_col < E
    p_weight += group * (TAPS * DEPTH * C) + (bank % BANKS) * E + col0
    # Inside a step, 32 bits are enough for an offset.
    o_step = tl.arange(0, BK)[None, :]
    o_weight = tl.arange(0, BK)[:, None] * C + tl.arange(0, BN)[None, :]
    b_acc = tl.zeros([BM, BN], tl.float32)
    for step in range(TAPS * SIDES * BANKS * STEPS):
        o_k = (step % STEPS) * BK + tl.arange(0, BK)
        m_k = o_k < E
        inner = (step // STEPS) % BANKS
        side = (step // (STEPS * BANKS)) % SIDES
        tap = step // (STEPS * BANKS * SIDES)
        o_child = (group * BANKS + inner) * bank_stride + (step % STEPS) * BK
        m_child = m_row
        if TAPS > 1:
            o_child += (entry - tap) * E
            m_child = m_row & (entry >= tap) & (entry - tap < under)
        m_child = m_child[:, None] & m_k[None, :]
        if HAS_SCALE:
            p_factor = p_scale + (group * C + inner * E + o_k)
            b_left = tl.load((p_left + o_child)[:, None] + o_step, mask=m_child, other=0.0).to(tl.float32)
            b_right = tl.load((p_right + o_child)[:, None] + o_step, mask=m_child, other=0.0).to(tl.float32)
            b_left *= tl.load(p_factor, mask=m_k, other=0.0).to(tl.float32)[None, :]
            b_right *= tl.load(p_factor + banks * E, mask=m_k, other=0.0).to(tl.float32)[None, :]
            b_child = b_left + b_right
        else:
            p_child = tl.where(side == 0, p_left, p_right) + o_child
            b_child = tl.load(p_child[:, None] + o_step, mask=m_child, other=0.0)
        p_step = p_weight + tl.cast(tap * DEPTH + side * C + inner * E + (step % STEPS) * BK, tl.int64) * C
        b_weight = tl.load(p_step + o_weight, mask=m_k[:, None] & m_col[None, :], other=0.0)
        b_acc = tl.dot(b_child.to(DOT), b_weight.to(DOT), b_acc, input_precision=PRECISION)
    b_acc += tl.load(p_bias + bank * E + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    o_node = (bank * node_rows + base + place0 * height + o_row) * E
    m_node = (o_row < rows)[:, None] & m_col[None, :]
    tl.store(p_nodes + o_node[:, None] + o_col[None, :], b_acc.to(p_nodes.dtype.element_ty), mask=m_node)


@triton.jit
def merge_level(
    pointers,
    sizes,
    at,
    rows,
    i_first,
    i_stride,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tiles of a level that fall to a program: every ``i_stride``-th from ``i_first`` on."""
    COLS: tl.constexpr = (E + BN - 1) // BN
    row_tiles = tl.cdiv(rows, BM).to(tl.int32)
    for i_tile in range(i_first, sizes[6].to(tl.int32) * row_tiles * COLS, i_stride):
        row0 = ((i_tile // COLS) % row_tiles).to(tl.int64) * BM
        bank = (i_tile // (COLS * row_tiles)).to(tl.int64)
        merge_tile(
            pointers,
            sizes,
            at,
            row0,
            rows,
            bank,
            i_tile % COLS * BN,
            E,
            C,
            TAPS,
            HAS_SCALE,
            HAS_TOKEN,
            CHILDREN,
            BM,
            BN,
            BK,
            DOT,
            PRECISION,
        )


@triton.jit
def grad_tile(
    pointers,
    sizes,
    at,
    row0,
    rows,
    unit,
    side,
    col0,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What nodes send to their children, rows and columns of the bank ``unit``; to x, the sum over banks."""
    p_table, p_weight, p_scale, p_total, p_grad_x, p_grad_token = pointers
    level, base, place0 = at[0], at[1], at[4]
    tokens, node_rows, banks = sizes[0], sizes[5], sizes[6]
    BANKS: tl.constexpr = C // E
    STEPS: tl.constexpr = (E + BK - 1) // BK
    DEPTH: tl.constexpr = C if HAS_SCALE else 2 * C
    first = level == 1
    under = 1 + (level - 1) * (TAPS - 1)
    height = under + (TAPS - 1)
    o_row = row0 + tl.arange(0, BM)
    m_row = o_row < rows
    place, entry = split_rows(o_row, under, TAPS)
    place += place0
    left, right = children_of(p_table, place, m_row, sizes, at, under, CHILDREN)
    m_row &= left >= 0
    p_parent = p_total + (base + place * height + entry) * E
    o_col = col0 + tl.arange(0, BN)
    m_col = o_col < E
    o_weight = tl.arange(0, BN)[None, :] * C + tl.arange(0, BK)[:, None]
    b_left = tl.zeros([BM, BN], tl.float32)
    if HAS_SCALE:
        b_right = tl.zeros([BM, BN], tl.float32)
    for bank in range(unit, tl.where(first, banks, unit + 1)):
        group = bank // BANKS
        row = side * C + (bank % BANKS) * E + col0
        # With a scale the banks' products are scaled before they are added, else one sum will do.
        if HAS_SCALE:
            b_acc = tl.zeros([BM, BN], tl.float32)
        else:
            b_acc = b_left
        for step in range(TAPS * BANKS * STEPS):
            o_k = (step % STEPS) * BK + tl.arange(0, BK)
            m_k = o_k < E
            inner = (step // STEPS) % BANKS
            tap = step // (STEPS * BANKS)
            p_grad = p_parent + ((group * BANKS + inner) * node_rows + tap) * E
            b_grad = tl.load(p_grad[:, None] + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)
            p_step = p_weight + ((group * TAPS + tap) * DEPTH + row) * C + inner * E + (step % STEPS) * BK
            b_weight = tl.load(p_step + o_weight, mask=m_k[:, None] & m_col[None, :], other=0.0)
            b_acc = tl.dot(b_grad.to(DOT), b_weight.to(DOT), b_acc, input_precision=PRECISION)
        if HAS_SCALE:
            p_factor = p_scale + (bank * E + o_col)
            b_left += b_acc * tl.load(p_factor, mask=m_col, other=0.0).to(tl.float32)[None, :]
            b_right += b_acc * tl.load(p_factor + banks * E, mask=m_col, other=0.0).to(tl.float32)[None, :]
        else:
            b_left = b_acc
    p_nodes = p_total + unit * node_rows * E
    m_out = m_row[:, None] & m_col[None, :]
    child = entry + (left if HAS_SCALE else tl.where(side == 0, left, right))
    p_row = row_pointers(p_grad_x, p_grad_token, p_nodes, child, tokens, first, E, HAS_TOKEN)
    p_out = p_row[:, None] + o_col[None, :]
    # A row has one parent: nobody else adds to it, and rows of x hold nothing yet.
    b_left += tl.load(p_out, mask=m_out & (level > 1), other=0.0).to(tl.float32)
    tl.store(p_out, b_left.to(p_total.dtype.element_ty), mask=m_out)
    if HAS_SCALE:
        p_row = row_pointers(p_grad_x, p_grad_token, p_nodes, right + entry, tokens, first, E, HAS_TOKEN)
        p_out = p_row[:, None] + o_col[None, :]
        b_right += tl.load(p_out, mask=m_out & (level > 1), other=0.0).to(tl.float32)
        tl.store(p_out, b_right.to(p_total.dtype.element_ty), mask=m_out)


@triton.jit
def grad_level(
    pointers,
    sizes,
    at,
    rows,
    i_first,
    i_stride,
    E: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    CHILDREN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`merge_level` for gradients; a tile belongs to a side too, or writes both where there is a scale."""
    COLS: tl.constexpr = (E + BN - 1) // BN
    SIDES: tl.constexpr = 1 if HAS_SCALE else 2
    row_tiles = tl.cdiv(rows, BM).to(tl.int32)
    units = tl.where(at[0] == 1, 1, sizes[6].to(tl.int32))
    for i_tile in range(i_first, units * row_tiles * (SIDES * COLS), i_stride):
        row0 = ((i_tile // (SIDES * COLS)) % row_tiles).to(tl.int64) * BM
        unit = (i_tile // (SIDES * COLS * row_tiles)).to(tl.int64)
        grad_tile(
            pointers,
            sizes,
            at,
            row0,
            rows,
            unit,
            (i_tile // COLS) % SIDES,
            i_tile % COLS * BN,
            E,
            C,
            TAPS,
            HAS_SCALE,
            HAS_TOKEN,
            CHILDREN,
            BM,
            BN,
            BK,
            DOT,
            PRECISION,
        )


@triton.jit
def meet(p_counter, arrivals):
    """All programs of the grid wait here until ``arrivals`` were counted; what they wrote is then seen by all."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    seen = tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")
    while seen < arrivals:
        seen = tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def block_of(level, shift, i_block, sequence, sizes):
    """First place and number of places of a block at a level where a whole block has 2^shift."""
    each = sizes[2] >> level
    start = i_block << shift
    count = tl.maximum(tl.minimum(each - start, 1 << shift), 0)
    return sequence * each + start, count
