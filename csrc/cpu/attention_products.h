// What attention is made of for one instruction set, in the namespace that LMN_SET names: lanes, exponentials, and the
// products of a chunk's positions with the nodes of its slots; attention_kernels.h puts them together. Of a library only
// what is inline at any level of optimization may be used: a weak function that the linker keeps would be one of this
// instruction set for all.
//
// Positions are lanes where what is summed are features (scores, and the gradients of weights), and features are lanes
// where what is summed are slots or positions (outputs, and the gradients of nodes). Position p of a chunk stands in
// vector p % 4, lane p / 4: so the lanes of all four read the same nodes of levels 2 and up, and the vectors with p % 4
// below 2, or not, the same of level 1.
#include "attention.h"
#include "simd.h"

namespace lmn::LMN_SET {
namespace {

constexpr int64_t kWide = 16, kVectors = kChunk / kWide;
// From this level on a chunk reads one node of each; up to one more no other chunk reads it.
constexpr int64_t kOneNode = 6;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

LMN_INLINE int64_t lane(int64_t position) { return (position % kVectors) * kWide + position / kVectors; }

template <class V>
constexpr int64_t width() {
  return static_cast<int64_t>(sizeof(V) / sizeof(float));
}
template <class V>
LMN_INLINE V fill(float value) {
  if constexpr (sizeof(V) == sizeof(F16)) {
    return splat16(value);
  } else {
    return splat(value);
  }
}
template <class V>
LMN_INLINE V read(const float* from) {
  return load8<V>(from);
}
template <class V>
LMN_INLINE void write(float* to, const V& value) {
  std::memcpy(to, &value, sizeof(value));
}

// 2 to the power of values that are at most a little over 0, with an error of 2e-7. What lies below -126 counts as
// -126, 1e-38; NaN stays NaN.
LMN_INLINE F16 exp2_of(const F16& value) {
  const F16 round = splat16(12582912.0f);  // 1.5 * 2^23: behind the sum, the low bits are the nearest integer
  const F16 clamped = larger(value, splat16(-126.0f));
  const F16 shifted = clamped + round;
  const F16 rest = clamped - (shifted - round);
  F16 sum = splat16(1.535336188e-4f);
  sum = sum * rest + splat16(1.339887441e-3f);
  sum = sum * rest + splat16(9.618437357e-3f);
  sum = sum * rest + splat16(5.550332471e-2f);
  sum = sum * rest + splat16(2.402264791e-1f);
  sum = sum * rest + splat16(6.931472028e-1f);
  sum = sum * rest + splat16(1.0f);
  return sum * as_floats((as_words(shifted) << 23) + 0x3f800000u);
}

// The natural logarithm of values of at least 1, with an error of 1e-7; NaN stays NaN.
LMN_INLINE F16 log_of(const F16& value) {
  // value = mantissa * 2^exponent with a mantissa from sqrt(1/2) to sqrt(2).
  const U16 bits = as_words(value) - 0x3f3504f3u;
  const U16 exponent = bits >> 23;
  const F16 round = splat16(12582912.0f);
  const F16 power = as_floats(exponent + 0x4b400000u) - round;
  const F16 x = as_floats((bits & 0x007fffffu) + 0x3f3504f3u) - splat16(1.0f);
  const F16 square = x * x;
  F16 sum = splat16(7.0376836292e-2f);
  sum = sum * x - splat16(1.1514610310e-1f);
  sum = sum * x + splat16(1.1676998740e-1f);
  sum = sum * x - splat16(1.2420140846e-1f);
  sum = sum * x + splat16(1.4249322787e-1f);
  sum = sum * x - splat16(1.6668057665e-1f);
  sum = sum * x + splat16(2.0000714765e-1f);
  sum = sum * x - splat16(2.4999993993e-1f);
  sum = sum * x + splat16(3.3333331174e-1f);
  sum = sum * x * square - splat16(0.5f) * square - splat16(2.12194440e-4f) * power;
  // A NaN is no number of such bits.
  return x + sum + splat16(0.693359375f) * power + (value - value);
}

// One entry of a node's stack, of one bank; every position sees one of its nodes.
struct Slot {
  int64_t level, bank, entry;
  int64_t nodes;       // where its nodes begin in lists of them
  int64_t transposed;  // where its operand with positions in lanes begins, per feature
  int64_t stride;      // of that operand from one feature to the next; 0 where one number serves all lanes
};

LMN_INLINE int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
LMN_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
LMN_INLINE void set(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}
LMN_INLINE int64_t groups(int64_t level) { return level < kOneNode ? kChunk >> level : 1; }
LMN_INLINE int64_t stride_of(int64_t level) { return level == 1 ? 2 * kWide : level < kOneNode ? kWide : 0; }

// The slots of a chunk.
struct Slots {
  const Slot* slot;
  int64_t count;
};

// Four rows of positions at each of 64 places; those without a token are zero.
struct TokenRows {
  const float* row[kChunk];
};

// Rows of eight positions or nodes at `rows[0 ... 8)` to columns of `to`, [size, stride].
LMN_INLINE void transpose_rows(const float* const* rows, int64_t size, float factor, float* to, int64_t stride) {
  for (int64_t f = 0; f < size; f += 8) {
    F8 in[8], out[8];
    LMN_UNROLL for (int i = 0; i < 8; ++i) in[i] = load8<F8>(rows[i] + f);
    transpose8(in, out);
    LMN_UNROLL for (int i = 0; i < 8; ++i) store8(to + (f + i) * stride, out[i] * splat(factor));
  }
}

LMN_INLINE void transpose_tokens(const TokenRows& tokens, int64_t size, float factor, float* to) {
  for (int64_t vector = 0; vector < kVectors; ++vector)
    for (int64_t half = 0; half < kWide; half += 8) {
      const float* rows[8];
      for (int64_t j = 0; j < 8; ++j) rows[j] = tokens.row[(half + j) * kVectors + vector];
      transpose_rows(rows, size, factor, to + vector * kWide + half, kChunk);
    }
}

LMN_INLINE void transpose_nodes(const Slot& slot, const float* const* nodes, int64_t size, float* to) {
  for (int64_t from = 0; from < slot.stride; from += 8) {
    const float* rows[8];
    for (int64_t j = 0; j < 8; ++j) {
      const int64_t l = (from + j) % kWide;
      rows[j] = nodes[slot.level == 1 ? 2 * l + from / kWide : l >> (slot.level - 2)];
    }
    transpose_rows(rows, size, 1.0f, to + from, slot.stride);
  }
}

// What COUNT slots give for two vectors of positions: sum over features of key * operand.
template <int COUNT, bool SHARED>
LMN_INLINE void dot_slots(const float* key, int64_t size, const float* const* operands, const int64_t* strides,
                          float* const* to) {
  F16 sum[COUNT][2];
  LMN_UNROLL for (int s = 0; s < COUNT; ++s) sum[s][0] = sum[s][1] = splat16(0.0f);
  for (int64_t f = 0; f < size; ++f) {
    const F16 first = read<F16>(key + f * kChunk), second = read<F16>(key + f * kChunk + kWide);
    LMN_UNROLL for (int s = 0; s < COUNT; ++s) {
      const F16 operand = SHARED ? splat16(operands[s][f]) : read<F16>(operands[s] + f * strides[s]);
      sum[s][0] += first * operand;
      sum[s][1] += second * operand;
    }
  }
  LMN_UNROLL for (int s = 0; s < COUNT; ++s) {
    write(to[s], sum[s][0]);
    write(to[s] + kWide, sum[s][1]);
  }
}

// The same of every slot, into `to` [slots, 64], for the two vectors from `vector` on.
LMN_INLINE void dots(const float* key, const float* own, const float* transposed, Slots slots,
                     const float* const* nodes, int64_t size, int64_t vector, float* to) {
  const int64_t shift = vector * kWide;
  F16 sum[2][2];
  LMN_UNROLL for (int i = 0; i < 2; ++i) sum[i][0] = sum[i][1] = splat16(0.0f);
  for (int64_t f = 0; f < size; f += 2)
    LMN_UNROLL for (int i = 0; i < 2; ++i)
      LMN_UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t at = (f + i) * kChunk + shift + half * kWide;
        sum[i][half] += read<F16>(key + at) * read<F16>(own + at);
      }
  write(to + shift, sum[0][0] + sum[1][0]);
  write(to + shift + kWide, sum[0][1] + sum[1][1]);
  constexpr int kTogether = 3;
  for (int64_t s = 0; s < slots.count;) {
    const bool shared = slots.slot[s].stride == 0;
    const float* operands[kTogether] = {};
    int64_t strides[kTogether] = {};
    float* targets[kTogether] = {};
    int taken = 0;
    for (; taken < kTogether && s < slots.count && (slots.slot[s].stride == 0) == shared; ++taken, ++s) {
      const Slot& slot = slots.slot[s];
      strides[taken] = slot.stride;
      operands[taken] = shared ? nodes[slot.nodes]
                               : transposed + slot.transposed * size + (slot.level == 1 ? vector / 2 * kWide : 0);
      targets[taken] = to + (s + 1) * kChunk + shift;
    }
    const float* keys = key + shift;
    if (taken == 3) {
      shared ? dot_slots<3, true>(keys, size, operands, strides, targets)
             : dot_slots<3, false>(keys, size, operands, strides, targets);
    } else if (taken == 2) {
      shared ? dot_slots<2, true>(keys, size, operands, strides, targets)
             : dot_slots<2, false>(keys, size, operands, strides, targets);
    } else {
      shared ? dot_slots<1, true>(keys, size, operands, strides, targets)
             : dot_slots<1, false>(keys, size, operands, strides, targets);
    }
  }
}

// to[p, f] = factor[p] * (weight[0, p] * own[p, f] + sum over slots of weight[slot, p] * node[f]), for the positions
// begin ... end-1, of which whole groups of eight are computed.
template <class V>
LMN_INLINE void mix(const float* weight, const TokenRows& own, Slots all, const float* const* nodes, int64_t size,
                    int64_t begin, int64_t end, const float* factor, float* to) {
  const Slot* slots = all.slot;
  const int64_t count = all.count;
  for (int64_t p = begin / 8 * 8; p < end; p += 8) {
    // Positions p ... p+7: lanes p/4 and p/4 + 1 of each vector.
    const float* here = weight + p / kVectors;
    const auto at = [](const float* w, int r) LMN_LAMBDA { return w[(r % kVectors) * kWide + r / kVectors]; };
    for (int64_t f = 0; f < size; f += width<V>()) {
      V sum[8];
      LMN_UNROLL for (int r = 0; r < 8; ++r) sum[r] = fill<V>(at(here, r)) * read<V>(own.row[p + r] + f);
      int64_t s = 0;
      for (; s < count && slots[s].level == 1; ++s) {
        const float* w = here + (s + 1) * kChunk;
        const float* const* node = nodes + slots[s].nodes + p / 2;
        LMN_UNROLL for (int j = 0; j < 4; ++j) {
          const V value = read<V>(node[j] + f);
          sum[2 * j] += fill<V>(at(w, 2 * j)) * value;
          sum[2 * j + 1] += fill<V>(at(w, 2 * j + 1)) * value;
        }
      }
      for (; s < count && slots[s].level == 2; ++s) {
        const float* w = here + (s + 1) * kChunk;
        const float* const* node = nodes + slots[s].nodes + p / 4;
        LMN_UNROLL for (int j = 0; j < 2; ++j) {
          const V value = read<V>(node[j] + f);
          LMN_UNROLL for (int r = 4 * j; r < 4 * j + 4; ++r) sum[r] += fill<V>(at(w, r)) * value;
        }
      }
      for (; s < count; ++s) {
        const float* w = here + (s + 1) * kChunk;
        const V value = read<V>(nodes[slots[s].nodes + (slots[s].level < kOneNode ? p >> slots[s].level : 0)] + f);
        LMN_UNROLL for (int r = 0; r < 8; ++r) sum[r] += fill<V>(at(w, r)) * value;
      }
      LMN_UNROLL for (int r = 0; r < 8; ++r)
        write(to + (p + r) * size + f, sum[r] * fill<V>(factor[(p + r) % kVectors * kWide + (p + r) / kVectors]));
    }
  }
}

// For COUNT slots, over the positions begin ... end-1: to_query[s] += score[s, p] * key[p], and to_value[s] +=
// weight[s, p] * grad[p].
template <class V, int COUNT>
LMN_INLINE void gather(const float* score, const float* weight, const TokenRows& key, const TokenRows& grad,
                       int64_t size, int64_t begin, int64_t end, float* const* to_query, float* const* to_value) {
  for (int64_t f = 0; f < size; f += width<V>()) {
    V query[COUNT], value[COUNT];
    LMN_UNROLL for (int s = 0; s < COUNT; ++s) {
      query[s] = read<V>(to_query[s] + f);
      value[s] = read<V>(to_value[s] + f);
    }
    for (int64_t p = begin; p < end; ++p) {
      const V keys = read<V>(key.row[p] + f), grads = read<V>(grad.row[p] + f);
      const int64_t at = lane(p);
      LMN_UNROLL for (int s = 0; s < COUNT; ++s) {
        query[s] += fill<V>(score[s * kChunk + at]) * keys;
        value[s] += fill<V>(weight[s * kChunk + at]) * grads;
      }
    }
    LMN_UNROLL for (int s = 0; s < COUNT; ++s) {
      write(to_query[s] + f, query[s]);
      write(to_value[s] + f, value[s]);
    }
  }
}

}  // namespace
}  // namespace lmn::LMN_SET
