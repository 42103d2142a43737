#include "matvec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace lmn {
namespace {

// Columns of a product that are summed up before the next ones are: their sums stay in the first cache.
constexpr int64_t kColumns = 512;
// Stored rows of a matrix that all rows of x pass before the next ones: they stay in the second cache.
constexpr int64_t kTileRows = 64;

LMN_INLINE const void* at(const Operand& w, int64_t element) {
  return static_cast<const char*>(w.weight) + element * (w.type == Type::f32 ? 4 : 2);
}

// y[r, 0 ... count) += x[r] * w[0 ... count) for STEPS consecutive stored rows of w.
template <int ROWS, int STEPS>
LMN_INLINE void add_rows(const float* w, int64_t stride, int64_t count, const float* x, int64_t ldx, float* y,
                         int64_t ldy) {
  F8 factor[ROWS][STEPS];
  LMN_UNROLL for (int r = 0; r < ROWS; ++r)
    LMN_UNROLL for (int i = 0; i < STEPS; ++i) factor[r][i] = splat(x[r * ldx + i]);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    F8 weight[STEPS];
    LMN_UNROLL for (int i = 0; i < STEPS; ++i) weight[i] = load8<F8>(w + i * stride + j);
    LMN_UNROLL for (int r = 0; r < ROWS; ++r) {
      F8 sum = load8<F8>(y + r * ldy + j);
      LMN_UNROLL for (int i = 0; i < STEPS; ++i) sum += factor[r][i] * weight[i];
      store8(y + r * ldy + j, sum);
    }
  }
  for (; j < count; ++j)
    LMN_UNROLL for (int r = 0; r < ROWS; ++r)
      LMN_UNROLL for (int i = 0; i < STEPS; ++i) y[r * ldy + j] += x[r * ldx + i] * w[i * stride + j];
}

template <int ROWS>
LMN_INLINE void in_major_f32(const Operand& w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx,
                             float* y, int64_t ldy) {
  constexpr int STEPS = 8 / ROWS;
  const float* weight = static_cast<const float*>(w.weight);
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t count = std::min(kColumns, end - c);
    int64_t i = 0;
    for (; i + STEPS <= k; i += STEPS)
      add_rows<ROWS, STEPS>(weight + i * w.stride + c, w.stride, count, x + i, ldx, y + c, ldy);
    for (; i < k; ++i) add_rows<ROWS, 1>(weight + i * w.stride + c, w.stride, count, x + i, ldx, y + c, ldy);
  }
}

// As add_rows, on sums that are split into those of even and of odd columns; whole groups of kLanes pairs.
template <int ROWS, int STEPS>
LMN_INLINE void add_rows_bf16(const uint16_t* w, int64_t stride, int64_t pairs, const float* x, int64_t ldx,
                              float (*evens)[kColumns / 2], float (*odds)[kColumns / 2]) {
  F8 factor[ROWS][STEPS];
  LMN_UNROLL for (int r = 0; r < ROWS; ++r)
    LMN_UNROLL for (int i = 0; i < STEPS; ++i) factor[r][i] = splat(x[r * ldx + i]);
  for (int64_t j = 0; j < pairs; j += kLanes) {
    F8 low[STEPS], high[STEPS];
    LMN_UNROLL for (int i = 0; i < STEPS; ++i) {
      const U8 words = load8<U8>(w + i * stride + 2 * j);
      low[i] = even(words);
      high[i] = odd(words);
    }
    LMN_UNROLL for (int r = 0; r < ROWS; ++r) {
      F8 sums = load8<F8>(evens[r] + j), others = load8<F8>(odds[r] + j);
      LMN_UNROLL for (int i = 0; i < STEPS; ++i) {
        sums += factor[r][i] * low[i];
        others += factor[r][i] * high[i];
      }
      store8(evens[r] + j, sums);
      store8(odds[r] + j, others);
    }
  }
}

template <int ROWS>
LMN_INLINE void in_major_bf16(const Operand& w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx,
                              float* y, int64_t ldy) {
  constexpr int STEPS = ROWS == 4 ? 2 : 4;
  const uint16_t* weight = static_cast<const uint16_t*>(w.weight);
  float evens[ROWS][kColumns / 2], odds[ROWS][kColumns / 2];
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t count = std::min(kColumns, end - c), pairs = count / (2 * kLanes) * kLanes;
    LMN_UNROLL for (int r = 0; r < ROWS; ++r)
      for (int64_t j = 0; j < pairs; ++j) {
        evens[r][j] = y[r * ldy + c + 2 * j];
        odds[r][j] = y[r * ldy + c + 2 * j + 1];
      }
    int64_t i = 0;
    for (; i + STEPS <= k; i += STEPS)
      add_rows_bf16<ROWS, STEPS>(weight + i * w.stride + c, w.stride, pairs, x + i, ldx, evens, odds);
    for (; i < k; ++i)
      add_rows_bf16<ROWS, 1>(weight + i * w.stride + c, w.stride, pairs, x + i, ldx, evens, odds);
    LMN_UNROLL for (int r = 0; r < ROWS; ++r) {
      for (int64_t j = 0; j < pairs; ++j) {
        y[r * ldy + c + 2 * j] = evens[r][j];
        y[r * ldy + c + 2 * j + 1] = odds[r][j];
      }
      for (int64_t n = c + 2 * pairs; n < c + count; ++n)
        for (int64_t s = 0; s < k; ++s) y[r * ldy + n] += x[r * ldx + s] * widen(weight[s * w.stride + n]);
    }
  }
}

// The totals of COUNT accumulators, eight at a time where there are as many.
template <int COUNT>
LMN_INLINE void sum_lanes(const F8* lanes, float* sums) {
  if constexpr (COUNT == 8) {
    store8(sums, totals(lanes));
  } else {
    LMN_UNROLL for (int i = 0; i < COUNT; ++i) sums[i] = total(lanes[i]);
  }
}

// OUTS stored rows of w against ROWS rows of x.
template <int ROWS, int OUTS>
LMN_INLINE void dots_f32(const float* w, int64_t stride, int64_t k, const float* x, int64_t ldx, float* y,
                         int64_t ldy) {
  F8 lanes[ROWS * OUTS];
  LMN_UNROLL for (int c = 0; c < ROWS * OUTS; ++c) lanes[c] = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    F8 weight[OUTS];
    LMN_UNROLL for (int o = 0; o < OUTS; ++o) weight[o] = load8<F8>(w + o * stride + i);
    LMN_UNROLL for (int r = 0; r < ROWS; ++r) {
      const F8 input = load8<F8>(x + r * ldx + i);
      LMN_UNROLL for (int o = 0; o < OUTS; ++o) lanes[r * OUTS + o] += input * weight[o];
    }
  }
  float sums[ROWS * OUTS];
  sum_lanes<ROWS * OUTS>(lanes, sums);
  LMN_UNROLL for (int r = 0; r < ROWS; ++r)
    LMN_UNROLL for (int o = 0; o < OUTS; ++o) {
      float sum = sums[r * OUTS + o];
      for (int64_t s = i; s < k; ++s) sum += x[r * ldx + s] * w[o * stride + s];
      y[r * ldy + o] += sum;
    }
}

template <int ROWS>
LMN_INLINE void out_major_f32(const Operand& w, int64_t k, int64_t begin, int64_t end, const float* x, int64_t ldx,
                              float* y, int64_t ldy) {
  constexpr int OUTS = 8 / ROWS;  // as many sums under way as a multiplier's latency wants
  const float* weight = static_cast<const float*>(w.weight);
  int64_t n = begin;
  for (; n + OUTS <= end; n += OUTS) dots_f32<ROWS, OUTS>(weight + n * w.stride, w.stride, k, x, ldx, y + n, ldy);
  for (; n < end; ++n) dots_f32<ROWS, 1>(weight + n * w.stride, w.stride, k, x, ldx, y + n, ldy);
}

// As dots_f32, on rows of x that are split into their even and odd elements.
template <int ROWS, int OUTS>
LMN_INLINE void dots_bf16(const uint16_t* w, int64_t stride, int64_t k, const float* evens, const float* odds,
                          int64_t lds, float* y, int64_t ldy) {
  F8 low[ROWS * OUTS], high[ROWS * OUTS];
  LMN_UNROLL for (int c = 0; c < ROWS * OUTS; ++c) low[c] = high[c] = splat(0.0f);
  const int64_t pairs = k / 2;
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes)
    LMN_UNROLL for (int o = 0; o < OUTS; ++o) {
      const U8 words = load8<U8>(w + o * stride + 2 * i);
      LMN_UNROLL for (int r = 0; r < ROWS; ++r) {
        low[r * OUTS + o] += load8<F8>(evens + r * lds + i) * even(words);
        high[r * OUTS + o] += load8<F8>(odds + r * lds + i) * odd(words);
      }
    }
  float sums[ROWS * OUTS];
  LMN_UNROLL for (int c = 0; c < ROWS * OUTS; ++c) low[c] += high[c];
  sum_lanes<ROWS * OUTS>(low, sums);
  LMN_UNROLL for (int r = 0; r < ROWS; ++r)
    LMN_UNROLL for (int o = 0; o < OUTS; ++o) {
      float sum = sums[r * OUTS + o];
      for (int64_t s = 2 * i; s < k; ++s) {
        // In two statements: gcc 12 loses the index of (a ? b : c)[index] under -fsanitize=undefined.
        const float* half = s % 2 ? odds : evens;
        sum += half[r * lds + s / 2] * widen(w[o * stride + s]);
      }
      y[r * ldy + o] += sum;
    }
}

template <int ROWS>
LMN_INLINE void out_major_bf16(const Operand& w, int64_t k, int64_t begin, int64_t end, const float* evens,
                               const float* odds, int64_t lds, float* y, int64_t ldy) {
  constexpr int OUTS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  const uint16_t* weight = static_cast<const uint16_t*>(w.weight);
  int64_t n = begin;
  for (; n + OUTS <= end; n += OUTS)
    dots_bf16<ROWS, OUTS>(weight + n * w.stride, w.stride, k, evens, odds, lds, y + n, ldy);
  for (; n < end; ++n) dots_bf16<ROWS, 1>(weight + n * w.stride, w.stride, k, evens, odds, lds, y + n, ldy);
}

// exp of values of at most 0, with an error of 1e-7: degree 6 on [-ln 2 / 2, ln 2 / 2]. What lies below -87 counts
// as -87, 2e-38; NaN stays NaN.
LMN_INLINE F8 exp_of_negative(F8 value) {
  const F8 round = splat(12582912.0f);  // 1.5 * 2^23: behind the sum, the low bits are the nearest integer
  const F8 clamped = larger(value, splat(-87.0f));
  const F8 shifted = clamped * splat(1.44269504f) + round;
  const F8 whole = shifted - round;
  const F8 rest = (clamped - whole * splat(0.693359375f)) + whole * splat(2.12194440e-4f);
  F8 sum = splat(1.9875692e-4f);
  sum = sum * rest + splat(1.3981999e-3f);
  sum = sum * rest + splat(8.3334519e-3f);
  sum = sum * rest + splat(4.1665796e-2f);
  sum = sum * rest + splat(1.6666666e-1f);
  sum = sum * rest + splat(5.0e-1f);
  sum = sum * rest * rest + rest + splat(1.0f);
  return sum * as_floats((as_words(shifted) << 23) + 0x3f800000u);
}

LMN_INLINE float dot(const float* a, const float* b, int64_t count) {
  F8 lanes = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes += load8<F8>(a + i) * load8<F8>(b + i);
  float sum = total(lanes);
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

LMN_CLONES void add_in_major(const Operand& w, int64_t k, int64_t begin, int64_t end, int64_t rows, const float* x,
                             int64_t ldx, float* y, int64_t ldy) {
  const bool wide = w.type == Type::f32;
  const int64_t step = rows > 4 ? kTileRows : k;
  for (int64_t from = 0; from < k; from += step) {
    const int64_t depth = std::min(step, k - from);
    const Operand part{at(w, from * w.stride), w.type, w.stride};
    for (int64_t row = 0, taken; row < rows; row += taken) {
      const float* input = x + row * ldx + from;
      float* sums = y + row * ldy;
      taken = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
      if (taken == 4) {
        wide ? in_major_f32<4>(part, depth, begin, end, input, ldx, sums, ldy)
             : in_major_bf16<4>(part, depth, begin, end, input, ldx, sums, ldy);
      } else if (taken == 2) {
        wide ? in_major_f32<2>(part, depth, begin, end, input, ldx, sums, ldy)
             : in_major_bf16<2>(part, depth, begin, end, input, ldx, sums, ldy);
      } else {
        wide ? in_major_f32<1>(part, depth, begin, end, input, ldx, sums, ldy)
             : in_major_bf16<1>(part, depth, begin, end, input, ldx, sums, ldy);
      }
    }
  }
}

LMN_CLONES void add_out_major(const Operand& w, int64_t k, int64_t begin, int64_t end, int64_t rows, const float* x,
                              int64_t ldx, float* y, int64_t ldy) {
  // Inputs in pieces of even length that fit the first cache.
  constexpr int64_t kPiece = 2048, lds = kPiece / 2;
  float evens[4][lds], odds[4][lds];
  const int64_t step = rows > 4 ? kTileRows : end - begin;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t until = std::min(end, n + step);
    for (int64_t row = 0, taken; row < rows; row += taken) {
      taken = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
      float* sums = y + row * ldy;
      for (int64_t from = 0; from < k; from += kPiece) {
        const int64_t count = std::min(kPiece, k - from);
        const float* input = x + row * ldx + from;
        const Operand part{at(w, from), w.type, w.stride};
        if (w.type == Type::f32) {
          taken == 4   ? out_major_f32<4>(part, count, n, until, input, ldx, sums, ldy)
          : taken == 2 ? out_major_f32<2>(part, count, n, until, input, ldx, sums, ldy)
                       : out_major_f32<1>(part, count, n, until, input, ldx, sums, ldy);
          continue;
        }
        for (int64_t r = 0; r < taken; ++r)
          for (int64_t i = 0; i < count; ++i) {
            float* half = i % 2 ? odds[r] : evens[r];
            half[i / 2] = input[r * ldx + i];
          }
        taken == 4   ? out_major_bf16<4>(part, count, n, until, evens[0], odds[0], lds, sums, ldy)
        : taken == 2 ? out_major_bf16<2>(part, count, n, until, evens[0], odds[0], lds, sums, ldy)
                     : out_major_bf16<1>(part, count, n, until, evens[0], odds[0], lds, sums, ldy);
      }
    }
  }
}

LMN_CLONES void add_pair(const Operand& w, int64_t side, int64_t k, int64_t begin, int64_t end, int64_t rows,
                         const float* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * ldx;
      F8 lanes = splat(0.0f);
      float rest = 0.0f;
      int64_t i = 0;
      if (w.type == Type::f32) {
        const float* weight = static_cast<const float*>(w.weight) + n * w.stride + side;
        for (; i + kLanes <= k; i += kLanes) {
          const float* p = weight + 2 * i;
          lanes += load8<F8>(row + i) * F8{p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]};
        }
        for (; i < k; ++i) rest += row[i] * weight[2 * i];
      } else {
        const uint16_t* weight = static_cast<const uint16_t*>(w.weight) + n * w.stride;
        for (; i + kLanes <= k; i += kLanes) {
          const U8 words = load8<U8>(weight + 2 * i);
          lanes += load8<F8>(row + i) * (side ? odd(words) : even(words));
        }
        for (; i < k; ++i) rest += row[i] * widen(weight[2 * i + side]);
      }
      y[r * ldy + n] += total(lanes) + rest;
    }
}

// out[0 ... CHUNKS * kLanes) = factor * sum_s weight[s] * v[s][from ...], every fourth slot in a sum of its own.
template <int CHUNKS>
static LMN_INLINE void mix(const float* const* v, int64_t slots, int64_t from, const float* weight, float factor,
                           float* out) {
  F8 sum[4][CHUNKS];
  LMN_UNROLL for (int i = 0; i < 4; ++i)
    LMN_UNROLL for (int c = 0; c < CHUNKS; ++c) sum[i][c] = splat(0.0f);
  int64_t s = 0;
  for (; s + 4 <= slots; s += 4)
    LMN_UNROLL for (int i = 0; i < 4; ++i)
      LMN_UNROLL for (int c = 0; c < CHUNKS; ++c)
        sum[i][c] += splat(weight[s + i]) * load8<F8>(v[s + i] + from + c * kLanes);
  for (; s < slots; ++s)
    LMN_UNROLL for (int c = 0; c < CHUNKS; ++c) sum[0][c] += splat(weight[s]) * load8<F8>(v[s] + from + c * kLanes);
  LMN_UNROLL for (int c = 0; c < CHUNKS; ++c)
    store8(out + c * kLanes, ((sum[0][c] + sum[1][c]) + (sum[2][c] + sum[3][c])) * splat(factor));
}

// dot(q[0 ... 8) + from, k), each as `dot` sums it.
static LMN_INLINE void dot8(const float* const* q, int64_t from, const float* k, int64_t count, float* sums) {
  F8 lanes[8];
  LMN_UNROLL for (int s = 0; s < 8; ++s) lanes[s] = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F8 key = load8<F8>(k + i);
    LMN_UNROLL for (int s = 0; s < 8; ++s) lanes[s] += load8<F8>(q[s] + from + i) * key;
  }
  store8(sums, totals(lanes));
  for (; i < count; ++i)
    for (int s = 0; s < 8; ++s) sums[s] += q[s][from + i] * k[i];
}

LMN_CLONES void attend_head(const float* const* q, const float* const* v, int64_t slots, int64_t from, int64_t size,
                            float scale, const float* k, float* weight, float* out) {
  int64_t s = 0;
  for (; s + 8 <= slots; s += 8) dot8(q + s, from, k, size, weight + s);
  for (; s < slots; ++s) weight[s] = dot(q[s] + from, k, size);
  const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
  for (; s < padded; ++s) weight[s] = weight[0];
  F8 most = load8<F8>(weight);
  for (s = kLanes; s < padded; s += kLanes) most = larger(most, load8<F8>(weight + s));
  float largest = most[0];
  LMN_UNROLL for (int i = 1; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  // What pads the last group counts for nothing.
  static const float kCounts[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0};
  F8 sums = splat(0.0f);
  for (s = 0; s < padded; s += kLanes) {
    const F8 powers = exp_of_negative((load8<F8>(weight + s) - splat(largest)) * splat(scale));
    store8(weight + s, powers);
    sums += powers * load8<F8>(kCounts + std::max<int64_t>(0, s + kLanes - slots));
  }
  const float factor = 1.0f / total(sums);
  int64_t d = 0;
  for (; d + 2 * kLanes <= size; d += 2 * kLanes) mix<2>(v, slots, from + d, weight, factor, out + d);
  for (; d + kLanes <= size; d += kLanes) mix<1>(v, slots, from + d, weight, factor, out + d);
  for (; d < size; ++d) {
    float single = 0.0f;
    for (s = 0; s < slots; ++s) single += weight[s] * v[s][from + d];
    out[d] = single * factor;
  }
}

LMN_CLONES float sum_of_squares(const float* values, int64_t count) { return dot(values, values, count); }

LMN_CLONES void silu(float* values, int64_t count) {
  for (int64_t from = 0; from < count; from += kLanes) {
    const int64_t size = std::min(kLanes, count - from);
    float x[kLanes] = {};
    std::copy(values + from, values + from + size, x);
    F8 negative;
    for (int64_t i = 0; i < kLanes; ++i) negative[i] = x[i] < 0.0f ? x[i] : -x[i];
    const F8 power = exp_of_negative(negative);  // of -|x|
    for (int64_t i = 0; i < size; ++i) {
      const float share = x[i] < -87.0f ? 0.0f : x[i] < 0.0f ? power[i] : 1.0f;
      values[from + i] = x[i] * share / (1.0f + power[i]);
    }
  }
}

LMN_CLONES void load(const void* from, Type type, int64_t offset, int64_t count, float* to) {
  if (type == Type::f32) {
    std::memcpy(to, static_cast<const float*>(from) + offset, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from) + offset;
  for (int64_t i = 0; i < count; ++i) to[i] = widen(half[i]);
}

LMN_CLONES void store(const float* from, int64_t count, Type type, void* to, int64_t offset) {
  if (type == Type::f32) {
    std::memcpy(static_cast<float*>(to) + offset, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to) + offset;
  for (int64_t i = 0; i < count; ++i) half[i] = narrow(from[i]);
}

}  // namespace lmn
