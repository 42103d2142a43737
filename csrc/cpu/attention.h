// Single-vector attention over the memory of every position (docs/definition.md, section 4), forward and backward.
#pragma once

#include <cstdint>
#include <vector>

#include "../rows.h"

// Whether the kernels are compiled once for each instruction set, behind a pragma. Clones of a function will not do:
// gcc takes apart a vector that is wider than those of the base set before it makes them (1.5 times slower).
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define LMN_SETS
#endif

namespace lmn {

// Positions that are taken together: they share the nodes of all levels from log2 of it on.
constexpr int64_t kChunk = 64;

struct Attention {
  const Rows* rows;
  int64_t size, heads, bank;  // E, H, m
  float scale;                // of scores, one over the root of a head's size
  Type type;                  // of all but lse
  const void* token_qkv;      // [M, 3E]
  const void* node_qv;        // [m, rows, 2E]
  void* out;                  // [M, E], of the forward pass
  float* lse;                 // [M, H]
  const void* grad;           // [M, E], of the backward pass, as all below
  void* grad_tokens;          // [M, 3E]
  void* grad_nodes;           // [m, rows, 2E]
};

// The positions 64 · index ... 64 · index + 63 of a sequence.
struct Chunk {
  int64_t sequence, index;
};

// What each instruction set has of its own; `scratch` is `bytes` of a thread's.
struct AttentionKernels {
  const char* set;
  int64_t (*bytes)(const Attention& call);
  void (*forward)(const Attention& call, const Chunk& chunk, void* scratch);
  // Gradients of the heads begin ... end-1 of a whole sequence: sums over positions are in the order of these.
  void (*backward)(const Attention& call, int64_t sequence, int64_t begin, int64_t end, void* scratch);
};

// Of the instruction sets that the processor has, the best one last. All give what is asked for, and not the same bits.
std::vector<const AttentionKernels*> attention_kernels();

}  // namespace lmn
