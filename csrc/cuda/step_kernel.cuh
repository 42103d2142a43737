// The step on CUDA: one cooperative launch a token, whatever the positions.
//
// The blocks meet between phases. What a row completes follows from its position on the device, so a captured
// graph replays at any position. Of a chain of k merges (n = 2^k), the left halves, W_left * left + c, depend on
// the state alone: they are made for all levels at once, before the chain; a link of it is one product with the
// right half of W. New nodes go straight into the state, whose old ones nobody needs behind the first phase.
#pragma once

#include <cooperative_groups.h>

#include <cmath>

#include "product.cuh"
#include "step.h"

namespace lmn {

// Float32 parts of the workspace, and lists of rows by level.
struct Work {
  float* input;     // [B, E] x as the mixing sees it
  float* qkv;       // [B, 3, E] of the tokens
  float* mixed;     // [B, E]
  float* result;    // [B, E] behind the mixing
  float* normed;    // [B, E] input of the feed-forward
  float* hidden;    // [B, F]
  float* left;      // [B, R, m, E] left halves of the merges
  float* expanded;  // [B, R, m, E] children behind the expander
  int* rows;        // [D + 1, B] rows that complete a level
  int* counts;      // [D + 1]
};

struct Sizes {
  int64_t tokens, nodes, hidden, lists;
};

__host__ __device__ inline Sizes sizes_of(const Step& s) {
  const int64_t nodes = s.rows * state_rows(s.levels, s.expand) * s.bank * s.embedding;
  return {s.rows * s.embedding, nodes, s.rows * s.hidden, (s.levels + 1) * (s.rows + 1)};
}

__host__ __device__ inline Work work_of(const Step& s, void* space) {
  const Sizes n = sizes_of(s);
  Work w;
  w.input = static_cast<float*>(space);
  w.qkv = w.input + n.tokens;
  w.mixed = w.qkv + 3 * n.tokens;
  w.result = w.mixed + n.tokens;
  w.normed = w.result + n.tokens;
  w.hidden = w.normed + n.tokens;
  w.left = w.hidden + n.hidden;
  w.expanded = w.left + n.nodes;
  w.rows = reinterpret_cast<int*>(w.expanded + (s.expander_weight ? n.nodes : 0));
  w.counts = w.rows + (s.levels + 1) * s.rows;
  return w;
}

// One row of the batch: its slot, and its position behind the token.
struct Row {
  int64_t slot, n;
  bool alive;

  __device__ Row(const Step& s, int64_t b) : slot(s.slots ? s.slots[b] : b), n(0), alive(false) {
    if (slot < 0 || slot >= s.pool) return;
    n = s.position[slot] + 1;
    alive = n >= 1 && n <= capacity(s.levels);
  }
};

template <class P, class S>
struct Kernel {
  const Step& s;
  const Work& w;
  Tile& tile;
  int64_t t;  // the token
  int64_t e, wide, c;

  __device__ Kernel(const Step& step, const Work& work, Tile& shared, int64_t token)
      : s(step), w(work), tile(shared), t(token), e(step.embedding), wide(step.bank * step.embedding),
        c(step.bank * step.embedding / step.groups) {}

  __device__ static const P* parameter(const void* p) { return static_cast<const P*>(p); }
  __device__ S* state(void* p) const { return static_cast<S*>(p); }
  __device__ int64_t slot(int64_t b) const { return s.slots ? s.slots[b] : b; }
  __device__ int64_t kept(int64_t b, int64_t row) const { return slot(b) * s.slot_nodes + row * wide; }
  // Rows of the nodes before those of a level.
  __device__ int64_t before(int64_t level) const { return state_rows(level - 1, s.expand); }
  __device__ int64_t scratch(int64_t b, int64_t row) const {
    return (b * state_rows(s.levels, s.expand) + row) * wide;
  }

  // RMSNorm of rows, a block each; a copy where there is no norm.
  template <class In>
  __device__ void normalize(In in, const void* weight, float eps, float* to) const {
    for (int64_t b = blockIdx.x; b < s.rows; b += gridDim.x) {
      float sum = 0.0f;
      for (int64_t i = threadIdx.x; weight && i < e; i += kThreads) sum += in(b, i) * in(b, i);
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (threadIdx.x % 32 == 0) tile.shared[threadIdx.x / 32][0][0] = sum;
      __syncthreads();
      sum = 0.0f;
      for (int i = 0; i < kWarps; ++i) sum += tile.shared[i][0][0];
      __syncthreads();
      const float factor = weight ? rsqrtf(sum / static_cast<float>(e) + eps) : 1.0f;
      for (int64_t i = threadIdx.x; i < e; i += kThreads)
        to[b * e + i] = in(b, i) * factor * (weight ? widen(parameter(weight)[i]) : 1.0f);
    }
  }

  // Lists the rows that complete each level, in their order; a warp for each level.
  __device__ void list() const {
    const int lane = threadIdx.x % 32;
    for (int64_t level = 1 + blockIdx.x * kWarps + threadIdx.x / 32; level <= s.levels; level += gridDim.x * kWarps) {
      int count = 0;
      for (int64_t b0 = 0; b0 < s.rows; b0 += 32) {
        bool mine = false;
        if (b0 + lane < s.rows) {
          const Row row(s, b0 + lane);
          mine = row.alive && completed_levels(row.n) >= level;
        }
        const unsigned found = __ballot_sync(0xffffffffu, mine);
        if (mine) w.rows[level * s.rows + count + __popc(found & ((1u << lane) - 1))] = static_cast<int>(b0 + lane);
        count += __popc(found);
      }
      if (lane == 0) w.counts[level] = count;
    }
  }

  __device__ Matrix<P> merge_matrix(int64_t group, int64_t side) const {
    const P* p = parameter(s.merge_weight);
    if (s.merge == Merge::linear) return {p + (2 * group + side) * c * c, c, 1, nullptr};
    if (s.merge == Merge::pair) return {p + group * c * 2 * c + side, 2, 2 * c, nullptr};
    return {p + group * c * c, c, 1, parameter(s.merge_scale) + side * wide + group * c};
  }

  // The children of a level behind the expander, for all rows that complete it.
  __device__ void expand(Turn& turn, int64_t level, bool right) const {
    const int64_t k = s.expand, height = stack_height(level, k), under = height - k, count = w.counts[level];
    const int* rows = w.rows + level * s.rows;
    const Matrix<P> matrix{parameter(s.expander_weight), e * (1 + k), 1 + k, nullptr};
    const auto out = [&](int64_t row, int64_t n, float sum) {
      const int64_t b = rows[row / (height * s.bank)], r = row % (height * s.bank);
      w.expanded[scratch(b, before(level)) + r * e + n] = sum + widen(parameter(s.expander_bias)[n]);
    };
    // Entry r of the wider stack is the sum over taps of entry r - tap.
    const auto entry = [&](int64_t row, int64_t tap) { return row / s.bank % height - tap; };
    if (level > 1) {
      const auto in = [&](int64_t row, int64_t tap) -> const S* {
        const int64_t b = rows[row / (height * s.bank)], r = entry(row, tap);
        if (r < 0 || r >= under) return nullptr;
        return state(s.nodes) + kept(b, before(level - 1) + r) + row % s.bank * e;
      };
      product<Lanes::columns, P, S>(turn, tile, matrix, count * height * s.bank, e, e, 0, 1 + k, in, out);
    } else if (right) {
      const auto in = [&](int64_t row, int64_t tap) -> const float* {
        return entry(row, tap) == 0 ? w.input + rows[row / (height * s.bank)] * e : nullptr;
      };
      product<Lanes::columns, P, float>(turn, tile, matrix, count * height * s.bank, e, e, 0, 1 + k, in, out);
    } else {
      const auto in = [&](int64_t row, int64_t tap) -> const S* {
        return entry(row, tap) == 0 ? state(s.token) + slot(rows[row / (height * s.bank)]) * s.slot_token : nullptr;
      };
      product<Lanes::columns, P, S>(turn, tile, matrix, count * height * s.bank, e, e, 0, 1 + k, in, out);
    }
  }

  // One side of the merges of a level: the left one with the bias to scratch, the right one on top to the state.
  __device__ void merge(Turn& turn, int64_t level, int64_t side) const {
    s.merge == Merge::pair ? merge_by<Lanes::terms>(turn, level, side) : merge_by<Lanes::columns>(turn, level, side);
  }

  template <Lanes lanes>
  __device__ void merge_by(Turn& turn, int64_t level, int64_t side) const {
    const int64_t height = stack_height(level, s.expand), rows = w.counts[level] * height;
    const int* listed = w.rows + level * s.rows;
    const int64_t first = before(level);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t from = g * c;
      const auto out = [&](int64_t row, int64_t n, float sum) {
        const int64_t b = listed[row / height], at = row % height;
        float* left = w.left + scratch(b, first + at) + from + n;
        if (side == 0) {
          *left = sum + widen(parameter(s.merge_bias)[from + n]);
        } else {
          state(s.nodes)[kept(b, first + at) + from + n] = narrow<S>(*left + sum);
        }
      };
      const Matrix<P> matrix = merge_matrix(g, side);
      if (s.expander_weight) {
        const auto in = [&](int64_t row, int64_t) -> const float* {
          return w.expanded + scratch(listed[row / height], first + row % height) + from;
        };
        product<lanes, P, float>(turn, tile, matrix, rows, c, c, 0, 1, in, out);
      } else if (level > 1) {
        const auto in = [&](int64_t row, int64_t) -> const S* {
          return state(s.nodes) + kept(listed[row], first - 1) + from;
        };
        product<lanes, P, S>(turn, tile, matrix, rows, c, c, 0, 1, in, out);
      } else if (side == 1) {
        const auto in = [&](int64_t row, int64_t) -> const float* { return w.input + listed[row] * e; };
        product<lanes, P, float>(turn, tile, matrix, rows, c, c, e, 1, in, out);
      } else {
        const auto in = [&](int64_t row, int64_t) -> const S* {
          return state(s.token) + slot(listed[row]) * s.slot_token;
        };
        product<lanes, P, S>(turn, tile, matrix, rows, c, c, e, 1, in, out);
      }
    }
  }

  // A linear layer over all rows of the batch, from float32 to float32 or whatever `out` does.
  template <class Out>
  __device__ void linear(Turn& turn, const Projection& layer, const float* from, int64_t in, int64_t n, Out out) const {
    const auto rows = [&](int64_t row, int64_t) -> const float* { return from + row * in; };
    const auto put = [&](int64_t row, int64_t column, float sum) {
      out(row, column, sum + widen(parameter(layer.bias)[column]));
    };
    product<Lanes::terms, P, float>(turn, tile, {parameter(layer.weight), 1, in, nullptr}, s.rows, in, n, 0, 1, rows, put);
  }

  __device__ void project_tokens(Turn& turn) const {
    for (int i = 0; i < 3; ++i)
      linear(turn, i == 0 ? s.query : i == 1 ? s.key : s.value, w.input, e, e,
             [&](int64_t b, int64_t n, float v) { w.qkv[(3 * b + i) * e + n] = v; });
  }

  // q and v of the new nodes of a level, from the state into the state.
  __device__ void project_nodes(Turn& turn, int64_t level) const {
    const int64_t vectors = stack_height(level, s.expand) * s.bank;
    const int* listed = w.rows + level * s.rows;
    const auto at = [&](int64_t row) { return kept(listed[row / vectors], before(level)) + row % vectors * e; };
    const auto in = [&](int64_t row, int64_t) -> const S* { return state(s.nodes) + at(row); };
    for (int i = 0; i < 2; ++i) {
      const Projection& layer = i ? s.value : s.query;
      S* to = state(i ? s.v : s.q);
      const auto out = [&](int64_t row, int64_t n, float sum) {
        to[at(row) + n] = narrow<S>(sum + widen(parameter(layer.bias)[n]));
      };
      product<Lanes::terms, P, S>(turn, tile, {parameter(layer.weight), 1, e, nullptr}, w.counts[level] * vectors, e, e,
                                  0, 1, in, out);
    }
  }

  // Attention of one head of one row, a warp each, in chunks of 128 features; online softmax over the slots.
  __device__ void attend() const {
    constexpr int kHeld = 4;
    const int lane = threadIdx.x % 32;
    const int64_t size = e / s.heads, chunk = 32 * kHeld, chunks = (size + chunk - 1) / chunk;
    const int64_t units = s.rows * s.heads * chunks;
    for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; unit < units;
         unit += static_cast<int64_t>(gridDim.x) * kWarps) {
      const int64_t b = unit / (s.heads * chunks), from = unit / chunks % s.heads * size, d0 = unit % chunks * chunk;
      const Row row(s, b);
      if (!row.alive) continue;
      const float* own = w.qkv + 3 * b * e + from;
      const float* key = own + e;
      const float scale = rsqrtf(static_cast<float>(size));
      float largest = score(own, key, size) * scale, total = 1.0f, out[kHeld];
      for (int i = 0; i < kHeld; ++i) {
        const int64_t d = d0 + lane + 32 * i;
        out[i] = d < size ? own[2 * e + d] : 0.0f;
      }
      const int64_t slots = state_rows(valid_levels(row.n), s.expand) * s.bank, base = row.slot * s.slot_nodes + from;
      for (int64_t i = 0; i < slots; ++i) {
        const float value = score(state(s.q) + base + i * e, key, size) * scale;
        const float most = fmaxf(largest, value), decay = expf(largest - most), weight = expf(value - most);
        total = total * decay + weight;
        for (int h = 0; h < kHeld; ++h) {
          const int64_t d = d0 + lane + 32 * h;
          out[h] = out[h] * decay + (d < size ? weight * widen(state(s.v)[base + i * e + d]) : 0.0f);
        }
        largest = most;
      }
      for (int i = 0; i < kHeld; ++i) {
        const int64_t d = d0 + lane + 32 * i;
        if (d < size) w.mixed[b * e + from + d] = out[i] / total;
      }
    }
  }

  template <class T>
  __device__ static float score(const T* q, const float* key, int64_t size) {
    float sum = 0.0f;
    for (int64_t d = threadIdx.x % 32; d < size; d += 32) sum += widen(q[d]) * key[d];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }

  // An element of the output: nothing for rows without a slot, NaN for those that have no room.
  __device__ void put(int64_t b, int64_t n, float value) const {
    const Row row(s, b);
    if (!row.alive) value = row.slot == -1 ? 0.0f : NAN;
    static_cast<P*>(s.y)[(b * s.tokens + t) * e + n] = narrow<P>(value);
  }

  __device__ float x(int64_t b, int64_t i) const { return widen(parameter(s.x)[b * s.row_x + t * s.token_x + i]); }

  // Token and position, behind everything that reads the old ones.
  __device__ void advance() const {
    for (int64_t b = blockIdx.x; b < s.rows; b += gridDim.x) {
      const Row row(s, b);
      __syncthreads();
      if (!row.alive) continue;
      for (int64_t i = threadIdx.x; i < e; i += kThreads)
        state(s.token)[row.slot * s.slot_token + i] = narrow<S>(w.input[b * e + i]);
      if (threadIdx.x == 0) s.position[row.slot] = row.n;
    }
  }
};

template <class P, class S>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Step s, void* space, int64_t t) {
  __shared__ float shared[kWarps][kRows][kColumns];
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const Work w = work_of(s, space);
  Tile tile{{}, shared};
  const Kernel<P, S> k(s, w, tile, t);
  k.normalize([&](int64_t b, int64_t i) { return k.x(b, i); }, s.mixing_norm, s.mixing_eps, w.input);
  k.list();
  grid.sync();
  Turn turn;
  int64_t highest = 0;
  for (int64_t level = 1; level <= s.levels && w.counts[level] > 0; ++level) highest = level;
  if (s.y) k.project_tokens(turn);
  // Stage 0: the left halves of all levels; stage i: the right half of level i. One loop, as every call is inlined.
  for (int64_t stage = 0; stage <= highest; ++stage) {
    const int64_t first = stage > 0 ? stage : 1, last = stage > 0 ? stage : highest;
    if (stage > 0) grid.sync();
    if (s.expander_weight) {
      for (int64_t level = first; level <= last; ++level) k.expand(turn, level, stage > 0);
      grid.sync();
    }
    for (int64_t level = first; level <= last; ++level) k.merge(turn, level, stage > 0 ? 1 : 0);
  }
  grid.sync();
  for (int64_t level = 1; level <= highest; ++level) k.project_nodes(turn, level);
  if (s.y) {
    grid.sync();
    k.attend();
    grid.sync();
    k.linear(turn, s.out, w.mixed, k.e, k.e, [&](int64_t b, int64_t n, float v) {
      if (s.mixing_norm) v += k.x(b, n);
      s.feedforward_norm ? void(w.result[b * k.e + n] = v) : k.put(b, n, v);
    });
    if (s.feedforward_norm) {
      grid.sync();
      k.normalize([&](int64_t b, int64_t i) { return w.result[b * k.e + i]; }, s.feedforward_norm, s.feedforward_eps,
                  w.normed);
      grid.sync();
      k.linear(turn, s.up, w.normed, k.e, s.hidden,
               [&](int64_t b, int64_t n, float v) { w.hidden[b * s.hidden + n] = v / (1.0f + expf(-v)); });
      grid.sync();
      k.linear(turn, s.down, w.hidden, s.hidden, k.e,
               [&](int64_t b, int64_t n, float v) { k.put(b, n, v + w.result[b * k.e + n]); });
    }
  }
  grid.sync();
  k.advance();
}

// Blocks that can be resident together: the occupancy of the kernel on the current device.
template <class Function>
cudaError_t resident(Function kernel, int* blocks) {
  int device = 0, each = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *blocks = each * multiprocessors;
  return error;
}

// With x and weights of type P and a state of type S; one file for each P makes them.
template <class P, class S>
cudaError_t launch(const Step& step, void* space, cudaStream_t stream) {
  int blocks = 0;
  cudaError_t error = resident(step_kernel<P, S>, &blocks);
  // More units than blocks there may be; fewer are not worth a meeting of all.
  const int64_t wide = step.hidden > 3 * step.embedding ? step.hidden : 3 * step.embedding;
  const int64_t units = (step.rows + kRows - 1) / kRows * ((wide + kWarps - 1) / kWarps);
  if (units < blocks) blocks = static_cast<int>(units);
  Step given = step;
  for (int64_t t = 0; t < step.tokens && error == cudaSuccess; ++t) {
    void* arguments[] = {&given, &space, &t};
    error = cudaLaunchCooperativeKernel(reinterpret_cast<void*>(step_kernel<P, S>), dim3(blocks), dim3(kThreads),
                                        arguments, 0, stream);
  }
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace lmn
