// Where the nodes of a batch of sequences live: python_ref/layout.py says it for every device, this for the host, in
// O(sequences · levels) and without tables of nodes. No torch header is included here, and what kernels read are plain
// pointers: they are compiled once for each instruction set, and must share no code of a library's.
#pragma once

#include <cstdint>

#include "step.h"

namespace lmn {

struct Span {
  int64_t start, length, offset;
};

struct Rows {
  int64_t tokens, sequences, expand, levels;
  int64_t carried;       // levels of carried nodes; -1 where the sequences start from nothing
  int64_t rows;          // of a node matrix, the null row last
  const int64_t* base;   // first row of each level, 0 for the tokens; and behind them that of unused rows
  const Span* spans;     // [sequences]
  const int64_t* place;  // [levels + 1, sequences + 1]: new nodes of a level before each sequence

  int64_t height(int64_t level) const { return stack_height(level, expand); }
  int64_t carry_rows() const { return carried < 0 ? 0 : state_rows(carried, expand); }
  int64_t carry_base() const { return rows - 1 - sequences * carry_rows(); }
  int64_t unused() const { return base[levels + 1]; }
  int64_t first(int64_t level, int64_t sequence) const { return spans[sequence].offset >> level; }
  int64_t last(int64_t level, int64_t sequence) const {
    return (spans[sequence].offset + spans[sequence].length) >> level;
  }
  int64_t before(int64_t level, int64_t sequence) const { return place[level * (sequences + 1) + sequence]; }
  // Behind the last node of a level.
  int64_t end(int64_t level) const { return base[level] + before(level, sequences) * height(level); }

  // First row of node(level, index) of a sequence; of x, and behind it of the carried tokens, at level 0. -1 where it
  // is absent.
  int64_t row(int64_t level, int64_t sequence, int64_t index) const {
    const int64_t fresh = index - first(level, sequence);
    if (fresh >= 0 && index < last(level, sequence)) {
      if (level == 0) return spans[sequence].start + fresh;
      return base[level] + (before(level, sequence) + fresh) * height(level);
    }
    if (fresh != -1 || index < 0 || level > carried) return -1;
    return level == 0 ? tokens + sequence : carry_base() + sequence * carry_rows() + state_rows(level - 1, expand);
  }
};

}  // namespace lmn
