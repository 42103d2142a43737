"""The kernels of look-ahead attention; `look_ahead` launches them and says how they work.

Rows of q come in blocks of BT of one kind: *ahead*, of the memory, or not, of the segment. With t = j - i, what a
table's row is for, a tile of BT queries and BT keys reads a band of 2·BT values of t. Its scores by distance are
made for one half of the band and taken over for the other from the tile before; a rotation of each row, which is a
gather, brings them to their keys.
"""

import triton
import triton.language as tl

SIZES = ["B", "K", "Q", "T", "low", "future_row"]
# Scores in units of log 2, for exp2.
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _block(i_p, K, Q, T, low, future_row, BT: tl.constexpr):
    """Of row block ``i_p``: whether it looks ahead, its first row and the end of its kind, its table, its keys."""
    memory = Q - T
    n_ahead = tl.cdiv(memory, BT)
    ahead = i_p < n_ahead
    i0 = tl.where(ahead, i_p * BT, K - T + (i_p - n_ahead) * BT)
    end = tl.where(ahead, memory, K)
    r0 = tl.where(ahead, future_row, 0)
    j0 = tl.where(ahead, tl.maximum(i0 + 1, low), 0)
    j1 = tl.where(ahead, memory + 1, tl.minimum(i0 + BT, K))
    return ahead, i0, end, r0, j0, j1


@triton.jit
def _load(base, i0, m_i, pitch, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows i0 … i0+BT-1 of one head, ``pitch`` elements apart: offsets inside a tile fit 32 bits."""
    o_i, o_d = tl.arange(0, BT), tl.arange(0, BD)
    p = base + tl.cast(i0, tl.int64) * pitch + (o_i[:, None] * pitch + o_d[None, :])
    return tl.load(p, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _store(base, i0, m_i, pitch, value, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    o_i, o_d = tl.arange(0, BT), tl.arange(0, BD)
    p = base + tl.cast(i0, tl.int64) * pitch + (o_i[:, None] * pitch + o_d[None, :])
    tl.store(p, value.to(base.dtype.element_ty), mask=m_i[:, None] & (o_d < D)[None, :])


@triton.jit
def _vector(base, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    return tl.load(base + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _distances(table, ahead, r0, t0, K, memory, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Table rows of t0 … t0+BT-1, as the kind counts distances; zeros where no pair of the kind is so far apart."""
    sign = tl.where(ahead, 1, -1)
    o_a = sign * (t0 + tl.arange(0, BT))
    m_a = (o_a >= tl.where(ahead, 1, 0)) & (o_a < tl.where(ahead, memory + 1, K))
    p = table + tl.cast(r0 + sign * t0, tl.int64) * (H * D)
    return _load(p, 0, m_a, sign * (H * D), D, BT, BD)


@triton.jit
def _queries(q, bias, i_b, i_h, i0, end, ahead, K, Q, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Of a block of rows: which exist, where each lies in ``[B, Q, H]``, and q + u and q + v of their kind."""
    o_i = i0 + tl.arange(0, BT)
    m_i = o_i < end
    o_row = (i_b * Q + o_i - (K - Q)) * H + i_h
    b_q = _load(q + i_b * Q * H * D + i_h * D, i0 - (K - Q), m_i, H * D, D, BT, BD).to(tl.float32)
    p_bias = bias + tl.where(ahead, 2, 0) * H * D + i_h * D
    return o_i, m_i, o_row, b_q + _vector(p_bias, D, BD), b_q + _vector(p_bias + H * D, D, BD)


@triton.jit
def _to_keys(b_low, b_high, BT: tl.constexpr):
    """From the two halves of a band by t, beginning at t = j0 - i0 - BT + 1, to the tile by key."""
    o_i, o_j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_band = tl.where(o_i + o_j >= BT - 1, b_low, b_high)
    return tl.gather(b_band, (o_j - o_i - 1) & (BT - 1), 1)


@triton.jit
def _to_distances(b_tile, BT: tl.constexpr):
    """The inverse of `_to_keys`: the two halves, with zeros where no key of the tile is."""
    o_i, o_t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_band = tl.gather(b_tile, (o_t + o_i + 1) & (BT - 1), 1)
    m_low = o_i + o_t >= BT - 1
    return tl.where(m_low, b_band, 0.0), tl.where(m_low, 0.0, b_band)


@triton.jit
def _sees(ahead, o_i, o_j, m_i, m_j):
    t = o_j[None, :] - o_i[:, None]
    return tl.where(ahead, t > 0, t <= 0) & m_i[:, None] & m_j[None, :]


@triton.jit(do_not_specialize=SIZES)
def look_ahead_fwd_kernel(
    q,  # [B, Q, H, D]
    kv,  # [B, K, 2, H, D]
    bias,  # [4, H, D]
    table,  # [R, H, D]
    output,  # [B, M, H, D], where IS_SEEDED
    seed,  # [B, M, H] float32
    start,  # [B], where HAS_START
    out,  # [B, Q, H, D]
    lse,  # [B, Q, H] float32
    B,
    K,
    Q,
    T,
    low,
    future_row,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_SEEDED: tl.constexpr,
    HAS_START: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    # The last rows have the most keys: first.
    i_p = tl.num_programs(0) // (B * H) - 1 - pid // (B * H)
    i_b, i_h = pid % (B * H) // H, pid % H
    ahead, i0, end, r0, j0, j1 = _block(i_p, K, Q, T, low, future_row, BT)
    if HAS_START:
        j0 = tl.where(ahead, j0, tl.load(start + i_b))
    o_i, m_i, o_row, b_qu, b_qv = _queries(q, bias, i_b, i_h, i0, end, ahead, K, Q, H, D, BT, BD)
    b_qu, b_qv = b_qu.to(DOT), b_qv.to(DOT)
    base_q = i_b * Q * H * D + i_h * D
    log2_scale: tl.constexpr = D**-0.5 * LOG2_E
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    if IS_SEEDED:
        m_s = m_i & ahead
        p_seed = seed + (i_b * (Q - T) + o_i) * H + i_h
        b_max = tl.load(p_seed, mask=m_s, other=float("-inf")) * LOG2_E
        b_sum = tl.where(m_s, 1.0, 0.0)
        b_out = _load(output + i_b * (Q - T) * H * D + i_h * D, i0, m_s, H * D, D, BT, BD).to(tl.float32)
    p_kv, p_table = kv + i_b * K * 2 * H * D + i_h * D, table + i_h * D
    b_r = _distances(p_table, ahead, r0, j0 - i0 - BT + 1, K, Q - T, H, D, BT, BD).to(DOT)
    b_low = tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
    for j in range(j0, j1, BT):
        o_j = j + tl.arange(0, BT)
        m_j = o_j < j1
        b_k = _load(p_kv, j, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_r = _distances(p_table, ahead, r0, j - i0 + 1, K, Q - T, H, D, BT, BD).to(DOT)
        b_high = tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
        b_score = tl.dot(b_qu, tl.trans(b_k), input_precision=PRECISION) + _to_keys(b_low, b_high, BT)
        b_low = b_high
        b_score = tl.where(_sees(ahead, o_i, o_j, m_i, m_j), b_score * log2_scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        # Of rows that are none nothing is kept; a NaN of theirs would slow the others.
        b_new = tl.where(m_i, b_new, 0.0)
        b_decay = tl.exp2(b_max - b_new)
        b_weight = tl.exp2(b_score - b_new[:, None])
        b_v = _load(p_kv + H * D, j, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_out = b_out * b_decay[:, None] + tl.dot(b_weight.to(DOT), b_v, input_precision=PRECISION)
        b_max = b_new
    _store(out + base_q, i0 - (K - Q), m_i, H * D, b_out / b_sum[:, None], D, BT, BD)
    tl.store(lse + o_row, (b_max + tl.log2(b_sum)) * LN_2, mask=m_i)


@triton.jit(do_not_specialize=SIZES)
def look_ahead_bwd_kernel_dq(
    q,  # [B, Q, H, D]
    kv,  # [B, K, 2, H, D]
    bias,  # [4, H, D]
    table,  # [R, H, D]
    start,  # [B], where HAS_START
    out,  # [B, Q, H, D]
    lse,  # [B, Q, H] float32
    d_out,  # [B, Q, H, D]
    d_lse,  # [B, Q, H] float32
    mean,  # [B, Q, H] float32: <d_out, out> - d_lse, for the other kernels
    dq,  # [B, Q, H, D]
    d_bias,  # [blocks, B, 2, H, D] float32
    B,
    K,
    Q,
    T,
    low,
    future_row,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_START: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_p = tl.num_programs(0) // (B * H) - 1 - pid // (B * H)
    i_b, i_h = pid % (B * H) // H, pid % H
    ahead, i0, end, r0, j0, j1 = _block(i_p, K, Q, T, low, future_row, BT)
    if HAS_START:
        j0 = tl.where(ahead, j0, tl.load(start + i_b))
    o_i, m_i, o_row, b_qu, b_qv = _queries(q, bias, i_b, i_h, i0, end, ahead, K, Q, H, D, BT, BD)
    b_qu, b_qv = b_qu.to(DOT), b_qv.to(DOT)
    base_q = i_b * Q * H * D + i_h * D
    b_do = _load(d_out + base_q, i0 - (K - Q), m_i, H * D, D, BT, BD)
    b_out = _load(out + base_q, i0 - (K - Q), m_i, H * D, D, BT, BD).to(tl.float32)
    # The choice keeps products out of the sum's first addition, which lanes that store one mean would round apart.
    b_mean = tl.sum(tl.where(m_i[:, None], b_do.to(tl.float32) * b_out, 0.0), 1)
    b_mean -= tl.load(d_lse + o_row, mask=m_i, other=0.0)
    tl.store(mean + o_row, b_mean, mask=m_i)
    b_lse = tl.load(lse + o_row, mask=m_i, other=0.0) * LOG2_E
    b_do = b_do.to(DOT)
    scale: tl.constexpr = D**-0.5
    p_kv, p_table = kv + i_b * K * 2 * H * D + i_h * D, table + i_h * D
    b_r = _distances(p_table, ahead, r0, j0 - i0 - BT + 1, K, Q - T, H, D, BT, BD).to(DOT)
    b_low = tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
    b_dqu, b_dqv = tl.zeros([BT, BD], tl.float32), tl.zeros([BT, BD], tl.float32)
    # What the tile before left for the half of the band that it shares with this one.
    b_left = tl.zeros([BT, BT], tl.float32)
    for j in range(j0, j1, BT):
        o_j = j + tl.arange(0, BT)
        m_j = o_j < j1
        b_k = _load(p_kv, j, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_next = _distances(p_table, ahead, r0, j - i0 + 1, K, Q - T, H, D, BT, BD).to(DOT)
        b_high = tl.dot(b_qv, tl.trans(b_next), input_precision=PRECISION)
        b_score = tl.dot(b_qu, tl.trans(b_k), input_precision=PRECISION) + _to_keys(b_low, b_high, BT)
        b_low = b_high
        b_weight = tl.exp2(b_score * (scale * LOG2_E) - b_lse[:, None])
        b_v = _load(p_kv + H * D, j, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_dweight = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        # Both factors behind the mask: what nothing sees may be of any value. Times the scale at the end, once.
        m_see = _sees(ahead, o_i, o_j, m_i, m_j)
        b_dscore = tl.where(m_see, b_weight * (b_dweight - b_mean[:, None]), 0.0)
        b_dqu += tl.dot(b_dscore.to(DOT), b_k, input_precision=PRECISION)
        b_dlow, b_dhigh = _to_distances(b_dscore, BT)
        b_dqv += tl.dot((b_left + b_dlow).to(DOT), b_r, input_precision=PRECISION)
        b_left, b_r = b_dhigh, b_next
    b_dqv += tl.dot(b_left.to(DOT), b_r, input_precision=PRECISION)
    _store(dq + base_q, i0 - (K - Q), m_i, H * D, (b_dqu + b_dqv) * scale, D, BT, BD)
    o_d = tl.arange(0, BD)
    p_dbias = d_bias + ((i_p * B + i_b) * 2 * H + i_h) * D + o_d
    # Scaled behind the sum, for the same reason as the mean.
    tl.store(p_dbias, tl.sum(b_dqu, 0) * scale, mask=o_d < D)
    tl.store(p_dbias + H * D, tl.sum(b_dqv, 0) * scale, mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def look_ahead_bwd_kernel_dkv(
    q,  # [B, Q, H, D]
    kv,  # [B, K, 2, H, D]
    bias,  # [4, H, D]
    table,  # [R, H, D]
    start,  # [B], where HAS_START
    lse,  # [B, Q, H] float32
    d_out,  # [B, Q, H, D]
    mean,  # [B, Q, H] float32
    dkv,  # [B, K, 2, H, D]
    B,
    K,
    Q,
    T,
    low,
    future_row,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_START: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_b, i_h = pid % (B * H) // H, pid % H
    j0 = pid // (B * H) * BT
    o_j = j0 + tl.arange(0, BT)
    memory, before = Q - T, K - T
    m_j = o_j < K
    m_past, m_ahead = m_j, (o_j >= low) & (o_j <= memory)
    if HAS_START:
        m_past = m_j & (o_j >= tl.load(start + i_b))
    p_kv, p_table = kv + i_b * K * 2 * H * D + i_h * D, table + i_h * D
    b_k = _load(p_kv, j0, m_j, 2 * H * D, D, BT, BD).to(DOT)
    b_v = _load(p_kv + H * D, j0, m_j, 2 * H * D, D, BT, BD).to(DOT)
    b_dk, b_dv = tl.zeros([BT, BD], tl.float32), tl.zeros([BT, BD], tl.float32)
    scale: tl.constexpr = D**-0.5
    # Blocks of the memory's rows that may see one of the keys, then those of the segment's.
    in_reach = (j0 <= memory) & (j0 + BT > low)
    n_ahead = tl.where(in_reach, tl.cdiv(tl.minimum(memory, j0 + BT - 1), BT), 0)
    skipped = tl.maximum(j0 - before, 0) // BT
    n_past = tl.cdiv(T, BT) - skipped
    for n in range(n_ahead + n_past):
        i_p = tl.where(n < n_ahead, n, n - n_ahead + tl.cdiv(memory, BT) + skipped)
        ahead, i0, end, r0, _, _ = _block(i_p, K, Q, T, low, future_row, BT)
        o_i, m_i, o_row, b_qu, b_qv = _queries(q, bias, i_b, i_h, i0, end, ahead, K, Q, H, D, BT, BD)
        b_qu, b_qv = b_qu.to(DOT), b_qv.to(DOT)
        base_q = i_b * Q * H * D + i_h * D
        b_r = _distances(p_table, ahead, r0, j0 - i0 - BT + 1, K, Q - T, H, D, BT, BD).to(DOT)
        b_low = tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
        b_r = _distances(p_table, ahead, r0, j0 - i0 + 1, K, Q - T, H, D, BT, BD).to(DOT)
        b_high = tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
        b_score = tl.dot(b_qu, tl.trans(b_k), input_precision=PRECISION) + _to_keys(b_low, b_high, BT)
        b_lse = tl.load(lse + o_row, mask=m_i, other=0.0) * LOG2_E
        b_weight = tl.exp2(b_score * (scale * LOG2_E) - b_lse[:, None])
        m_see = _sees(ahead, o_i, o_j, m_i, tl.where(ahead, m_ahead, m_past))
        b_weight = tl.where(m_see, b_weight, 0.0)
        b_do = _load(d_out + base_q, i0 - (K - Q), m_i, H * D, D, BT, BD).to(DOT)
        b_dv += tl.dot(tl.trans(b_weight.to(DOT)), b_do, input_precision=PRECISION)
        b_mean = tl.load(mean + o_row, mask=m_i, other=0.0)
        b_dweight = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_dscore = tl.where(m_see, b_weight * (b_dweight - b_mean[:, None]), 0.0)
        b_dk += tl.dot(tl.trans(b_dscore.to(DOT)), b_qu, input_precision=PRECISION)
    p_dkv = dkv + i_b * K * 2 * H * D + i_h * D
    _store(p_dkv, j0, m_j, 2 * H * D, b_dk * scale, D, BT, BD)
    _store(p_dkv + H * D, j0, m_j, 2 * H * D, b_dv, D, BT, BD)


@triton.jit(do_not_specialize=[*SIZES, "R", "splits"])
def look_ahead_bwd_kernel_dtable(
    q,  # [B, Q, H, D]
    kv,  # [B, K, 2, H, D]
    bias,  # [4, H, D]
    table,  # [R, H, D]
    start,  # [B], where HAS_START
    lse,  # [B, Q, H] float32
    d_out,  # [B, Q, H, D]
    mean,  # [B, Q, H] float32
    d_table,  # [splits, R, H, D] float32
    B,
    K,
    Q,
    T,
    low,
    future_row,
    R,
    splits,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_START: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_s, i_h, i_a = pid % splits, pid // splits % H, pid // (splits * H)
    memory, before = Q - T, K - T
    # Blocks of the distances behind come first; those ahead are the same rows, or follow.
    n_behind = tl.cdiv(K, BT)
    own = i_a >= n_behind
    r0 = tl.where(own, future_row, 0)
    a0 = tl.where(own, i_a - n_behind, i_a) * BT
    o_x = tl.arange(0, BT)
    o_a = a0 + o_x
    m_a = o_a <= tl.where(own, memory, K - 1)
    b_r = _load(table + i_h * D, r0 + a0, m_a, H * D, D, BT, BD).to(DOT)
    b_dr = tl.zeros([BT, BD], tl.float32)
    scale: tl.constexpr = D**-0.5
    # Rows that see a key at one of the distances: of the memory from low - a0 - BT + 1 to memory - a0.
    first = tl.maximum(low - a0 - BT + 1, 0) // BT
    n_ahead = tl.minimum(tl.cdiv(tl.maximum(memory - a0 + 1, 0), BT), tl.cdiv(memory, BT)) - first
    n_ahead = tl.where(own | (future_row == 0), tl.maximum(n_ahead, 0), 0)
    skipped = tl.maximum(a0 - before, 0) // BT
    n_rows = n_ahead + tl.where(own, 0, tl.cdiv(T, BT) - skipped)
    # One loop over the streams of this split and, for each, the blocks of rows.
    for n in range(n_rows * tl.cdiv(B - i_s, splits)):
        i_b, i_n = i_s + n // n_rows * splits, n % n_rows
        i_p = tl.where(i_n < n_ahead, first + i_n, i_n - n_ahead + tl.cdiv(memory, BT) + skipped)
        ahead, i0, end, _, _, _ = _block(i_p, K, Q, T, low, future_row, BT)
        o_i, m_i, o_row, b_qu, b_qv = _queries(q, bias, i_b, i_h, i0, end, ahead, K, Q, H, D, BT, BD)
        b_qu, b_qv = b_qu.to(DOT), b_qv.to(DOT)
        base_q = i_b * Q * H * D + i_h * D
        # The pair at distance a has key j0 + y, where y = i ± a is one of two tiles' and below i in the second.
        j0 = tl.where(ahead, i0 + a0, i0 - a0 - BT + 1)
        p_kv = kv + i_b * K * 2 * H * D + i_h * D
        o_j = j0 + o_x
        m_j, m_j2 = (o_j >= 0) & (o_j < K), (o_j >= -BT) & (o_j < K - BT)
        m_first = o_x[None, :] >= o_x[:, None]
        turn = tl.where(ahead, o_x[:, None] + o_x[None, :], o_x[:, None] - o_x[None, :] - 1) & (BT - 1)
        b_do = _load(d_out + base_q, i0 - (K - Q), m_i, H * D, D, BT, BD).to(DOT)
        b_k = _load(p_kv, j0, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_low = tl.dot(b_qu, tl.trans(b_k), input_precision=PRECISION)
        b_k = _load(p_kv, j0 + BT, m_j2, 2 * H * D, D, BT, BD).to(DOT)
        b_high = tl.dot(b_qu, tl.trans(b_k), input_precision=PRECISION)
        b_score = tl.gather(tl.where(m_first, b_low, b_high), turn, 1)
        b_score += tl.dot(b_qv, tl.trans(b_r), input_precision=PRECISION)
        b_v = _load(p_kv + H * D, j0, m_j, 2 * H * D, D, BT, BD).to(DOT)
        b_low = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_v = _load(p_kv + H * D, j0 + BT, m_j2, 2 * H * D, D, BT, BD).to(DOT)
        b_high = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_dweight = tl.gather(tl.where(m_first, b_low, b_high), turn, 1)
        b_lse = tl.load(lse + o_row, mask=m_i, other=0.0) * LOG2_E
        b_mean = tl.load(mean + o_row, mask=m_i, other=0.0)
        key = o_i[:, None] + tl.where(ahead, o_a, -o_a)[None, :]
        least = tl.load(start + i_b) if HAS_START else 0
        m_see = tl.where(ahead, (key >= low) & (key <= memory) & (o_a > 0)[None, :], key >= least)
        b_weight = tl.exp2(b_score * (scale * LOG2_E) - b_lse[:, None])
        m_see = m_see & m_i[:, None] & m_a[None, :]
        b_dscore = tl.where(m_see, b_weight * (b_dweight - b_mean[:, None]), 0.0)
        b_dr += tl.dot(tl.trans(b_dscore.to(DOT)), b_qv, input_precision=PRECISION)
    _store(d_table + i_s * R * H * D + i_h * D, r0 + a0, m_a, H * D, b_dr * scale, D, BT, BD)
