#include "tree.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace lmn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows that one product takes: what a thread computes does not depend on how many there are.
constexpr int64_t kBlockRows = 2048;
// Rows whose sum is a number of its own.
constexpr int64_t kSumRows = 256;

LMN_INLINE float wide(float value) { return value; }
LMN_INLINE float wide(at::BFloat16 value) { return widen(value.x); }
LMN_INLINE void assign(float* to, float value) { *to = value; }
LMN_INLINE void assign(at::BFloat16* to, float value) { to->x = narrow(value); }

// task(0 … count-1), each on one thread: a library's product must not be shared out among several in a way that
// depends on their number.
template <class F>
void run_tasks(int64_t count, const F& task) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  // Also a single one in a region of several threads, where the library starts none of its own.
  at::parallel_for(0, std::max(count, threads), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t i = begin; i < std::min(end, count); ++i) task(i);
  });
}

// f(begin, end) over parts of 0 … count-1, where there is enough work for several threads.
template <class F>
void share(int64_t count, int64_t each, const F& f) {
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(each, 1)), f);
}

template <class T>
struct Level {
  int64_t number, places, below, height;  // of its nodes: how many, and rows of a child and of itself
  int64_t row;                            // of its first node
  bool ordered;                           // whether its children lie in order, one row each
  int64_t source;                         // row of the first of them, where they do
  std::vector<int64_t> children;          // rows of left and right ones, where they do not
};

// A tree's sizes, and how rows become what a product takes.
template <class T>
class Tree {
 public:
  Tree(const Tensor& x, const LinearMerge& merge, const Rows& rows)
      : rows_(rows), options_(x.options()), size_(x.size(1)), groups_(merge.weight.size(0)),
        features_(merge.weight.size(3)), taps_(merge.weight.size(1)), inputs_(merge.weight.size(2)),
        bank_(size_ ? groups_ * features_ / size_ : groups_), scaled_(merge.scale.has_value()) {
    // [G, R, (1+k)·C]: one product for all taps.
    weight_ = merge.weight.transpose(1, 2).contiguous();
    bias_ = merge.bias.contiguous();
    if (scaled_) scale_ = merge.scale->contiguous();
  }

  bool plain() const { return taps_ == 1 && groups_ == bank_; }
  int64_t product_size() const { return taps_ * features_; }

  Level<T> level(int64_t number) const {
    Level<T> level{number, rows_.before(number, rows_.sequences), rows_.height(number - 1), rows_.height(number),
                   rows_.base[number], false, 0, {}};
    if (plain() && !scaled_) {
      level.ordered = true;
      int64_t next = -1;
      for (int64_t s = 0; level.ordered && s < rows_.sequences; ++s) {
        const int64_t first = rows_.first(number, s), count = rows_.last(number, s) - first;
        if (count == 0) continue;
        const int64_t row = rows_.row(number - 1, s, 2 * first);
        if (next < 0) level.source = next = row;
        level.ordered = row >= 0 && row == next && rows_.row(number - 1, s, 2 * first + 1) == row + 1;
        next = row + 2 * count;
      }
      if (level.ordered) return level;
    }
    level.children.reserve(static_cast<size_t>(2 * level.places));
    for (int64_t s = 0; s < rows_.sequences; ++s)
      for (int64_t i = 2 * rows_.first(number, s); i < 2 * rows_.last(number, s); ++i) {
        const int64_t row = rows_.row(number - 1, s, i);
        level.children.push_back(row < 0 ? rows_.rows - 1 : row);  // absent: beyond the room for what is carried
      }
    return level;
  }

  Tensor matrix(T* from, int64_t rows, int64_t columns) const {
    return at::from_blob(from, {rows, columns}, options_);
  }

  T* weight(int64_t group) const { return weight_.template mutable_data_ptr<T>() + group * inputs_ * product_size(); }

  // Pairs of children, [G, places · below, R].
  void gather(const Level<T>& level, const T* x, const T* token, const T* nodes, T* to) const {
    const int64_t pairs = level.places * level.below;
    share(level.places, 2 * level.below * bank_ * size_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t e = 0; e < level.below; ++e)
          for (int64_t b = 0; b < bank_; ++b) {
            const T* left = child(level, 2 * p, e, b, x, token, nodes);
            const T* right = child(level, 2 * p + 1, e, b, x, token, nodes);
            T* row = to + place(b, p * level.below + e, pairs);
            if (!scaled_) {
              std::copy(left, left + size_, row);
              std::copy(right, right + size_, row + features_);
              continue;
            }
            const T *l = scale_.template const_data_ptr<T>() + b * size_, *r = l + groups_ * features_;
            for (int64_t i = 0; i < size_; ++i)
              assign(row + i, wide(l[i]) * wide(left[i]) + wide(r[i]) * wide(right[i]));
          }
    });
  }

  // What the taps of a product [G, places · below, (1+k)·C] give for the nodes of a level.
  void fold(const Level<T>& level, const T* from, T* nodes) const {
    const int64_t pairs = level.places * level.below, n = product_size();
    const T* bias = bias_.template const_data_ptr<T>();
    share(level.places, level.height * taps_ * bank_ * size_, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(static_cast<size_t>(size_));
      for (int64_t p = begin; p < end; ++p)
        for (int64_t h = 0; h < level.height; ++h)
          for (int64_t b = 0; b < bank_; ++b) {
            for (int64_t i = 0; i < size_; ++i) sum[i] = wide(bias[b * size_ + i]);
            for (int64_t tap = std::max<int64_t>(0, h - level.below + 1); tap < taps_ && tap <= h; ++tap) {
              const T* row = from + tapped(b, p * level.below + h - tap, pairs, n) + tap * features_;
              for (int64_t i = 0; i < size_; ++i) sum[i] += wide(row[i]);
            }
            T* to = nodes + (b * rows_.rows + level.row + p * level.height + h) * size_;
            for (int64_t i = 0; i < size_; ++i) assign(to + i, sum[i]);
          }
    });
  }

  // The gradient of `fold`: [G, places · below, (1+k)·C].
  void unfold(const Level<T>& level, const T* grad, T* to) const {
    const int64_t pairs = level.places * level.below, n = product_size();
    share(level.places, level.below * taps_ * bank_ * size_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t e = 0; e < level.below; ++e)
          for (int64_t tap = 0; tap < taps_; ++tap)
            for (int64_t b = 0; b < bank_; ++b) {
              const T* from = grad + (b * rows_.rows + level.row + p * level.height + e + tap) * size_;
              std::copy(from, from + size_, to + tapped(b, p * level.below + e, pairs, n) + tap * features_);
            }
    });
  }

  // Adds the gradient of `gather` to that of what it read.
  void scatter(const Level<T>& level, const T* grad, T* x, T* token, T* nodes) const {
    const int64_t pairs = level.places * level.below;
    share(level.places, 2 * level.below * bank_ * size_, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(static_cast<size_t>(size_));
      for (int64_t p = begin; p < end; ++p)
        for (int64_t e = 0; e < level.below; ++e)
          for (int64_t side = 0; side < 2; ++side) {
            // All banks read the same token.
            const int64_t together = level.number == 1 ? bank_ : 1;
            for (int64_t b = 0; b < bank_; b += together) {
              T* to = const_cast<T*>(child(level, 2 * p + side, e, b, x, token, nodes));
              for (int64_t i = 0; i < size_; ++i) sum[i] = wide(to[i]);
              for (int64_t each = b; each < b + together; ++each) {
                const T* from = grad + place(each, p * level.below + e, pairs) + (scaled_ ? 0 : side * features_);
                if (scaled_) {
                  const T* scale = scale_.template const_data_ptr<T>() + side * groups_ * features_ + each * size_;
                  for (int64_t i = 0; i < size_; ++i) sum[i] += wide(scale[i]) * wide(from[i]);
                } else {
                  for (int64_t i = 0; i < size_; ++i) sum[i] += wide(from[i]);
                }
              }
              for (int64_t i = 0; i < size_; ++i) assign(to + i, sum[i]);
            }
          }
    });
  }

  // Adds to that of the scale: of each side, the sum of children times the gradient of the pair that they make.
  void add_scale_grad(const Level<T>& level, const T* grad, const T* x, const T* token, const T* nodes,
                      float* to) const {
    const int64_t pairs = level.places * level.below;
    std::vector<float> sum(static_cast<size_t>(size_));
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t b = 0; b < bank_; ++b)
        for (int64_t from = 0; from < level.places; from += kSumRows) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (int64_t p = from; p < std::min(level.places, from + kSumRows); ++p)
            for (int64_t e = 0; e < level.below; ++e) {
              const T* row = child(level, 2 * p + side, e, b, x, token, nodes);
              const T* slope = grad + place(b, p * level.below + e, pairs);
              for (int64_t i = 0; i < size_; ++i) sum[i] += wide(row[i]) * wide(slope[i]);
            }
          for (int64_t i = 0; i < size_; ++i) to[side * groups_ * features_ + b * size_ + i] += sum[i];
        }
  }

  void add_bias_grad(const Level<T>& level, const T* grad, float* to) const {
    std::vector<float> sum(static_cast<size_t>(size_));
    const int64_t count = level.places * level.height;
    for (int64_t b = 0; b < bank_; ++b)
      for (int64_t from = 0; from < count; from += kSumRows) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        const T* row = grad + (b * rows_.rows + level.row + from) * size_;
        for (int64_t r = from; r < std::min(count, from + kSumRows); ++r, row += size_)
          for (int64_t i = 0; i < size_; ++i) sum[i] += wide(row[i]);
        for (int64_t i = 0; i < size_; ++i) to[b * size_ + i] += sum[i];
      }
  }

  const Rows& rows_;
  const at::TensorOptions options_;
  const int64_t size_, groups_, features_, taps_, inputs_, bank_;
  const bool scaled_;
  Tensor weight_, bias_, scale_;

 private:
  const T* child(const Level<T>& level, int64_t number, int64_t entry, int64_t bank, const T* x, const T* token,
                 const T* nodes) const {
    const int64_t row = level.children[number];
    if (level.number > 1) return nodes + (bank * rows_.rows + std::min(row + entry, rows_.rows - 1)) * size_;
    return row < rows_.tokens ? x + row * size_ : token + (row - rows_.tokens) * size_;
  }

  // Where a bank's features of a row begin in [G, rows, R] and in [G, rows, n].
  int64_t place(int64_t bank, int64_t row, int64_t rows) const {
    return groups_ == bank_ ? (bank * rows + row) * inputs_ : row * inputs_ + bank * size_;
  }
  int64_t tapped(int64_t bank, int64_t row, int64_t rows, int64_t n) const {
    return groups_ == bank_ ? (bank * rows + row) * n : row * n + bank * size_;
  }
};

// Space for what is gathered, kept from level to level.
template <class T>
T* sized(Tensor& space, int64_t size, const at::TensorOptions& options) {
  if (!space.defined() || space.numel() < size) space = at::empty({size}, options);
  return space.mutable_data_ptr<T>();
}

int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

template <class T>
Tensor build(const Tensor& x, const LinearMerge& merge, const OptionalTensor& token, const OptionalTensor& carried,
             const Rows& rows) {
  const Tree<T> tree(x, merge, rows);
  Tensor nodes = at::empty({tree.bank_, rows.rows, tree.size_}, x.options());
  for (int64_t level = 1; level <= rows.levels; ++level)
    if (rows.end(level) < rows.base[level + 1]) nodes.slice(1, rows.end(level), rows.base[level + 1]).zero_();
  nodes.slice(1, rows.unused()).zero_();
  if (carried)
    nodes.slice(1, rows.carry_base(), rows.rows - 1).copy_(carried->flatten(0, 1).transpose(0, 1));
  T* data = nodes.mutable_data_ptr<T>();
  const T* input = x.const_data_ptr<T>();
  const T* before = token ? token->const_data_ptr<T>() : nullptr;
  Tensor gathered, product;
  for (int64_t number = 1; number <= rows.levels; ++number) {
    const Level<T> level = tree.level(number);
    if (level.places == 0) continue;
    const int64_t pairs = level.places * level.below, n = tree.product_size();
    T* from = nullptr;
    if (!level.ordered) {
      from = sized<T>(gathered, tree.groups_ * pairs * tree.inputs_, x.options());
      tree.gather(level, input, before, data, from);
    }
    T* out = tree.plain() ? nullptr : sized<T>(product, tree.groups_ * pairs * n, x.options());
    const int64_t blocks = blocks_of(pairs);
    run_tasks(tree.groups_ * blocks, [&](int64_t task) {
      const int64_t g = task / blocks, first = task % blocks * kBlockRows, count = std::min(kBlockRows, pairs - first);
      T* pair = from ? from + (g * pairs + first) * tree.inputs_
                : number == 1 ? const_cast<T*>(input) + (level.source + 2 * first) * tree.size_
                              : data + (g * rows.rows + level.source + 2 * first) * tree.size_;
      const Tensor a = tree.matrix(pair, count, tree.inputs_), w = tree.matrix(tree.weight(g), tree.inputs_, n);
      if (out) {
        Tensor to = tree.matrix(out + (g * pairs + first) * n, count, n);
        at::mm_out(to, a, w);
      } else {
        Tensor to = tree.matrix(data + (g * rows.rows + level.row + first) * tree.size_, count, n);
        at::addmm_out(to, tree.bias_[g], a, w);
      }
    });
    if (out) tree.fold(level, out, data);
  }
  return nodes;
}

template <class T>
TreeGradients differentiate(const Tensor& grad, const Tensor& x, const Tensor& nodes, const LinearMerge& merge,
                            const OptionalTensor& token, const Rows& rows) {
  const Tree<T> tree(x, merge, rows);
  const at::TensorOptions wide_options = x.options().dtype(at::kFloat);
  const int64_t n = tree.product_size();
  Tensor total = grad.clone(at::MemoryFormat::Contiguous);
  Tensor grad_x = at::zeros(x.sizes(), x.options());
  Tensor grad_weight = at::zeros({tree.groups_, tree.inputs_, n}, wide_options);
  Tensor grad_bias = at::zeros(merge.bias.sizes(), wide_options), grad_scale;
  if (tree.scaled_) grad_scale = at::zeros(merge.scale->sizes(), wide_options);
  OptionalTensor grad_token;
  if (token) grad_token = at::zeros(token->sizes(), x.options());
  T *sums = total.mutable_data_ptr<T>(), *to_x = grad_x.mutable_data_ptr<T>();
  T *read = const_cast<T*>(nodes.const_data_ptr<T>()), *input = const_cast<T*>(x.const_data_ptr<T>());
  const T* before = token ? token->const_data_ptr<T>() : nullptr;
  T* to_token = token ? grad_token->mutable_data_ptr<T>() : nullptr;
  Tensor gathered, unfolded, slopes, parts;
  for (int64_t number = rows.levels; number >= 1; --number) {
    const Level<T> level = tree.level(number);
    if (level.places == 0) continue;
    const int64_t pairs = level.places * level.below;
    tree.add_bias_grad(level, sums, grad_bias.mutable_data_ptr<float>());
    T *from = nullptr, *taps = nullptr, *slope = nullptr;
    if (!level.ordered) {
      from = sized<T>(gathered, tree.groups_ * pairs * tree.inputs_, x.options());
      tree.gather(level, input, before, read, from);
      slope = sized<T>(slopes, tree.groups_ * pairs * tree.inputs_, x.options());
    }
    if (!tree.plain()) {
      taps = sized<T>(unfolded, tree.groups_ * pairs * n, x.options());
      tree.unfold(level, sums, taps);
    }
    // As many blocks at a time as there are threads, added up in the order of the blocks.
    const int64_t blocks = blocks_of(pairs), wave = std::min<int64_t>(blocks, at::get_num_threads());
    T* part = sized<T>(parts, wave * tree.groups_ * tree.inputs_ * n, x.options());
    for (int64_t done = 0; done < blocks; done += wave) {
      const int64_t taken = std::min(wave, blocks - done);
      run_tasks(taken, [&](int64_t task) {
        const int64_t first = (done + task) * kBlockRows, count = std::min(kBlockRows, pairs - first);
        for (int64_t g = 0; g < tree.groups_; ++g) {
          T* above = taps ? taps + (g * pairs + first) * n : sums + (g * rows.rows + level.row + first) * n;
          const Tensor w = tree.matrix(tree.weight(g), tree.inputs_, n), s = tree.matrix(above, count, n);
          T* pair = from ? from + (g * pairs + first) * tree.inputs_
                    : number == 1 ? input + (level.source + 2 * first) * tree.size_
                                  : read + (g * rows.rows + level.source + 2 * first) * tree.size_;
          Tensor product = tree.matrix(part + (task * tree.groups_ + g) * tree.inputs_ * n, tree.inputs_, n);
          at::mm_out(product, tree.matrix(pair, count, tree.inputs_).t(), s);
          if (slope) {
            Tensor to = tree.matrix(slope + (g * pairs + first) * tree.inputs_, count, tree.inputs_);
            at::mm_out(to, s, w.t());
          } else {
            T* below = number == 1 ? to_x + (level.source + 2 * first) * tree.size_
                                   : sums + (g * rows.rows + level.source + 2 * first) * tree.size_;
            tree.matrix(below, count, tree.inputs_).addmm_(s, w.t());
          }
        }
      });
      for (int64_t task = 0; task < taken; ++task) {
        T* product = part + task * tree.groups_ * tree.inputs_ * n;
        grad_weight.add_(at::from_blob(product, grad_weight.sizes(), x.options()));
      }
    }
    if (!slope) continue;
    tree.scatter(level, slope, to_x, to_token, sums);
    if (tree.scaled_) tree.add_scale_grad(level, slope, input, before, read, grad_scale.mutable_data_ptr<float>());
  }
  Tensor weight = at::empty(merge.weight.sizes(), x.options());
  weight.copy_(grad_weight.unflatten(2, {tree.taps_, tree.features_}).transpose(1, 2));
  OptionalTensor scale, carried;
  if (tree.scaled_) scale = grad_scale.to(x.scalar_type());
  if (token) {
    const Tensor kept = total.slice(1, rows.carry_base(), rows.rows - 1).transpose(0, 1);
    carried = at::empty({rows.sequences, rows.carry_rows(), tree.bank_, tree.size_}, x.options());
    carried->copy_(kept.reshape(carried->sizes()));
  }
  return {grad_x, weight, grad_bias.to(x.scalar_type()), scale, grad_token, carried};
}

}  // namespace

Tensor build_tree(const Tensor& x, const LinearMerge& merge, const OptionalTensor& token,
                  const OptionalTensor& carried, const Rows& rows) {
  return x.scalar_type() == at::kFloat ? build<float>(x, merge, token, carried, rows)
                                       : build<at::BFloat16>(x, merge, token, carried, rows);
}

TreeGradients build_tree_backward(const Tensor& grad, const Tensor& x, const Tensor& nodes, const LinearMerge& merge,
                                  const OptionalTensor& token, const Rows& rows) {
  return x.scalar_type() == at::kFloat ? differentiate<float>(grad, x, nodes, merge, token, rows)
                                       : differentiate<at::BFloat16>(grad, x, nodes, merge, token, rows);
}

}  // namespace lmn
