"""The kernels of single-vector attention; `attention` launches them and says how they work."""

import triton
import triton.language as tl

# Integer arguments that vary with the batch: no value of theirs is worth a compilation of its own.
SIZES = ["rows", "banks", "keys", "stride_key", "levels", "carry_base", "carry_rows", "carried_levels"]


@triton.jit
def _keys(base, n_tokens, offset, o_k, p_key, p_level_row, stride_key, carry_row, carried_levels, EXPAND: tl.constexpr):
    """Level, slot, row and existence of the keys ``o_k`` of the tile at ``base``."""
    b_level = tl.load(p_key + o_k)
    b_slot = tl.load(p_key + stride_key + o_k)
    b_entry = tl.load(p_key + 2 * stride_key + o_k)
    m_key = b_level >= 0
    b_lev = tl.maximum(b_level, 1).to(tl.int64)
    b_index = (base >> b_lev) - 1 + b_slot
    b_first = offset >> b_lev
    m_new = (b_index >= b_first) & (b_index < ((offset + n_tokens) >> b_lev))
    m_old = (b_index == b_first - 1) & (b_index >= 0) & (b_lev <= carried_levels)
    b_new = tl.load(p_level_row + b_lev, mask=m_key, other=0) + b_index * (1 + b_lev * EXPAND)
    b_old = carry_row + (b_lev - 1) + EXPAND * (b_lev * (b_lev - 1) // 2)
    b_row = tl.where(m_new, b_new, b_old) + b_entry
    return b_level, b_slot, b_row, m_key & (m_new | m_old)


@triton.jit
def _tile(tile, spans, BT: tl.constexpr):
    """Base and span of a tile, the row of its first place, and which places hold a token.

    A tile's rows follow one another, so offsets inside it fit 32 bits behind one 64-bit base.
    """
    i_s = tl.load(tile)
    base = tl.load(tile + 1)
    start = tl.load(spans + 3 * i_s)
    n_tokens = tl.load(spans + 3 * i_s + 1)
    offset = tl.load(spans + 3 * i_s + 2)
    o_n = base + tl.arange(0, BT)
    m_t = (o_n > offset) & (o_n <= offset + n_tokens)
    return i_s, base, n_tokens, offset, start + base - offset - 1, m_t


@triton.jit(do_not_specialize=SIZES)
def attend_fwd_kernel(
    token_qkv,  # [M, 3, H, D]
    node_qv,  # [m, rows, 2, H, D]
    out,  # [M, H, D]
    lse,  # [M, H]
    spans,  # [S, 3]
    level_row,  # [S, levels]
    tile,  # [G, 2]
    key,  # [3, stride_key]
    rows,
    banks,
    keys,
    stride_key,
    levels,
    carry_base,
    carry_rows,
    carried_levels,
    H,
    D: tl.constexpr,
    EXPAND: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    LOG_BT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_g, i_h = pid // H, pid % H
    if tl.load(tile + 2 * i_g) < 0:
        return
    i_s, base, n_tokens, offset, row, m_t = _tile(tile + 2 * i_g, spans, BT)
    o_d = tl.arange(0, BD)
    m_td = m_t[:, None] & (o_d < D)[None, :]
    o_t = tl.arange(0, BT)
    p_token = token_qkv + row * (3 * H * D) + i_h * D + (o_t[:, None] * (3 * H * D) + o_d[None, :])
    # Scores in units of log 2, for exp2.
    log2_scale: tl.constexpr = D**-0.5 * 1.4426950408889634
    b_k = tl.load(p_token + H * D, mask=m_td, other=0.0)
    b_q = tl.load(p_token, mask=m_td, other=0.0).to(tl.float32)
    b_max = tl.sum(b_q * b_k.to(tl.float32), 1) * log2_scale
    b_sum = tl.full([BT], 1.0, tl.float32)
    b_out = tl.load(p_token + 2 * H * D, mask=m_td, other=0.0).to(tl.float32)
    b_k = b_k.to(DOT)
    for i_b in range(banks):
        for i_k in range(0, keys, BK):
            o_k = i_k + tl.arange(0, BK)
            b_level, b_slot, b_row, m_k = _keys(
                base, n_tokens, offset, o_k, key, level_row + i_s * levels, stride_key,
                carry_base + i_s * carry_rows, carried_levels, EXPAND,
            )  # fmt: skip
            m_kd = m_k[:, None] & (o_d < D)[None, :]
            p_node = node_qv + (tl.cast(i_b, tl.int64) * rows + b_row)[:, None] * (2 * H * D) + i_h * D + o_d[None, :]
            b_nq = tl.load(p_node, mask=m_kd, other=0.0).to(DOT)
            b_score = tl.dot(b_k, tl.trans(b_nq), input_precision=PRECISION) * log2_scale
            m_see = (b_level[None, :] >= LOG_BT) | ((o_t[:, None] >> b_level[None, :]) == b_slot[None, :])
            m_see = m_see & m_k[None, :]
            b_score = tl.where(m_see, b_score, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_score, 1))
            b_decay = tl.exp2(b_max - b_new)
            b_weight = tl.exp2(b_score - b_new[:, None])
            b_nv = tl.load(p_node + H * D, mask=m_kd, other=0.0).to(DOT)
            b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
            b_out = b_out * b_decay[:, None] + tl.dot(b_weight.to(DOT), b_nv, input_precision=PRECISION)
            b_max = b_new
    b_out = b_out / b_sum[:, None]
    p_out = out + row * (H * D) + i_h * D + (o_t[:, None] * (H * D) + o_d[None, :])
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_td)
    tl.store(lse + row * H + i_h + o_t * H, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_t)


@triton.jit(do_not_specialize=[*SIZES, "owned"])
def attend_bwd_kernel(
    token_qkv,  # [M, 3, H, D]
    node_qv,  # [m, rows, 2, H, D]
    out,  # [M, H, D]
    lse,  # [M, H]
    d_out,  # [M, H, D]
    d_token,  # [M, 3, H, D]
    d_node,  # [m, rows, 2, H, D]
    d_shared,  # [G, m, keys - owned, 2, H, D] float32
    spans,
    level_row,
    tile,
    key,
    rows,
    banks,
    keys,
    owned,
    stride_key,
    levels,
    carry_base,
    carry_rows,
    carried_levels,
    H,
    D: tl.constexpr,
    EXPAND: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    LOG_BT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_g, i_h = pid // H, pid % H
    if tl.load(tile + 2 * i_g) < 0:
        return
    i_s, base, n_tokens, offset, row, m_t = _tile(tile + 2 * i_g, spans, BT)
    o_d = tl.arange(0, BD)
    m_td = m_t[:, None] & (o_d < D)[None, :]
    o_t = tl.arange(0, BT)
    base_token, base_out = row * (3 * H * D) + i_h * D, row * (H * D) + i_h * D
    o_token = o_t[:, None] * (3 * H * D) + o_d[None, :]
    o_out = o_t[:, None] * (H * D) + o_d[None, :]
    scale: tl.constexpr = D**-0.5
    b_lse = tl.load(lse + row * H + i_h + o_t * H, mask=m_t, other=0.0) * 1.4426950408889634
    b_do = tl.load(d_out + base_out + o_out, mask=m_td, other=0.0)
    b_mean = tl.sum(b_do.to(tl.float32) * tl.load(out + base_out + o_out, mask=m_td, other=0.0).to(tl.float32), 1)
    b_k = tl.load(token_qkv + base_token + H * D + o_token, mask=m_td, other=0.0)
    b_dk = _bwd_own(
        token_qkv + base_token + o_token, d_token + base_token + o_token,
        b_k, b_do, b_lse, b_mean, m_t, m_td, H, D,
    )  # fmt: skip
    b_k, b_do = b_k.to(DOT), b_do.to(DOT)
    for i_b in range(banks):
        for i_k in range(0, keys, BK):
            o_k = i_k + tl.arange(0, BK)
            b_level, b_slot, b_row, m_k = _keys(
                base, n_tokens, offset, o_k, key, level_row + i_s * levels, stride_key,
                carry_base + i_s * carry_rows, carried_levels, EXPAND,
            )  # fmt: skip
            m_kd = m_k[:, None] & (o_d < D)[None, :]
            o_node = (tl.cast(i_b, tl.int64) * rows + b_row)[:, None] * (2 * H * D) + i_h * D + o_d[None, :]
            b_nq = tl.load(node_qv + o_node, mask=m_kd, other=0.0).to(DOT)
            b_score = tl.dot(b_k, tl.trans(b_nq), input_precision=PRECISION) * (scale * 1.4426950408889634)
            m_see = (b_level[None, :] >= LOG_BT) | ((o_t[:, None] >> b_level[None, :]) == b_slot[None, :])
            m_see = m_see & m_k[None, :] & m_t[:, None]
            b_weight = tl.where(m_see, tl.exp2(b_score - b_lse[:, None]), 0.0)
            b_dnv = tl.dot(tl.trans(b_weight.to(DOT)), b_do, input_precision=PRECISION)
            b_nv = tl.load(node_qv + o_node + H * D, mask=m_kd, other=0.0).to(DOT)
            b_dweight = tl.dot(b_do, tl.trans(b_nv), input_precision=PRECISION)
            b_dscore = (b_weight * (b_dweight - b_mean[:, None]) * scale).to(DOT)
            b_dk += tl.dot(b_dscore, b_nq, input_precision=PRECISION)
            b_dnq = tl.dot(tl.trans(b_dscore), b_k, input_precision=PRECISION)
            m_own = m_kd & (o_k < owned)[:, None]
            tl.store(d_node + o_node, b_dnq.to(d_node.dtype.element_ty), mask=m_own)
            tl.store(d_node + o_node + H * D, b_dnv.to(d_node.dtype.element_ty), mask=m_own)
            # Every shared key of the tile is written, those that do not exist with zeros.
            m_shared = ((o_k >= owned) & (o_k < keys))[:, None] & (o_d < D)[None, :]
            o_shared = ((i_g * banks + i_b) * (keys - owned) + o_k - owned)[:, None] * (2 * H * D)
            o_shared += i_h * D + o_d[None, :]
            tl.store(d_shared + o_shared, b_dnq, mask=m_shared)
            tl.store(d_shared + o_shared + H * D, b_dnv, mask=m_shared)
    tl.store(d_token + base_token + H * D + o_token, b_dk.to(d_token.dtype.element_ty), mask=m_td)


@triton.jit
def _bwd_own(p_token, p_dtoken, b_k, b_do, b_lse, b_mean, m_t, m_td, H, D: tl.constexpr):
    """Gradients of a position's own slot: stores those of its q and v, returns its share of that of k."""
    scale: tl.constexpr = D**-0.5
    b_k, b_do = b_k.to(tl.float32), b_do.to(tl.float32)
    b_q = tl.load(p_token, mask=m_td, other=0.0).to(tl.float32)
    b_score = tl.sum(b_q * b_k, 1) * (scale * 1.4426950408889634)
    b_weight = tl.where(m_t, tl.exp2(b_score - b_lse), 0.0)
    b_v = tl.load(p_token + 2 * H * D, mask=m_td, other=0.0).to(tl.float32)
    b_dscore = b_weight * (tl.sum(b_do * b_v, 1) - b_mean) * scale
    tl.store(p_dtoken, (b_dscore[:, None] * b_k).to(p_dtoken.dtype.element_ty), mask=m_td)
    tl.store(p_dtoken + 2 * H * D, (b_weight[:, None] * b_do).to(p_dtoken.dtype.element_ty), mask=m_td)
    return b_dscore[:, None] * b_q


@triton.jit(do_not_specialize=["rows", "shared_keys", "width"])
def attend_bwd_reduce_kernel(
    d_shared,  # [G, m, shared_keys, width] float32
    d_node,  # [m, rows, width]
    shared,  # [P, 4] row, key, first tile, end of tiles
    rows,
    banks,
    shared_keys,
    width,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    columns = tl.cdiv(width, BC)
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_b, i_p = pid % columns, pid // columns % banks, pid // columns // banks
    row = tl.load(shared + 4 * i_p)
    number = tl.load(shared + 4 * i_p + 1)
    first = tl.load(shared + 4 * i_p + 2)
    end = tl.load(shared + 4 * i_p + 3)
    o_c = i_c * BC + tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float32)
    for i_g in range(first, end, BR):
        o_g = i_g + tl.arange(0, BR)
        p_part = d_shared + ((o_g * banks + i_b) * shared_keys + number)[:, None] * width + o_c[None, :]
        b_part = tl.load(p_part, mask=(o_g < end)[:, None] & (o_c < width)[None, :], other=0.0)
        b_sum += tl.sum(b_part, 0)
    p_node = d_node + (i_b * rows + row) * width + o_c
    tl.store(p_node, b_sum.to(d_node.dtype.element_ty), mask=o_c < width)
