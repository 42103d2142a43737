// One token per row (docs/definition.md, section 3): what the CPU and the CUDA half share.
//
// A state holds, per slot of a pool, the position n, the newest token, and the newest node of levels
// 1 ... D with its q and v. Invariant: the rows of level i hold node(i, (n >> i) - 1), and count once
// 2^i <= n. A new token brings n to n + 1 and summarises level i again iff bit i of (n - 1) XOR n is set.
//
// Sizes, strides and positions are 64-bit everywhere. No torch header is included here, so that nvcc
// alone can compile the CUDA half.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LMN_SHARED __host__ __device__ inline
#else
#define LMN_SHARED inline
#endif

namespace lmn {

enum class Type : int { f32, bf16, f16 };

// How a summarizer's weight lies (sections 1 and 6); C features a group.
enum class Merge : int {
  linear,     // [G, 2C, C]: a row for each input feature, left before right
  pair,       // [G * C, C, 2]: a row for each output feature, left and right side by side (a convolution)
  separable,  // [G, C, C] behind a scale [2, G, C]
};

// Of nn.Linear: weight [N, K], bias [N].
struct Projection {
  const void* weight;
  const void* bias;
};

struct Step {
  int64_t rows;         // B
  int64_t tokens;       // T, of each row
  int64_t embedding;    // E
  int64_t heads;        // H
  int64_t bank;         // m
  int64_t groups;       // G: groups of banks that a summarizer keeps apart; C = E * m / G
  int64_t expand;       // k of the expander
  int64_t levels;       // D
  int64_t pool;         // slots
  int64_t slot_nodes;   // elements from one slot to the next of nodes, q and v
  int64_t slot_token;
  int64_t row_x, token_x;  // elements from one row of x to the next, from one token to the next

  int64_t* position;     // [pool]
  void* token;           // [pool, E]
  void* nodes;           // [pool, R, m, E]
  void* q;
  void* v;
  const int64_t* slots;  // [B], -1 for none; the row's own number where null
  const void* x;         // [B, T, E]
  void* y;               // [B, T, E]; null where only the state advances

  Type type;        // of x, y and weights
  Type state_type;  // of token, nodes, q and v

  Merge merge;
  const void* merge_weight;
  const void* merge_bias;       // [G, C]
  const void* merge_scale;      // [2, G, C], or null
  const void* expander_weight;  // [E, E, 1 + k], or null
  const void* expander_bias;    // [E]
  Projection query, key, value, out;

  // The block around the mixing (section 5): x + mixing(norm(x)), then x + FF(norm(x)); null where there is none.
  const void* mixing_norm;       // [E]
  const void* feedforward_norm;  // [E]
  float mixing_eps, feedforward_eps;
  int64_t hidden;      // F
  Projection up, down;  // [F, E] and [E, F], SiLU between them
};

// Rows of a node of a level: the stack of the expander, one row without.
LMN_SHARED int64_t stack_height(int64_t level, int64_t expand) { return 1 + level * expand; }

// Rows of the newest nodes of levels 1 ... level.
LMN_SHARED int64_t state_rows(int64_t level, int64_t expand) {
  return level + expand * (level * (level + 1) / 2);
}

// Levels that the n-th token completes: the bits above 0 of (n - 1) XOR n.
LMN_SHARED int64_t completed_levels(int64_t n) {
  uint64_t crossed = (static_cast<uint64_t>(n - 1) ^ static_cast<uint64_t>(n)) >> 1;
  int64_t count = 0;
  while (crossed) {
    ++count;
    crossed >>= 1;
  }
  return count;
}

// Levels that hold a node once n tokens were seen.
LMN_SHARED int64_t valid_levels(int64_t n) {
  int64_t count = 0;
  while (n >> (count + 1)) ++count;
  return count;
}

// The last position that D levels have room for.
LMN_SHARED int64_t capacity(int64_t levels) { return levels >= 61 ? (int64_t{1} << 62) - 1 : (int64_t{2} << levels) - 1; }

// On up to `threads` threads; positions must leave room for all tokens, and slots be distinct.
void step_cpu(const Step& step, int64_t threads);

}  // namespace lmn
