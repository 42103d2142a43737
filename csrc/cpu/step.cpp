// The step on the CPU.
//
// Work is done in blocks of up to kBlock (row, token) pairs: one token of several rows, or several tokens
// of one. In a block, every matrix is read once for all vectors that are ready for it:
//
//   1. the left half of every merge whose left node is in the state already: W once, however long the chain
//   2. level by level, the rest of the merges
//   3. q and v of tokens and new nodes, k of tokens
//   4. attention over the slots as they stood at each token
//   5. the output projection, the feed-forward of a block, and the state
//
// Threads share the columns of each product and meet between these phases. No result depends on the shape
// of a block or on the number of threads, to the bit: see matvec.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../step.h"
#include "matvec.h"

namespace lmn {
namespace {

constexpr int64_t kBlock = 8;
constexpr int64_t kMaxLevels = 62;  // of positions below 2^62
// Matrix bytes that are worth a thread of their own: the threads meet a handful of times a block.
constexpr int64_t kBytesPerThread = 512 * 1024;
// Columns that two threads may share no part of: a cache line of float32, and whole groups of vector lanes.
constexpr int64_t kUnit = 16;

struct Token {
  int64_t slot;
  int64_t position;  // behind this token
  int64_t chain;     // levels that it completes
  int64_t source;    // offset of its features in x, and of its row in y
  int64_t target;
  bool last;  // of its row in this block
};

// A node to be made: `rows` vectors of each bank from row `base` of the block's new nodes.
struct Node {
  int64_t token;  // that completes it
  int64_t level;
  int64_t base;
  int64_t rows;
  int64_t left;  // where its left half is: a row of the new nodes, or for level 1 a token; -1 for the state
};

struct Scratch {
  std::vector<float> input;    // [tokens, E] of x
  std::vector<float> vectors;  // [tokens, E] as the mixing sees them, then the new nodes [rows, m, E]
  std::vector<float> query, value, key, mixed, result, hidden;
  std::vector<float> left, right;  // inputs of the merges, [rows, m, E] each
  std::vector<float> taps;         // [rows, m, E * (1 + k)] of the expander
  std::vector<Node> nodes;

  static float* sized(std::vector<float>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
    return buffer.data();
  }
};

// What each thread needs for itself in the attention.
struct Slots {
  std::vector<const float*> query, value;
  std::vector<float> weight, wide;
};

struct Team {
  int64_t id = 0, count = 1;

  void meet() const {
#ifdef _OPENMP
    if (count > 1) {
#pragma omp barrier
    }
#endif
  }
  // This thread's part of `size` columns, in whole units.
  void share(int64_t size, int64_t unit, int64_t* begin, int64_t* end) const {
    const int64_t units = (size + unit - 1) / unit;
    *begin = std::min(size, units * id / count * unit);
    *end = std::min(size, units * (id + 1) / count * unit);
  }
};

class Block {
 public:
  Block(const Step& step, const Token* tokens, int64_t count, Scratch* scratch)
      : step_(step), tokens_(tokens), count_(count), scratch_(scratch) {
    e_ = step.embedding;
    wide_ = step.bank * e_;
    plan();
    input_ = Scratch::sized(scratch->input, count_ * e_);
    vectors_ = Scratch::sized(scratch->vectors, count_ * e_ + rows_ * wide_);
    query_ = Scratch::sized(scratch->query, count_ * e_ + rows_ * wide_);
    value_ = Scratch::sized(scratch->value, count_ * e_ + rows_ * wide_);
    key_ = Scratch::sized(scratch->key, count_ * e_);
    mixed_ = Scratch::sized(scratch->mixed, count_ * e_);
    result_ = Scratch::sized(scratch->result, count_ * e_);
    hidden_ = Scratch::sized(scratch->hidden, count_ * step.hidden);
    left_ = Scratch::sized(scratch->left, rows_ * wide_);
    right_ = Scratch::sized(scratch->right, rows_ * wide_);
    if (step.expander_weight) taps_ = Scratch::sized(scratch->taps, rows_ * wide_ * (1 + step.expand));
  }

  void run(const Team& team) {
    if (team.id == 0)
      for (int64_t t = 0; t < count_; ++t) {
        load(step_.x, step_.type, tokens_[t].source, e_, input_ + t * e_);
        normalize(input_ + t * e_, step_.mixing_norm, step_.mixing_eps, vectors_ + t * e_);
      }
    team.meet();
    merge(team);
    project(team);
    if (step_.y) {
      team.meet();
      attend(team);
      team.meet();
      finish(team);
    }
    team.meet();
    save(team);
  }

 private:
  // Lists the new nodes, level by level, and says where the left half of each is.
  void plan() {
    scratch_->nodes.clear();
    for (int64_t t = 0; t < count_; ++t) highest_ = std::max(highest_, tokens_[t].chain);
    for (int64_t level = 1; level <= highest_; ++level)
      for (int64_t t = 0; t < count_; ++t) {
        const bool follows = t > 0 && tokens_[t - 1].slot == tokens_[t].slot;
        newest_[t][level] = follows ? newest_[t - 1][level] : -1;
        if (tokens_[t].chain < level) continue;
        newest_[t][level] = rows_;
        const int64_t left = !follows ? -1 : level == 1 ? t - 1 : newest_[t - 1][level - 1];
        scratch_->nodes.push_back({t, level, rows_, stack_height(level, step_.expand), left});
        rows_ += scratch_->nodes.back().rows;
      }
  }

  float* fresh(int64_t row) const { return vectors_ + count_ * e_ + row * wide_; }

  // This thread's features of the stack that a child of `node` is, to the first rows of its input.
  void place(const Team& team, const Node& node, bool right, float* to) const {
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    const int64_t vectors = stack_height(node.level - 1, step_.expand) * step_.bank, size = end - begin;
    const Token& token = tokens_[node.token];
    const bool kept = !right && node.left < 0;
    const float* from = nullptr;
    if (node.level == 1) {
      from = kept ? nullptr : vectors_ + (right ? node.token : node.left) * e_;
    } else if (!kept) {
      from = fresh(right ? newest(node.token, node.level - 1) : node.left);
    }
    const int64_t stored = node.level == 1 ? token.slot * step_.slot_token
                                           : token.slot * step_.slot_nodes + state_rows(node.level - 2, step_.expand) * wide_;
    for (int64_t i = 0; i < vectors; ++i) {
      // A token is one vector, the same for every bank.
      const int64_t at = (node.level == 1 ? 0 : i * e_) + begin;
      float* target = to + i * e_ + begin;
      if (kept) {
        load(node.level == 1 ? step_.token : step_.nodes, step_.state_type, stored + at, size, target);
      } else {
        std::copy(from + at, from + at + size, target);
        if (node.level == 1 && !right) round(target, size);
      }
    }
  }

  // What is kept is what is stored: values go through the state's type.
  void round(float* values, int64_t count) const {
    if (step_.state_type == Type::f32) return;
    uint16_t half[kUnit];
    for (int64_t i = 0; i < count; i += kUnit) {
      const int64_t size = std::min(kUnit, count - i);
      store(values + i, size, step_.state_type, half, 0);
      load(half, step_.state_type, 0, size, values + i);
    }
  }

  // The transposed convolution along a stack of `node.rows - k` vectors, in place.
  void expand(const Team& team, const Node& node, float* rows, float* taps) const {
    const int64_t k = step_.expand, height = node.rows - k, n = e_ * (1 + k);
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    const int64_t vectors = height * step_.bank;
    for (int64_t r = 0; r < vectors; ++r) std::fill(taps + r * n + begin * (1 + k), taps + r * n + end * (1 + k), 0.0f);
    add_in_major({step_.expander_weight, step_.type, n}, e_, begin * (1 + k), end * (1 + k), vectors, rows, e_, taps, n);
    team.meet();
    for (int64_t r = 0; r < node.rows; ++r)
      for (int64_t b = 0; b < step_.bank; ++b) {
        float* target = rows + (r * step_.bank + b) * e_;
        load(step_.expander_bias, step_.type, begin, end - begin, target + begin);
        for (int64_t tap = std::max<int64_t>(0, r - height + 1); tap <= std::min(k, r); ++tap) {
          const float* from = taps + ((r - tap) * step_.bank + b) * n + tap;
          for (int64_t o = begin; o < end; ++o) target[o] += from[o * (1 + k)];
        }
      }
  }

  // Adds one side of the merges in rows `base ... base+rows-1` to the new nodes there.
  void add_side(const Team& team, int64_t side, int64_t base, int64_t rows, float* input) const {
    const int64_t c = wide_ / step_.groups;
    float* target = fresh(base);
    float* from = input + base * wide_;
    int64_t begin, end;
    team.share(c, kUnit, &begin, &end);
    const size_t size = step_.type == Type::f32 ? 4 : 2;
    for (int64_t g = 0; g < step_.groups; ++g) {
      const auto part = [&](int64_t elements) {
        return static_cast<const char*>(step_.merge_weight) + static_cast<size_t>(elements) * size;
      };
      const float* x = from + g * c;
      float* y = target + g * c;
      if (step_.merge == Merge::linear) {
        add_in_major({part((2 * g + side) * c * c), step_.type, c}, c, begin, end, rows, x, wide_, y, wide_);
      } else if (step_.merge == Merge::separable) {
        add_in_major({part(g * c * c), step_.type, c}, c, begin, end, rows, x, wide_, y, wide_);
      } else {
        add_pair({part(g * c * 2 * c), step_.type, 2 * c}, side, c, begin, end, rows, x, wide_, y, wide_);
      }
    }
  }

  // Gathers one side of a merge, expands and scales it.
  void prepare(const Team& team, const Node& node, bool right, float* input) const {
    float* rows = input + node.base * wide_;
    place(team, node, right, rows);
    if (step_.expander_weight) {
      team.meet();
      expand(team, node, rows, taps_ + node.base * wide_ * (1 + step_.expand));
    }
    if (step_.merge_scale) scale(team, node, right, rows);
  }

  void scale(const Team& team, const Node& node, bool right, float* rows) const {
    float factor[kUnit];
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    for (int64_t b = 0; b < step_.bank; ++b)
      for (int64_t from = begin; from < end; from += kUnit) {
        const int64_t size = std::min(kUnit, end - from);
        load(step_.merge_scale, step_.type, (right ? wide_ : 0) + b * e_ + from, size, factor);
        for (int64_t r = 0; r < node.rows; ++r)
          for (int64_t i = 0; i < size; ++i) rows[(r * step_.bank + b) * e_ + from + i] *= factor[i];
      }
  }

  void merge(const Team& team) const {
    const std::vector<Node>& nodes = scratch_->nodes;
    if (nodes.empty()) return;
    int64_t begin, end;
    team.share(wide_ / step_.groups, kUnit, &begin, &end);
    const int64_t c = wide_ / step_.groups;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t g = 0; g < step_.groups; ++g)
        load(step_.merge_bias, step_.type, g * c + begin, end - begin, fresh(r) + g * c + begin);
    for (const Node& node : nodes)
      if (node.left < 0) prepare(team, node, false, left_);
    team.meet();
    add_runs(team, 0, nodes.size(), true);
    for (size_t first = 0; first < nodes.size();) {
      size_t last = first;
      while (last < nodes.size() && nodes[last].level == nodes[first].level) ++last;
      for (size_t i = first; i < last; ++i) {
        if (nodes[i].left >= 0) prepare(team, nodes[i], false, left_);
        prepare(team, nodes[i], true, right_);
      }
      team.meet();
      add_runs(team, first, last, false);
      const int64_t base = nodes[first].base, rows = nodes[last - 1].base + nodes[last - 1].rows - base;
      add_side(team, 1, base, rows, right_);
      for (int64_t r = base; r < base + rows; ++r)
        for (int64_t g = 0; g < step_.groups; ++g) round(fresh(r) + g * c + begin, end - begin);
      team.meet();
      first = last;
    }
  }

  // The left halves that come from the state, or those that do not, in runs of neighbouring rows.
  void add_runs(const Team& team, size_t first, size_t last, bool from_state) const {
    const std::vector<Node>& nodes = scratch_->nodes;
    for (size_t i = first; i < last;) {
      if ((nodes[i].left < 0) != from_state) {
        ++i;
        continue;
      }
      const int64_t base = nodes[i].base;
      int64_t rows = 0;
      for (; i < last && (nodes[i].left < 0) == from_state; ++i) rows += nodes[i].rows;
      add_side(team, 0, base, rows, left_);
    }
  }

  // RMSNorm of one vector, a copy where there is none.
  void normalize(const float* from, const void* weight, float eps, float* to) const {
    if (!weight) {
      std::copy(from, from + e_, to);
      return;
    }
    load(weight, step_.type, 0, e_, to);
    const float factor = 1.0f / std::sqrt(sum_of_squares(from, e_) / static_cast<float>(e_) + eps);
    for (int64_t i = 0; i < e_; ++i) to[i] *= from[i] * factor;
  }

  // Rows of `from` [rows, in] through a linear layer to `to` [rows, out], for this thread's columns.
  void linear(const Team& team, const Projection& layer, int64_t in, int64_t out, int64_t rows, const float* from,
              float* to) const {
    int64_t begin, end;
    team.share(out, kUnit, &begin, &end);
    if (begin == end) return;
    for (int64_t r = 0; r < rows; ++r) load(layer.bias, step_.type, begin, end - begin, to + r * out + begin);
    add_out_major({layer.weight, step_.type, in}, in, begin, end, rows, from, in, to, out);
  }

  void project(const Team& team) const {
    const int64_t rows = count_ + rows_ * step_.bank;
    // The state keeps q and v of nodes; those of tokens are for their own step only.
    if (step_.y) {
      linear(team, step_.query, e_, e_, rows, vectors_, query_);
      linear(team, step_.value, e_, e_, rows, vectors_, value_);
      linear(team, step_.key, e_, e_, count_, vectors_, key_);
    } else {
      const int64_t skip = count_ * e_;
      linear(team, step_.query, e_, e_, rows - count_, vectors_ + skip, query_ + skip);
      linear(team, step_.value, e_, e_, rows - count_, vectors_ + skip, value_ + skip);
    }
    if (step_.state_type == Type::f32) return;
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    for (int64_t r = count_; r < rows; ++r) {
      round(query_ + r * e_ + begin, end - begin);
      round(value_ + r * e_ + begin, end - begin);
    }
  }

  // Where the newest node of a level stood at a token: its first row among the new nodes, or -1 for the state.
  int64_t newest(int64_t token, int64_t level) const { return level > highest_ ? -1 : newest_[token][level]; }

  void attend(const Team& team) const {
    thread_local Slots slots;
    const int64_t size = e_ / step_.heads;
    int64_t begin, end;
    team.share(count_ * step_.heads, 1, &begin, &end);
    for (int64_t pair = begin; pair < end;) {
      const int64_t t = pair / step_.heads, head = pair % step_.heads;
      const int64_t heads = std::min(end - pair, step_.heads - head);
      gather(t, head * size, heads * size, &slots);
      const int64_t found = static_cast<int64_t>(slots.query.size());
      for (int64_t h = head; h < head + heads; ++h)
        attend_head(slots.query.data(), slots.value.data(), found, (h - head) * size, size,
                    1.0f / std::sqrt(static_cast<float>(size)), key_ + t * e_ + h * size, slots.weight.data(),
                    mixed_ + t * e_ + h * size);
      pair += heads;
    }
  }

  // Points at the features from ... from+size-1 of q and v of every slot of a token.
  void gather(int64_t t, int64_t from, int64_t size, Slots* slots) const {
    const Token& token = tokens_[t];
    const int64_t levels = std::min(valid_levels(token.position), step_.levels);
    const int64_t count = 1 + state_rows(levels, step_.expand) * step_.bank;
    slots->query.resize(count);
    slots->value.resize(count);
    slots->weight.resize(count + 8);
    const bool narrow = step_.state_type != Type::f32;
    float* wide = narrow ? Scratch::sized(slots->wide, 2 * count * size) : nullptr;
    const float **query = slots->query.data(), **value = slots->value.data();
    *query++ = query_ + t * e_ + from;
    *value++ = value_ + t * e_ + from;
    for (int64_t level = 1; level <= levels; ++level) {
      const int64_t rows = stack_height(level, step_.expand) * step_.bank, base = newest(t, level);
      if (base >= 0) {
        const int64_t row = (count_ + base * step_.bank) * e_ + from;
        for (int64_t r = 0; r < rows; ++r) {
          *query++ = query_ + row + r * e_;
          *value++ = value_ + row + r * e_;
        }
        continue;
      }
      const int64_t kept = token.slot * step_.slot_nodes + state_rows(level - 1, step_.expand) * wide_ + from;
      for (int64_t r = 0; r < rows; ++r) {
        if (narrow) {
          load(step_.q, step_.state_type, kept + r * e_, size, wide);
          load(step_.v, step_.state_type, kept + r * e_, size, wide + size);
          *query++ = wide;
          *value++ = wide + size;
          wide += 2 * size;
        } else {
          *query++ = static_cast<const float*>(step_.q) + kept + r * e_;
          *value++ = static_cast<const float*>(step_.v) + kept + r * e_;
        }
      }
    }
  }

  void finish(const Team& team) const {
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    linear(team, step_.out, e_, e_, count_, mixed_, result_);
    if (step_.mixing_norm) add(input_, begin, end);
    if (step_.feedforward_norm) feed_forward(team);
    for (int64_t t = 0; t < count_; ++t)
      store(result_ + t * e_ + begin, end - begin, step_.type, step_.y, tokens_[t].target + begin);
  }

  void add(const float* from, int64_t begin, int64_t end) const {
    for (int64_t t = 0; t < count_; ++t)
      for (int64_t i = begin; i < end; ++i) result_[t * e_ + i] += from[t * e_ + i];
  }

  void feed_forward(const Team& team) const {
    int64_t begin, end;
    team.meet();
    if (team.id == 0)
      for (int64_t t = 0; t < count_; ++t)
        normalize(result_ + t * e_, step_.feedforward_norm, step_.feedforward_eps, input_ + t * e_);
    team.meet();
    linear(team, step_.up, e_, step_.hidden, count_, input_, hidden_);
    team.share(step_.hidden, kUnit, &begin, &end);
    for (int64_t t = 0; t < count_; ++t) silu(hidden_ + t * step_.hidden + begin, end - begin);
    team.meet();
    // What the layer adds goes where the attention's output no longer is.
    linear(team, step_.down, step_.hidden, e_, count_, hidden_, mixed_);
    team.share(e_, kUnit, &begin, &end);
    add(mixed_, begin, end);
  }

  void save(const Team& team) const {
    int64_t begin, end;
    team.share(e_, kUnit, &begin, &end);
    for (int64_t t = 0; t < count_; ++t) {
      const Token& token = tokens_[t];
      for (int64_t level = 1; token.last && level <= step_.levels; ++level) {
        const int64_t base = newest(t, level);
        if (base < 0) continue;
        for (int64_t r = 0; r < stack_height(level, step_.expand) * step_.bank; ++r) {
          const int64_t to =
              token.slot * step_.slot_nodes + state_rows(level - 1, step_.expand) * wide_ + r * e_ + begin;
          const int64_t from = (base * step_.bank + r) * e_ + begin, skip = count_ * e_;
          store(vectors_ + skip + from, end - begin, step_.state_type, step_.nodes, to);
          store(query_ + skip + from, end - begin, step_.state_type, step_.q, to);
          store(value_ + skip + from, end - begin, step_.state_type, step_.v, to);
        }
      }
      if (!token.last) continue;
      store(vectors_ + t * e_ + begin, end - begin, step_.state_type, step_.token,
            token.slot * step_.slot_token + begin);
      if (team.id == 0) step_.position[token.slot] = token.position;
    }
  }

  const Step& step_;
  const Token* tokens_;
  const int64_t count_;
  Scratch* const scratch_;
  int64_t e_, wide_, rows_ = 0, highest_ = 0;
  int64_t newest_[kBlock][kMaxLevels + 1];
  float *input_, *vectors_, *query_, *value_, *key_, *mixed_, *result_, *hidden_, *left_, *right_, *taps_ = nullptr;
};

// All tokens of the rows first ... last-1, `span` tokens of each in a block.
void run_rows(const Step& step, int64_t first, int64_t last, int64_t span, int64_t threads) {
  thread_local Scratch scratch;
  Token tokens[kBlock];
  for (int64_t from = 0; from < step.tokens; from += span) {
    int64_t count = 0;
    const int64_t until = std::min(step.tokens, from + span);
    for (int64_t row = first; row < last; ++row) {
      const int64_t slot = step.slots ? step.slots[row] : row;
      if (slot < 0) continue;
      for (int64_t t = from; t < until; ++t) {
        const int64_t position = step.position[slot] + 1 + (t - from);
        tokens[count++] = {slot,
                           position,
                           std::min(completed_levels(position), step.levels),
                           row * step.row_x + t * step.token_x,
                           (row * step.tokens + t) * step.embedding,
                           t + 1 == until};
      }
    }
    if (count == 0) return;
    Block block(step, tokens, count, &scratch);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
      block.run(Team{omp_get_thread_num(), omp_get_num_threads()});
      continue;
    }
#endif
    block.run(Team{});
  }
}

}  // namespace

void step_cpu(const Step& step, int64_t threads) {
  if (step.rows == 0 || step.tokens == 0) return;
  const int64_t span = std::min(step.tokens, kBlock), rows = std::max<int64_t>(1, kBlock / span);
  const int64_t groups = (step.rows + rows - 1) / rows;
#ifdef _OPENMP
  if (omp_in_parallel()) threads = 1;
#else
  threads = 1;
#endif
  const int64_t e = step.embedding, size = step.type == Type::f32 ? 4 : 2;
  const int64_t bytes = size * (4 * e * e + 2 * step.hidden * e + 2 * step.bank * e * (step.bank * e / step.groups));
  const int64_t team = std::max<int64_t>(1, std::min(threads, bytes / kBytesPerThread));
  if (groups >= threads && threads > 1 && (team == 1 || groups >= 2 * threads)) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
#endif
    for (int64_t g = 0; g < groups; ++g) run_rows(step, g * rows, std::min(step.rows, (g + 1) * rows), span, 1);
    return;
  }
  for (int64_t g = 0; g < groups; ++g) run_rows(step, g * rows, std::min(step.rows, (g + 1) * rows), span, team);
}

}  // namespace lmn
