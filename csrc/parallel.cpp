// `build_tree` and `attend` on a CPU, forward and backward: what lmn_kernels/_cpp calls. Whoever calls an operation
// without its public function has checked nothing: what would be read or written beyond a tensor is checked here.
#include "parallel.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/attention.h"
#include "cpu/tree.h"
#include "rows.h"

namespace lmn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, name, ": expected dtype float32 or bfloat16, got ",
                   dtype);
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, ": expected device cpu, got ", tensor.device());
  return dtype == at::kFloat ? Type::f32 : Type::bf16;
}

// `base` is the first row of each level and, last, of the unused ones.
struct Layout {
  Rows rows;
  std::vector<int64_t> base, place;
  std::vector<Span> spans;
  bool covers = true;  // whether every row of x is one of a sequence
};

std::unique_ptr<Layout> make_layout(const OptionalTensor& spans, int64_t tokens, int64_t sequences, int64_t expand,
                                    int64_t levels, std::optional<int64_t> carried, int64_t rows,
                                    std::vector<int64_t> base) {
  auto layout = std::make_unique<Layout>();
  Layout& found = *layout;
  found.base = std::move(base);
  found.rows = {tokens, sequences, expand, levels, carried.value_or(-1), rows, found.base.data(), nullptr, nullptr};
  TORCH_CHECK_VALUE(levels >= 0 && levels < 62 && static_cast<int64_t>(found.base.size()) == levels + 2,
                    "levels: expected 0 ... 61, and the first rows of as many and two more, got ", levels, " and ",
                    found.base.size());
  found.spans.reserve(static_cast<size_t>(sequences));
  int64_t covered = 0, end = 0;
  if (spans) {
    check_shape("spans", *spans, {sequences, 3});
    check_dtype("spans", *spans, at::kLong);
    const Tensor given = spans->cpu().contiguous();
    const int64_t* span = given.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < sequences; ++s, span += 3) {
      const auto [start, length, offset] = std::tie(span[0], span[1], span[2]);
      TORCH_CHECK_VALUE(start >= 0 && length >= 0 && start <= tokens - length, "spans: expected rows of 0 ... ",
                        tokens - 1, ", got ", length, " from ", start, " on");
      // A compiled stream may run beyond the room of its state: what is absent then counts as zero, and the layer says
      // that the result is no number.
      TORCH_CHECK_VALUE(offset >= 0 && (offset == 0 || carried), "spans: expected an offset of 0 where nothing is ",
                        "carried, else of at least 0, got ", offset);
      found.spans.push_back({start, length, offset});
      found.covers = found.covers && start >= end;
      covered += length;
      end = start + length;
    }
    found.covers = found.covers && covered == tokens;
  } else {
    const int64_t length = sequences ? tokens / sequences : 0;
    for (int64_t s = 0; s < sequences; ++s) found.spans.push_back({s * length, length, 0});
  }
  found.rows.spans = found.spans.data();
  found.place.reserve(static_cast<size_t>((levels + 1) * (sequences + 1)));
  for (int64_t level = 0; level <= levels; ++level) {
    int64_t count = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      found.place.push_back(count);
      count += found.rows.last(level, s) - found.rows.first(level, s);
    }
    found.place.push_back(count);
    TORCH_CHECK_VALUE(level == 0 || count * found.rows.height(level) <= found.base[level + 1] - found.base[level],
                      "spans: expected at most ", found.base[level + 1] - found.base[level], " rows of nodes of level ",
                      level, ", got ", count * found.rows.height(level));
  }
  found.rows.place = found.place.data();
  TORCH_CHECK_VALUE(found.base.back() <= found.rows.carry_base(), "rows: expected room for ", found.base.back(),
                    " and what is carried, got ", rows);
  return layout;
}

Attention describe(const Rows& rows, const Tensor& token_qkv, const Tensor& node_qv, int64_t heads) {
  Attention call{};
  call.rows = &rows;
  call.type = type_of("token_qkv", token_qkv);
  call.size = token_qkv.size(1) / 3;
  call.heads = heads;
  call.bank = node_qv.size(0);
  check_shape("token_qkv", token_qkv, {rows.tokens, 3 * call.size});
  check_dtype("node_qv", node_qv, token_qkv.scalar_type());
  check_shape("node_qv", node_qv, {-1, rows.rows, 2 * call.size});
  TORCH_CHECK_VALUE(heads > 0 && call.size % heads == 0, "heads: expected a divisor of ", call.size, ", got ", heads);
  call.scale = 1.0f / std::sqrt(static_cast<float>(call.size / heads));
  call.token_qkv = token_qkv.const_data_ptr();
  call.node_qv = node_qv.const_data_ptr();
  return call;
}

const AttentionKernels*& chosen() {
  static const AttentionKernels* kernels = attention_kernels().back();
  return kernels;
}

// For tests, which so run what other processors would.
std::string use_instruction_set(const std::string& set) {
  std::string known;
  for (const AttentionKernels* kernels : attention_kernels()) {
    if (kernels->set == set) return std::exchange(chosen(), kernels)->set;
    known += (known.empty() ? "" : ", ") + std::string(kernels->set);
  }
  TORCH_CHECK_VALUE(false, "set: expected one of ", known, ", got ", set);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const AttentionKernels* kernels : attention_kernels()) found.emplace_back(kernels->set);
  return found;
}

// A thread's own space, kept from call to call.
void* scratch_of(int64_t bytes) {
  thread_local std::vector<double> space;
  const size_t size = static_cast<size_t>(bytes + 7) / 8;
  if (space.size() < size) space.resize(size);
  return space.data();
}

std::tuple<Tensor, Tensor> attend(const Tensor& token_qkv, const Tensor& node_qv, int64_t heads, const Layout& layout) {
  const Rows& rows = layout.rows;
  const Tensor tokens = token_qkv.contiguous(), nodes = node_qv.contiguous();
  Attention call = describe(rows, tokens, nodes, heads);
  const auto make = [&](at::IntArrayRef sizes, const at::TensorOptions& options) {
    return layout.covers ? at::empty(sizes, options) : at::zeros(sizes, options);
  };
  Tensor out = make({rows.tokens, call.size}, tokens.options());
  Tensor lse = make({rows.tokens, heads}, tokens.options().dtype(at::kFloat));
  call.out = out.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<float>();
  if (call.size == 0) return {out, lse};
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < rows.sequences; ++s) {
    const Span& span = rows.spans[s];
    if (span.length == 0) continue;
    for (int64_t c = (span.offset + 1) / kChunk; c <= (span.offset + span.length) / kChunk; ++c)
      chunks.push_back({s, c});
  }
  const AttentionKernels& kernels = *chosen();
  const int64_t bytes = kernels.bytes(call);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    void* scratch = scratch_of(bytes);
    for (int64_t i = begin; i < end; ++i) kernels.forward(call, chunks[i], scratch);
  });
  return {out, lse};
}

// Zero where no position reads a node's gradient: rows behind a level's nodes, and what is carried but not read.
void clear_unread(const Rows& rows, Tensor& grad_nodes) {
  for (int64_t level = 1; level <= rows.levels; ++level)
    if (rows.end(level) < rows.base[level + 1]) grad_nodes.slice(1, rows.end(level), rows.base[level + 1]).zero_();
  grad_nodes.slice(1, rows.unused()).zero_();
}

std::tuple<Tensor, Tensor> attend_backward(const Tensor& grad, const Tensor& token_qkv, const Tensor& node_qv,
                                           const Tensor& lse, int64_t heads, const Layout& layout) {
  const Rows& rows = layout.rows;
  const Tensor tokens = token_qkv.contiguous(), nodes = node_qv.contiguous(), upstream = grad.contiguous();
  Attention call = describe(rows, tokens, nodes, heads);
  check_dtype("grad", upstream, tokens.scalar_type());
  check_shape("grad", upstream, {rows.tokens, call.size});
  check_dtype("lse", lse, at::kFloat);
  check_shape("lse", lse, {rows.tokens, heads});
  Tensor normalizers = lse.contiguous();
  Tensor grad_tokens = layout.covers ? at::empty_like(tokens) : at::zeros_like(tokens);
  Tensor grad_nodes = at::empty_like(nodes);
  clear_unread(rows, grad_nodes);
  call.lse = const_cast<float*>(normalizers.const_data_ptr<float>());
  call.grad = upstream.const_data_ptr();
  call.grad_tokens = grad_tokens.mutable_data_ptr();
  call.grad_nodes = grad_nodes.mutable_data_ptr();
  if (call.size == 0) return {grad_tokens, grad_nodes};
  // Heads are split where there are too few sequences for all threads.
  const int64_t threads = at::get_num_threads(), each = std::max<int64_t>(rows.sequences, 1);
  const int64_t parts = std::min(heads, (threads + each - 1) / each);
  const AttentionKernels& kernels = *chosen();
  const int64_t bytes = kernels.bytes(call);
  at::parallel_for(0, rows.sequences * parts, 1, [&](int64_t begin, int64_t end) {
    void* scratch = scratch_of(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      kernels.backward(call, i / parts, heads * part / parts, heads * (part + 1) / parts, scratch);
    }
  });
  return {grad_tokens, grad_nodes};
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

void check_tree(const Rows& rows, const Tensor& x, const LinearMerge& merge, const OptionalTensor& token) {
  type_of("x", x);
  check_shape("x", x, {rows.tokens, -1});
  const int64_t groups = merge.weight.size(0), features = merge.weight.size(3), size = x.size(1);
  TORCH_CHECK_VALUE(features == size || (groups == 1 && size && features % size == 0),
                    "weight: expected ", size, " features a group, or one group of a multiple, got ", groups, " of ",
                    features);
  check_dtype("weight", merge.weight, x.scalar_type());
  check_shape("weight", merge.weight, {groups, 1 + rows.expand, merge.scale ? features : 2 * features, features});
  check_dtype("bias", merge.bias, x.scalar_type());
  check_shape("bias", merge.bias, {groups, features});
  if (merge.scale) {
    check_dtype("scale", *merge.scale, x.scalar_type());
    check_shape("scale", *merge.scale, {2, groups, features});
  }
  TORCH_CHECK_VALUE(token.has_value() == (rows.carried >= 0), "token: expected one of sequences that continue alone");
  if (!token) return;
  check_dtype("token", *token, x.scalar_type());
  check_shape("token", *token, {rows.sequences, size});
}

Tensor tree(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
            const OptionalTensor& token, const OptionalTensor& carried, const Layout& layout) {
  const Rows& rows = layout.rows;
  const at::AutoDispatchBelowADInplaceOrView below;
  const LinearMerge merge{weight, bias, scale};
  check_tree(rows, x, merge, token);
  return build_tree(x.contiguous(), merge, dense(token), carried, rows);
}

TreeGradients tree_backward(const Tensor& grad, const Tensor& x, const Tensor& nodes, const Tensor& weight,
                            const Tensor& bias, const OptionalTensor& scale, const OptionalTensor& token,
                            const Layout& layout) {
  const Rows& rows = layout.rows;
  const at::AutoDispatchBelowADInplaceOrView below;
  const LinearMerge merge{weight, bias, scale};
  check_tree(rows, x, merge, token);
  check_dtype("nodes", nodes, x.scalar_type());
  check_shape("nodes", nodes, {-1, rows.rows, x.size(1)});
  check_dtype("grad", grad, x.scalar_type());
  check_shape("grad", grad, {nodes.size(0), rows.rows, x.size(1)});
  return build_tree_backward(grad, x.contiguous(), nodes.contiguous(), merge, dense(token), rows);
}

}  // namespace

void define_parallel(py::module_& m) {
  using gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Layout>(m, "Layout").def(py::init(&make_layout));
  m.def("build_tree", tree, gil());
  m.def("build_tree_backward", tree_backward, gil());
  m.def("instruction_sets", instruction_sets, "Those that attention can use here; by itself it uses the last.");
  m.def("use_instruction_set", use_instruction_set, "Use another one from here on; returns the one before.");
  m.def("attend", attend, gil());
  m.def("attend_backward", attend_backward, gil());
}

}  // namespace lmn
