// Products of a few rows with a matrix, the block's share of them: float32 sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lmn {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
// Rows that share one reading of a matrix.
constexpr int kRows = 4;
// Columns of a tile where neighbours in memory are columns: 8 lanes of two each.
constexpr int kColumns = 16;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <class T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// weight[k, n] at p[k * k_stride + n * n_stride], times scale[k] where there is one.
template <class P>
struct Matrix {
  const P* p;
  int64_t k_stride, n_stride;
  const P* scale;

  __device__ float at(int64_t k, int64_t n) const {
    const float value = widen(p[k * k_stride + n * n_stride]);
    return scale ? value * widen(scale[k]) : value;
  }
};

// Inputs of up to kRows rows; null for a row of zeros. Element k of a row is base[k % wrap].
template <class T>
struct Rows {
  const T* base[kRows];
  int64_t wrap;

  __device__ float at(int r, int64_t k) const { return base[r] ? widen(base[r][wrap ? k % wrap : k]) : 0.0f; }
};

// Whose turn a unit of work is, over all products of a phase.
struct Turn {
  int64_t base = 0;

  // The block's first unit of the next `units`, in steps of gridDim.x.
  __device__ int64_t first(int64_t units) {
    const int64_t start = (blockIdx.x + gridDim.x - base % gridDim.x) % gridDim.x;
    base += units;
    return start;
  }
};

// What a thread holds of a tile: mapping of lanes to columns (in-major) or to k (out-major).
struct Tile {
  float sum[kRows][2];
  float (*shared)[kRows][kColumns];  // [kWarps]
};

// Adds k_count terms. Neighbours in memory are columns: a warp takes 4 rows of the matrix, 16 columns each.
template <class P, class T>
__device__ void add_columns(Tile& tile, const Matrix<P>& matrix, const Rows<T>& rows, int64_t k_count, int64_t n0,
                            int64_t n_end) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = n0 + 2 * (lane % 8);
#pragma unroll 4
  for (int64_t k = 4 * warp + lane / 8; k < k_count; k += 4 * kWarps) {
    const float w0 = n < n_end ? matrix.at(k, n) : 0.0f, w1 = n + 1 < n_end ? matrix.at(k, n + 1) : 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float x = rows.at(r, k);
      tile.sum[r][0] += x * w0;
      tile.sum[r][1] += x * w1;
    }
  }
}

// Calls out(r, n, sum) once for each element of a tile of `add_columns`.
template <class Out>
__device__ void store_columns(const Tile& tile, int rows, int64_t n0, int64_t n_end, Out out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = tile.sum[r][c];
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (lane < 8) tile.shared[warp][r][2 * lane + c] = sum;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
    const int r = i / kColumns, c = i % kColumns;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += tile.shared[w][r][c];
    if (n0 + c < n_end) out(r, n0 + c, sum);
  }
  __syncthreads();
}

// Adds k_count terms. Neighbours in memory are terms: a warp takes one column, n.
template <class P, class T>
__device__ void add_dots(Tile& tile, const Matrix<P>& matrix, const Rows<T>& rows, int64_t k_count, int64_t n) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int64_t k = lane; k < k_count; k += 32) {
    const float w = matrix.at(k, n);
#pragma unroll
    for (int r = 0; r < kRows; ++r) tile.sum[r][0] += rows.at(r, k) * w;
  }
}

template <class Out>
__device__ void store_dots(const Tile& tile, int rows, int64_t n, Out out) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = tile.sum[r][0];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (r < rows && threadIdx.x % 32 == 0) out(r, n, sum);
  }
}

// How lanes are mapped: neighbours in memory are columns of the matrix, or terms of the sums.
enum class Lanes { columns, terms };

// rows x [k_count, n_count]: inputs(row) points at a row's input, out(row, n, sum) takes an element. `segments`
// products are added up, inputs(row, segment) with the matrix moved by `segment` elements.
template <Lanes lanes, class P, class T, class Inputs, class Out>
__device__ void product(Turn& turn, Tile& tile, const Matrix<P>& matrix, int64_t rows, int64_t k_count,
                        int64_t n_count, int64_t wrap, int64_t segments, Inputs inputs, Out out) {
  constexpr bool columns = lanes == Lanes::columns;
  const int64_t width = columns ? kColumns : kWarps;
  const int64_t across = (n_count + width - 1) / width, down = (rows + kRows - 1) / kRows;
  for (int64_t unit = turn.first(across * down); unit < across * down; unit += gridDim.x) {
    const int64_t row0 = unit / across * kRows, n0 = unit % across * width;
    const int taken = static_cast<int>(rows - row0 < kRows ? rows - row0 : kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) tile.sum[r][0] = tile.sum[r][1] = 0.0f;
    const int64_t n = n0 + threadIdx.x / 32;
    for (int64_t s = 0; s < segments; ++s) {
      Rows<T> given;
      given.wrap = wrap;
#pragma unroll
      for (int r = 0; r < kRows; ++r) given.base[r] = r < taken ? inputs(row0 + r, s) : nullptr;
      Matrix<P> moved = matrix;
      moved.p += s;
      if constexpr (columns) {
        add_columns(tile, moved, given, k_count, n0, n_count);
      } else if (n < n_count) {
        add_dots(tile, moved, given, k_count, n);
      }
    }
    const auto put = [&](int r, int64_t column, float sum) { out(row0 + r, column, sum); };
    if constexpr (columns) {
      store_columns(tile, taken, n0, n_count, put);
    } else if (n < n_count) {
      store_dots(tile, taken, n, put);
    }
  }
}

}  // namespace lmn
