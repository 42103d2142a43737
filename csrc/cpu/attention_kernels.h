// Attention for one instruction set, in the namespace that LMN_SET names: the operands of a chunk of positions, and what
// is done with them forward and backward. attention*.cpp include it; attention_products.h says what may be used here.
#include "attention.h"
#include "attention_products.h"

namespace lmn::LMN_SET {
namespace {

// Space that a call's chunks take at the most, and what of it one chunk makes of it.
struct Sizes {
  int64_t size, padded, slots = 0, nodes = 0, rows = 0, transposed = 0, shared = 0;
  bool direct;

  LMN_INLINE explicit Sizes(const Attention& call) : size(call.size / call.heads), padded((size + 7) / 8 * 8) {
    direct = call.type == Type::f32 && padded == size;
    for (int64_t level = 1; level <= call.rows->levels; ++level) {
      const int64_t count = call.bank * call.rows->height(level);
      slots += count;
      nodes += count * groups(level);
      rows += groups(level);
      transposed += count * stride_of(level);
      if (level > kOneNode) shared += count;
    }
  }

  // Floats of one head's operands and results, for so many slots, nodes and transposed rows.
  LMN_INLINE int64_t copies(int64_t count) const { return direct ? 0 : (4 * kChunk + 2 * count) * padded; }
  LMN_INLINE int64_t floats(const Attention& call) const {
    const int64_t lanes = (4 * kChunk + 2 * transposed) * padded;
    const int64_t spare = call.bank * call.rows->height(kOneNode) * 2 * padded;
    return copies(nodes) + lanes + 2 * (slots + 2) * kChunk + (kChunk + 2) * padded + most(call.size, padded) + spare +
           shared * call.heads * 2 * padded;
  }
  LMN_INLINE int64_t bytes(const Attention& call) const {
    return slots * static_cast<int64_t>(sizeof(Slot)) + rows * 8 + 2 * nodes * 8 + floats(call) * 4;
  }
};

// A chunk of one head at a time: its places, the nodes that they see, and operands in float32.
class Tile {
 public:
  LMN_INLINE Tile(const Attention& call, void* scratch) : call_(call), rows_(*call.rows), sizes_(call) {
    size_ = sizes_.size;
    padded_ = sizes_.padded;
    direct_ = sizes_.direct;
    scale_ = call.scale;
    slot_ = static_cast<Slot*>(scratch);
    row_of_ = reinterpret_cast<int64_t*>(slot_ + sizes_.slots);
    queries_of_ = reinterpret_cast<const float**>(row_of_ + sizes_.rows);
    values_of_ = queries_of_ + sizes_.nodes;
    space_ = reinterpret_cast<float*>(values_of_ + sizes_.nodes);
  }

  // The nodes that a chunk's positions see.
  LMN_INLINE void place(const Chunk& chunk) {
    const Span& span = rows_.spans[chunk.sequence];
    base_ = chunk.index * kChunk;
    begin_ = most(span.offset + 1 - base_, 0);
    end_ = least(span.offset + span.length - base_ + 1, kChunk);
    token_ = span.start + base_ - span.offset - 1;
    fetched_ = -1;
    count_ = nodes_ = 0;
    int64_t transposed = 0, rows = 0;
    const int64_t levels = least(valid_levels(base_ + end_ - 1), rows_.levels);
    for (int64_t level = 1; level <= levels; ++level) {
      first_row_[level] = rows;
      for (int64_t g = 0; g < groups(level); ++g)
        row_of_[rows++] = rows_.row(level, chunk.sequence, (base_ >> level) - 1 + g);
      for (int64_t bank = 0; bank < call_.bank; ++bank)
        for (int64_t entry = 0; entry < rows_.height(level); ++entry) {
          slot_[count_++] = {level, bank, entry, nodes_, transposed, stride_of(level)};
          nodes_ += groups(level);
          transposed += stride_of(level);
        }
    }
    // Positions that no token has are computed as well, but for halves in which there is none.
    halves_ = 0;
    for (int64_t p = begin_; p < end_ && p < begin_ + kVectors; ++p) halves_ |= p % kVectors < 2 ? 1 : 2;
    // Tokens and nodes as they lie where they are not read in place, then with positions in lanes.
    float* next = space_;
    const auto take = [&](int64_t floats) LMN_LAMBDA { return next += floats, next - floats; };
    copies_ = take(sizes_.copies(nodes_));
    key_ = take(kChunk * padded_);
    own_query_ = take(kChunk * padded_);
    own_value_ = take(kChunk * padded_);
    grad_ = take(kChunk * padded_);
    query_ = take(transposed * padded_);
    value_ = take(transposed * padded_);
    score_ = take((count_ + 1) * kChunk);
    slope_ = take((count_ + 1) * kChunk);
    factor_ = take(kChunk);
    other_ = take(kChunk);
    result_ = take(kChunk * padded_);
    row_ = take(2 * padded_);
    zero_ = take(direct_ ? call_.size : padded_);
    set(zero_, direct_ ? call_.size : padded_, 0.0f);
    // Sums of nodes, which outlive a chunk, stand at the end.
    sums_ = space_ + sizes_.floats(call_) - sizes_.shared * call_.heads * 2 * padded_;
    spare_ = sums_ - call_.bank * rows_.height(kOneNode) * 2 * padded_;
  }

  LMN_INLINE void forward(int64_t head) {
    fetch(head, false);
    transpose_tokens(keys_, padded_, scale_ * kLog2E, key_);
    transpose_tokens(queries_, padded_, 1.0f, own_query_);
    transpose(queries_of_, query_);
    const int64_t count = count_;
    for (int64_t half = 0; half < 2; ++half) {
      if (!(halves_ >> half & 1)) continue;
      dots(key_, own_query_, query_, {slot_, count_}, queries_of_, padded_, 2 * half, score_);
      hide(half);
      for (int64_t at = 2 * half * kWide; at < 2 * (half + 1) * kWide; at += kWide) {
        F16 most = read<F16>(score_ + at);
        for (int64_t s = 1; s <= count; ++s) most = larger(most, read<F16>(score_ + s * kChunk + at));
        F16 sum = splat16(0.0f);
        for (int64_t s = 0; s <= count; ++s) {
          const F16 weight = exp2_of(read<F16>(score_ + s * kChunk + at) - most);
          write(score_ + s * kChunk + at, weight);
          sum += weight;
        }
        write(factor_ + at, splat16(1.0f) / sum);
        write(other_ + at, most * splat16(kLn2) + log_of(sum));
      }
    }
    mix_rows(score_, values_, values_of_, factor_);
    for (int64_t p = begin_; p < end_; ++p) {
      put(result_ + p * padded_, call_.out, (token_ + p) * call_.size + head * size_);
      call_.lse[(token_ + p) * call_.heads + head] = other_[lane(p)];
    }
  }

  // `open` and `close`: whether this is the first, and the last, chunk of the sequence.
  LMN_INLINE void backward(int64_t head, bool open, bool close) {
    fetch(head, true);
    transpose_tokens(keys_, padded_, scale_ * kLog2E, key_);
    transpose_tokens(queries_, padded_, 1.0f, own_query_);
    transpose_tokens(values_, padded_, 1.0f, own_value_);
    transpose_tokens(grads_, padded_, 1.0f, grad_);
    transpose(queries_of_, query_);
    transpose(values_of_, value_);
    const int64_t count = count_;
    set(other_, kChunk, 0.0f);
    set(factor_, kChunk, scale_);
    for (int64_t p = begin_; p < end_; ++p)
      other_[lane(p)] = call_.lse[(token_ + p) * call_.heads + head] * kLog2E;
    for (int64_t half = 0; half < 2; ++half) {
      if (!(halves_ >> half & 1)) continue;
      dots(key_, own_query_, query_, {slot_, count_}, queries_of_, padded_, 2 * half, score_);
      hide(half);
      dots(grad_, own_value_, value_, {slot_, count_}, values_of_, padded_, 2 * half, slope_);
      for (int64_t at = 2 * half * kWide; at < 2 * (half + 1) * kWide; at += kWide) {
        const F16 lse = read<F16>(other_ + at);
        F16 mean = splat16(0.0f), sum = mean;
        for (int64_t s = 0; s <= count; ++s) {
          const F16 weight = exp2_of(read<F16>(score_ + s * kChunk + at) - lse);
          write(score_ + s * kChunk + at, weight);
          mean += weight * read<F16>(slope_ + s * kChunk + at);
          sum += weight;
        }
        // The weights of a large log-sum-exp, which is rounded, do not sum to 1, and what is left of a slope is small.
        const F16 norm = splat16(1.0f) / sum;
        mean = mean * norm;
        for (int64_t s = 0; s <= count; ++s) {
          const F16 weight = read<F16>(score_ + s * kChunk + at) * norm;
          write(score_ + s * kChunk + at, weight);
          write(slope_ + s * kChunk + at, weight * (read<F16>(slope_ + s * kChunk + at) - mean));
        }
      }
    }
    // From here on `score_` holds the weights, and `slope_` the gradients of the scores.
    mix_rows(slope_, queries_, queries_of_, factor_);
    for (int64_t p = begin_; p < end_; ++p) {
      const int64_t to = (token_ + p) * 3 * call_.size + head * size_;
      put(result_ + p * padded_, call_.grad_tokens, to + call_.size);
      scaled(keys_.row[p], slope_[lane(p)] * scale_);
      put(row_, call_.grad_tokens, to);
      scaled(grads_.row[p], score_[lane(p)]);
      put(row_, call_.grad_tokens, to + 2 * call_.size);
    }
    wide() ? to_nodes<F16>(head, open, close) : to_nodes<F8>(head, open, close);
  }

 private:
  // With half as many registers of half the width, vectors of eight are better.
#ifdef __AVX512F__
  LMN_INLINE bool wide() const { return padded_ % kWide == 0; }
#else
  LMN_INLINE bool wide() const { return false; }
#endif

  LMN_INLINE void mix_rows(const float* weight, const TokenRows& own, const float* const* nodes, const float* factor) {
    wide() ? mix<F16>(weight, own, {slot_, count_}, nodes, padded_, begin_, end_, factor, result_)
           : mix<F8>(weight, own, {slot_, count_}, nodes, padded_, begin_, end_, factor, result_);
  }

  LMN_INLINE void transpose(const float* const* nodes, float* to) const {
    for (int64_t s = 0; s < count_ && slot_[s].stride; ++s)
      transpose_nodes(slot_[s], nodes + slot_[s].nodes, padded_, to + slot_[s].transposed * padded_);
  }

  // A slot counts for nothing before its first node: of the first chunk alone, as a level that is whole at its
  // first position is so at all.
  LMN_INLINE void hide(int64_t half) {
    if (base_ != 0) return;
    for (int64_t s = 0; s < count_; ++s)
      for (int64_t p = 0; p < int64_t{1} << slot_[s].level; ++p)
        if (p % kVectors / 2 == half) score_[(s + 1) * kChunk + lane(p)] = as_float(0xff800000u);
  }

  // `size_` numbers of the call's type at an element, where they are or as float32.
  LMN_INLINE const float* take(const void* from, int64_t element, float*& copy) const {
    if (direct_) return static_cast<const float*>(from) + element;
    float* to = copy;
    if (call_.type == Type::f32) {
      std::memcpy(to, static_cast<const float*>(from) + element, static_cast<size_t>(size_) * sizeof(float));
    } else {
      const uint16_t* half = static_cast<const uint16_t*>(from) + element;
      for (int64_t i = 0; i < size_; ++i) to[i] = widen(half[i]);
    }
    for (int64_t i = size_; i < padded_; ++i) to[i] = 0.0f;
    copy += padded_;
    return to;
  }

  LMN_INLINE void put(const float* from, void* to, int64_t element) const {
    if (direct_) {
      for (int64_t i = 0; i < size_; i += 8) store8(static_cast<float*>(to) + element + i, load8<F8>(from + i));
    } else if (call_.type == Type::f32) {
      std::memcpy(static_cast<float*>(to) + element, from, static_cast<size_t>(size_) * sizeof(float));
    } else {
      uint16_t* half = static_cast<uint16_t*>(to) + element;
      for (int64_t i = 0; i < size_; ++i) half[i] = narrow(from[i]);
    }
  }

  LMN_INLINE void scaled(const float* from, float factor) const {
    for (int64_t i = 0; i < padded_; i += 8) store8(row_ + i, load8<F8>(from + i) * splat(factor));
  }

  // Points at the rows of a head: those of the head before moved on, where they are read in place.
  LMN_INLINE void fetch(int64_t head, bool backward) {
    if (direct_ && fetched_ >= 0) {
      const int64_t move = (head - fetched_) * size_;
      fetched_ = head;
      for (int64_t p = 0; p < kChunk; ++p) {
        queries_.row[p] += move;
        keys_.row[p] += move;
        values_.row[p] += move;
        grads_.row[p] += move;
      }
      for (int64_t i = 0; i < nodes_; ++i) {
        queries_of_[i] += move;
        values_of_[i] += move;
      }
      return;
    }
    fetched_ = head;
    float* copy = copies_;
    const int64_t size = call_.size, from = head * size_;
    const float* zero = direct_ ? zero_ + from : zero_;
    for (int64_t p = 0; p < kChunk; ++p) {
      const bool token = p >= begin_ && p < end_;
      const int64_t element = (token_ + p) * 3 * size + from;
      queries_.row[p] = token ? take(call_.token_qkv, element, copy) : zero;
      keys_.row[p] = token ? take(call_.token_qkv, element + size, copy) : zero;
      values_.row[p] = token ? take(call_.token_qkv, element + 2 * size, copy) : zero;
      grads_.row[p] = token && backward ? take(call_.grad, (token_ + p) * size + from, copy) : zero;
    }
    for (int64_t s = 0; s < count_; ++s) {
      const Slot& slot = slot_[s];
      for (int64_t g = 0; g < groups(slot.level); ++g) {
        const int64_t row = row_of_[first_row_[slot.level] + g];
        const int64_t element = (slot.bank * rows_.rows + row + slot.entry) * 2 * size + from;
        queries_of_[slot.nodes + g] = row < 0 ? zero : take(call_.node_qv, element, copy);
        values_of_[slot.nodes + g] = row < 0 ? zero : take(call_.node_qv, element + size, copy);
      }
    }
  }

  // Gradients of the nodes that the chunk reads: stored where no other chunk reads them, else added to sums that are
  // stored behind the last one that does.
  template <class V>
  LMN_INLINE void to_nodes(int64_t head, bool open, bool close) {
    const int64_t count = count_;
    int64_t s = 0;
    for (; s < count && slot_[s].level < kOneNode; ++s) {
      const Slot& slot = slot_[s];
      const float *slope = slope_ + (s + 1) * kChunk, *score = score_ + (s + 1) * kChunk;
      for (int64_t g = 0; g < groups(slot.level); ++g) {
        const int64_t begin = most(begin_, g << slot.level), end = least(end_, (g + 1) << slot.level);
        const int64_t row = row_of_[first_row_[slot.level] + g];
        if (begin >= end || row < 0) continue;
        const int64_t to = (slot.bank * rows_.rows + row + slot.entry) * 2 * call_.size + head * size_;
        float* query = direct_ ? static_cast<float*>(call_.grad_nodes) + to : row_;
        float* value = direct_ ? query + call_.size : row_ + padded_;
        for (int64_t f = 0; f < padded_; f += width<V>()) {
          V queries = fill<V>(0.0f), values = queries;
          for (int64_t p = begin; p < end; ++p) {
            queries += fill<V>(slope[lane(p)]) * read<V>(keys_.row[p] + f);
            values += fill<V>(score[lane(p)]) * read<V>(grads_.row[p] + f);
          }
          write(query + f, queries * fill<V>(scale_));
          write(value + f, values);
        }
        if (direct_) continue;
        put(query, call_.grad_nodes, to);
        put(value, call_.grad_nodes, to + call_.size);
      }
    }
    // Slots of one node each, four at a time.
    const int64_t first = s;
    int64_t above = 0;
    while (first + above < count && slot_[first + above].level == kOneNode) ++above;
    const auto sum_of = [&](int64_t slot) LMN_LAMBDA {
      return slot < first + above ? spare_ + (slot - first) * 2 * padded_
                                  : sums_ + ((slot - first - above) * call_.heads + head) * 2 * padded_;
    };
    for (int64_t i = first; i < count; ++i) {
      const int64_t level = slot_[i].level;
      const bool begins = open || level == kOneNode || (base_ >> level) != ((base_ - kChunk) >> level);
      if (begins) set(sum_of(i), 2 * padded_, 0.0f);
    }
    for (; s < count;) {
      float *query[4], *value[4];
      const int taken = static_cast<int>(least(4, count - s));
      for (int i = 0; i < taken; ++i) {
        query[i] = sum_of(s + i);
        value[i] = query[i] + padded_;
      }
      const float *slope = slope_ + (s + 1) * kChunk, *score = score_ + (s + 1) * kChunk;
      if (taken == 4) {
        gather<V, 4>(slope, score, keys_, grads_, padded_, begin_, end_, query, value);
      } else if (taken == 3) {
        gather<V, 3>(slope, score, keys_, grads_, padded_, begin_, end_, query, value);
      } else if (taken == 2) {
        gather<V, 2>(slope, score, keys_, grads_, padded_, begin_, end_, query, value);
      } else {
        gather<V, 1>(slope, score, keys_, grads_, padded_, begin_, end_, query, value);
      }
      s += taken;
    }
    for (int64_t i = first; i < count; ++i) {
      const int64_t level = slot_[i].level;
      const bool ends = close || level == kOneNode || (base_ >> level) != ((base_ + kChunk) >> level);
      if (ends && row_of_[first_row_[level]] >= 0) store_node(slot_[i], 0, head, sum_of(i));
    }
  }

  LMN_INLINE void store_node(const Slot& slot, int64_t group, int64_t head, const float* sum) const {
    const int64_t row = row_of_[first_row_[slot.level] + group] + slot.entry;
    const int64_t to = (slot.bank * rows_.rows + row) * 2 * call_.size + head * size_;
    for (int64_t i = 0; i < padded_; i += 8) store8(result_ + i, load8<F8>(sum + i) * splat(scale_));
    put(result_, call_.grad_nodes, to);
    put(sum + padded_, call_.grad_nodes, to + call_.size);
  }

  const Attention& call_;
  const Rows& rows_;
  const Sizes sizes_;
  int64_t size_, padded_;
  bool direct_;
  float scale_;
  int64_t base_ = 0, begin_ = 0, end_ = 0, token_ = 0, halves_ = 0, fetched_ = -1;
  Slot* slot_;
  int64_t count_ = 0, nodes_ = 0;  // of slots, of their nodes
  int64_t* row_of_;                // of the nodes of a level, -1 where absent
  int64_t first_row_[64];
  const float **queries_of_, **values_of_;  // of the nodes of every slot
  TokenRows queries_, keys_, values_, grads_;
  float *space_, *copies_, *key_, *own_query_, *own_value_, *grad_, *query_, *value_, *score_, *slope_, *factor_;
  float *other_, *result_, *row_, *zero_, *sums_, *spare_;
};

int64_t bytes(const Attention& call) { return Sizes(call).bytes(call); }

void forward(const Attention& call, const Chunk& chunk, void* scratch) {
  Tile tile(call, scratch);
  tile.place(chunk);
  for (int64_t head = 0; head < call.heads; ++head) tile.forward(head);
}

void backward(const Attention& call, int64_t sequence, int64_t begin, int64_t end, void* scratch) {
  const Span& span = call.rows->spans[sequence];
  if (span.length == 0) return;
  Tile tile(call, scratch);
  const int64_t first = (span.offset + 1) / kChunk, last = (span.offset + span.length) / kChunk;
  for (int64_t index = first; index <= last; ++index) {
    tile.place({sequence, index});
    for (int64_t head = begin; head < end; ++head) tile.backward(head, index == first, index == last);
  }
}

}  // namespace

extern const AttentionKernels kernels;
const AttentionKernels kernels{LMN_SET_NAME, bytes, forward, backward};

}  // namespace lmn::LMN_SET
