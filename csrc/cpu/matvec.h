// Products of a few float32 vectors with a float32 or bfloat16 matrix, in memory-bound sizes.
//
// Every output is summed in an order that depends on K alone: not on how many rows share the product, on
// the range of columns or on the thread. So rows do not know of each other, to the bit.
#pragma once

#include <cstdint>

#include "../step.h"

namespace lmn {

// A weight matrix; x and y of the products are [rows, ld].
struct Operand {
  const void* weight;
  Type type;
  int64_t stride;  // elements from one stored row to the next
};

// y[r, n] += sum_k x[r, k] * weight[k, n] for n in [begin, end).
void add_in_major(const Operand& w, int64_t k, int64_t begin, int64_t end, int64_t rows, const float* x, int64_t ldx,
                  float* y, int64_t ldy);

// y[r, n] += sum_k x[r, k] * weight[n, k] for n in [begin, end).
void add_out_major(const Operand& w, int64_t k, int64_t begin, int64_t end, int64_t rows, const float* x, int64_t ldx,
                   float* y, int64_t ldy);

// y[r, n] += sum_k x[r, k] * weight[n, 2 * k + side] for n in [begin, end).
void add_pair(const Operand& w, int64_t side, int64_t k, int64_t begin, int64_t end, int64_t rows, const float* x,
              int64_t ldx, float* y, int64_t ldy);

// Attention of one head, whose features begin at `from` in every slot; `weight` is space for the
// slots, in whole groups of eight.
//   out[d] = sum_s softmax_s(scale * q[s] . k)[s] * v[s][d]
void attend_head(const float* const* q, const float* const* v, int64_t slots, int64_t from, int64_t size, float scale,
                 const float* k, float* weight, float* out);

float sum_of_squares(const float* values, int64_t count);

// values = values * sigmoid(values)
void silu(float* values, int64_t count);

// Conversions between float32 and a state's or a parameter's type.
void load(const void* from, Type type, int64_t offset, int64_t count, float* to);
void store(const float* from, int64_t count, Type type, void* to, int64_t offset);

}  // namespace lmn
