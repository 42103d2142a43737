// The operations update_, decode_ and step of lmn_kernels/ops/step.py: checks, and the call of either half.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#ifdef LMN_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/step.h"
#endif

#include "checks.h"
#include "operations.h"
#include "step.h"

namespace lmn {
namespace {

Type type_of(const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype == at::kFloat) return Type::f32;
  if (dtype == at::kBFloat16) return Type::bf16;
  if (dtype == at::kHalf && tensor.is_cuda()) return Type::f16;
  TORCH_CHECK_TYPE(false, name, ": expected dtype float32 or bfloat16", tensor.is_cuda() ? " or float16" : "",
                   ", got ", dtype);
}

// A step's arguments, and the copies that keep them alive where one was not contiguous.
struct Call {
  Step step{};
  std::vector<Tensor> held;

  const void* keep(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    held.push_back(tensor.contiguous());
    return held.back().const_data_ptr();
  }
};

void describe_state(Call& call, const State& state, int64_t expand, at::Device device) {
  Step& step = call.step;
  check_dtype("state.position", state.position, at::kLong);
  check_shape("state.position", state.position, {-1});
  step.pool = state.position.size(0);
  TORCH_CHECK_VALUE(state.nodes.dim() == 4, "state.nodes: expected shape [slots, rows, bank, embedding], got ",
                    state.nodes.sizes());
  step.bank = state.nodes.size(2);
  const int64_t rows = state.nodes.size(1);
  TORCH_CHECK_VALUE(step.bank > 0 && step.embedding > 0,
                    "state.nodes: expected a bank and an embedding of at least 1, got shape ", state.nodes.sizes());
  step.expand = expand;
  while (state_rows(step.levels, expand) < rows) ++step.levels;
  TORCH_CHECK_VALUE(state_rows(step.levels, expand) == rows, "state.nodes: expected the rows of whole levels with expand=",
                    expand, ", got ", rows);
  check_shape("state.token", state.token, {step.pool, step.embedding});
  step.state_type = type_of("state.token", state.token);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"state.position", state.position},
                                     {"state.token", state.token},
                                     {"state.nodes", state.nodes},
                                     {"state.q", state.q},
                                     {"state.v", state.v}}) {
    check_device(name, tensor, device);
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
  }
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"state.nodes", state.nodes},
                                     {"state.q", state.q},
                                     {"state.v", state.v}}) {
    check_shape(name, tensor, {step.pool, rows, step.bank, step.embedding});
    check_dtype(name, tensor, state.token.scalar_type());
  }
  TORCH_CHECK_TYPE(device.is_cpu() || step.state_type == Type::f32 || step.state_type == step.type,
                   "state.token: expected dtype float32 or that of x, got ", state.token.scalar_type());
  step.slot_token = step.embedding;
  step.slot_nodes = rows * step.bank * step.embedding;
}

const void* weight(Call& call, const char* name, const Tensor& tensor, const Tensor& x,
                   std::initializer_list<int64_t> shape) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, x.scalar_type());
  check_device(name, tensor, x.device());
  return call.keep(tensor);
}

void describe_weights(Call& call, const Tensor& x, const Weights& given) {
  Step& step = call.step;
  const auto& [weights, summarizer, heads, expand, block, eps] = given;
  const int64_t e = step.embedding;
  TORCH_CHECK_VALUE(heads >= 1 && e % heads == 0, "heads: expected a divisor of embedding=", e, ", got ", heads);
  step.heads = heads;
  const bool separable = summarizer == "separable", pair = summarizer == "pair";
  TORCH_CHECK_VALUE(separable || pair || summarizer == "linear",
                    "summarizer: expected linear, pair or separable, got ", std::string(summarizer));
  const size_t plain = separable ? 11 : 10;
  TORCH_CHECK_VALUE(weights.size() == plain || weights.size() == plain + 2, "weights: expected ", plain, " or ",
                    plain + 2, " tensors, got ", weights.size());
  const char* names[] = {"q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "out_proj.weight",
                         "out_proj.bias"};
  Projection* projections[] = {&step.query, &step.key, &step.value, &step.out};
  for (int i = 0; i < 4; ++i) {
    projections[i]->weight = weight(call, names[2 * i], *weights[2 * i], x, {e, e});
    projections[i]->bias = weight(call, names[2 * i + 1], *weights[2 * i + 1], x, {e});
  }
  const Tensor &merge = *weights[8], &bias = *weights[9];
  const int64_t features = step.bank * e;
  TORCH_CHECK_VALUE(merge.dim() == 3, "summarizer.weight: expected 3 axes, got shape ", merge.sizes());
  if (pair) {
    step.merge = Merge::pair;
    const int64_t c = merge.size(1);
    TORCH_CHECK_VALUE(c > 0 && features % c == 0 && c % e == 0, "summarizer.weight: expected whole banks of ", e,
                      " features a group, got shape ", merge.sizes());
    step.groups = features / c;
    step.merge_weight = weight(call, "summarizer.weight", merge, x, {features, c, 2});
  } else {
    step.merge = separable ? Merge::separable : Merge::linear;
    step.groups = merge.size(0);
    TORCH_CHECK_VALUE(step.groups > 0 && step.bank % step.groups == 0, "summarizer.weight: expected a divisor of bank=",
                      step.bank, " groups, got shape ", merge.sizes());
    const int64_t c = features / step.groups;
    step.merge_weight = weight(call, "summarizer.weight", merge, x, {step.groups, separable ? c : 2 * c, c});
  }
  TORCH_CHECK_VALUE(bias.numel() == features, "summarizer.bias: expected ", features, " elements, got shape ",
                    bias.sizes());
  check_dtype("summarizer.bias", bias, x.scalar_type());
  check_device("summarizer.bias", bias, x.device());
  step.merge_bias = call.keep(bias);
  if (separable) {
    const Tensor& scale = *weights[10];
    TORCH_CHECK_VALUE(scale.numel() == 2 * features, "summarizer.scale: expected ", 2 * features,
                      " elements, got shape ", scale.sizes());
    check_dtype("summarizer.scale", scale, x.scalar_type());
    check_device("summarizer.scale", scale, x.device());
    step.merge_scale = call.keep(scale);
  }
  if (weights.size() > plain) {
    step.expander_weight = weight(call, "expander.weight", *weights[plain], x, {e, e, 1 + step.expand});
    step.expander_bias = weight(call, "expander.bias", *weights[plain + 1], x, {e});
  } else {
    TORCH_CHECK_VALUE(step.expand == 0, "expand: expected 0 without an expander, got ", step.expand);
  }
}

void describe_block(Call& call, const Tensor& x, Tensors block, at::ArrayRef<double> eps) {
  Step& step = call.step;
  const int64_t e = step.embedding;
  const size_t norms = block.empty() ? 0 : block.size() == 1 ? 1 : 2;
  TORCH_CHECK_VALUE(block.size() <= 1 || block.size() == 6, "block: expected 0, 1 or 6 tensors, got ", block.size());
  TORCH_CHECK_VALUE(eps.size() == norms, "eps: expected ", norms, " numbers, got ", eps.size());
  if (norms == 0) return;
  step.mixing_norm = weight(call, "norm1.weight", *block[0], x, {e});
  step.mixing_eps = static_cast<float>(eps[0]);
  if (norms == 1) return;
  step.feedforward_norm = weight(call, "norm2.weight", *block[1], x, {e});
  step.feedforward_eps = static_cast<float>(eps[1]);
  step.hidden = block[2]->dim() ? block[2]->size(0) : 0;
  const int64_t f = step.hidden;
  step.up = {weight(call, "fc1.weight", *block[2], x, {f, e}), weight(call, "fc1.bias", *block[3], x, {f})};
  step.down = {weight(call, "fc2.weight", *block[4], x, {e, f}), weight(call, "fc2.bias", *block[5], x, {e})};
}

void refuse_gradients(const Tensor& x, const State& state, const Weights& given) {
  if (!at::GradMode::is_enabled()) return;
  bool wanted = x.requires_grad() || state.token.requires_grad() || state.nodes.requires_grad() ||
                state.q.requires_grad() || state.v.requires_grad();
  for (const Tensors& list : {given.weights, given.block})
    for (const Tensor* tensor : list) wanted = wanted || tensor->requires_grad();
  TORCH_CHECK(!wanted, "the extension records no gradients: call it under torch.no_grad(), or use backend='reference'");
}

// Rows that take part name distinct slots with room for `tokens` more.
void check_rows(const Step& step) {
  thread_local std::vector<char> taken;
  if (step.slots) taken.assign(static_cast<size_t>(step.pool), 0);
  for (int64_t row = 0; row < step.rows; ++row) {
    const int64_t slot = step.slots ? step.slots[row] : row;
    if (step.slots) {
      TORCH_CHECK_VALUE(slot >= -1 && slot < step.pool, "slots: expected values in -1 ... ", step.pool - 1, ", got ",
                        slot);
      if (slot < 0) continue;
      TORCH_CHECK_VALUE(!taken[slot], "slots: expected each slot at most once, got ", slot, " twice");
      taken[slot] = 1;
    }
    const int64_t position = step.position[slot];
    TORCH_CHECK(position >= 0 && position <= capacity(step.levels) - step.tokens, "state: exhausted: slot ", slot,
                " is at position ", position, ", and its ", step.levels, " levels have room up to ",
                capacity(step.levels), "; state.with_room(n) makes more");
  }
}

void run(Call& call, [[maybe_unused]] const Tensor& x) {
  Step& step = call.step;
#ifdef LMN_CUDA
  if (x.is_cuda()) {
    if (step.rows == 0 || step.tokens == 0) return;
    const c10::cuda::CUDAGuard guard(x.device());
    // Workspace of the caching allocator: belongs to the stream, and to the graph that a capture makes.
    const Tensor space = at::empty({workspace_bytes(step)}, x.options().dtype(at::kByte));
    const char* error = step_cuda(step, space.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "lmn_kernels: a CUDA launch failed: ", error);
    return;
  }
#endif
  check_rows(step);
  step_cpu(step, at::get_num_threads());
}

// Rows of x and of a pool into a call; the tensors are checked here, values in run.
void describe(Call& call, const Tensor& x, const OptionalTensor& slots, const State& state, const Weights& given) {
  Step& step = call.step;
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected shape [batch, tokens, embedding], got ", x.sizes());
  TORCH_CHECK_VALUE(given.expand >= 0, "expand: expected a number of at least 0, got ", given.expand);
  step.rows = x.size(0);
  step.tokens = x.size(1);
  step.embedding = x.size(2);
  step.type = type_of("x", x);
  refuse_gradients(x, state, given);
  describe_state(call, state, given.expand, x.device());
  describe_weights(call, x, given);
  describe_block(call, x, given.block, given.eps);
  if (slots) {
    check_shape("slots", *slots, {step.rows});
    check_device("slots", *slots, x.device());
    TORCH_CHECK_TYPE(slots->scalar_type() == at::kLong || slots->scalar_type() == at::kInt,
                     "slots: expected dtype int32 or int64, got ", slots->scalar_type());
    call.held.push_back(slots->to(at::kLong).contiguous());
    step.slots = call.held.back().const_data_ptr<int64_t>();
  } else {
    TORCH_CHECK_VALUE(step.rows == step.pool, "x: expected a row for each of ", step.pool, " slots, got ", step.rows);
  }
  Tensor dense = x;
  // What is written must not be what is still to be read.
  const bool shared = x.numel() && (x.is_alias_of(state.token) || x.is_alias_of(state.nodes) ||
                                    x.is_alias_of(state.q) || x.is_alias_of(state.v));
  if (shared || x.stride(2) != 1) {
    dense = x.clone(at::MemoryFormat::Contiguous);
    call.held.push_back(dense);
  }
  step.x = dense.const_data_ptr();
  step.row_x = dense.stride(0);
  step.token_x = dense.stride(1);
}

void bind(Step& step, const State& state) {
  step.position = state.position.mutable_data_ptr<int64_t>();
  step.token = state.token.mutable_data_ptr();
  step.nodes = state.nodes.mutable_data_ptr();
  step.q = state.q.mutable_data_ptr();
  step.v = state.v.mutable_data_ptr();
}

void touch(const State& state) {
  for (const Tensor* tensor : {&state.position, &state.token, &state.nodes, &state.q, &state.v})
    if (!tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
}

// Without a trip through the dispatcher where there need be none: five of them are most of a small layer's step.
Tensor allocate(at::IntArrayRef sizes, const Tensor& like) {
  return like.is_cpu() ? at::detail::empty_cpu(sizes, like.options()) : at::empty(sizes, like.options());
}

Tensor copy(const Tensor& tensor) {
  if (!tensor.is_cpu() || !tensor.is_contiguous()) return tensor.clone(at::MemoryFormat::Contiguous);
  Tensor twin = allocate(tensor.sizes(), tensor);
  if (tensor.nbytes()) std::memcpy(twin.mutable_data_ptr(), tensor.const_data_ptr(), tensor.nbytes());
  return twin;
}

Tensor outputs(const Tensor& x, bool masked) {
  // Rows without a slot are written by nobody.
  return masked ? at::zeros(x.sizes(), x.options()) : allocate(x.sizes(), x);
}

// A list of the dispatcher's.
class Listed {
 public:
  explicit Listed(at::TensorList tensors) {
    for (const Tensor& tensor : tensors) pointers_.push_back(&tensor);
  }
  operator Tensors() const { return pointers_; }

 private:
  c10::SmallVector<const Tensor*, 13> pointers_;
};

}  // namespace

Tensor decode_(const Tensor& x, const OptionalTensor& slots, const State& state, const Weights& given) {
  Call call;
  describe(call, x, slots, state, given);
  bind(call.step, state);
  const Tensor y = outputs(x, slots.has_value());
  call.step.y = y.mutable_data_ptr();
  run(call, x);
  touch(state);
  return y;
}

Stepped step(const Tensor& x, const State& old, const Weights& given) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == 1, "x_t: expected shape [batch, 1, embedding], got ", x.sizes());
  refuse_gradients(x, old, given);  // the copies require none
  const Tensor advanced[] = {copy(old.position), copy(old.token), copy(old.nodes), copy(old.q), copy(old.v)};
  const State state{advanced[0], advanced[1], advanced[2], advanced[3], advanced[4]};
  Call call;
  describe(call, x, std::nullopt, state, given);
  bind(call.step, state);
  const Tensor y = outputs(x, false);
  call.step.y = y.mutable_data_ptr();
  run(call, x);
  return {y, advanced[0], advanced[1], advanced[2], advanced[3], advanced[4]};
}

namespace {

void update_operation_(const Tensor& x, const OptionalTensor& slots, const Tensor& position, const Tensor& token,
                       const Tensor& nodes, const Tensor& q, const Tensor& v, at::TensorList weights,
                       c10::string_view summarizer, int64_t heads, int64_t expand, at::TensorList block,
                       at::ArrayRef<double> eps) {
  const Listed listed(weights), around(block);
  const State state{position, token, nodes, q, v};
  Call call;
  describe(call, x, slots, state, {listed, summarizer, heads, expand, around, eps});
  bind(call.step, state);
  run(call, x);
  touch(state);
}

Tensor decode_operation_(const Tensor& x, const OptionalTensor& slots, const Tensor& position, const Tensor& token,
                         const Tensor& nodes, const Tensor& q, const Tensor& v, at::TensorList weights,
                         c10::string_view summarizer, int64_t heads, int64_t expand, at::TensorList block,
                         at::ArrayRef<double> eps) {
  const Listed listed(weights), around(block);
  return decode_(x, slots, {position, token, nodes, q, v}, {listed, summarizer, heads, expand, around, eps});
}

Stepped step_operation(const Tensor& x, const Tensor& position, const Tensor& token, const Tensor& nodes,
                       const Tensor& q, const Tensor& v, at::TensorList weights, c10::string_view summarizer,
                       int64_t heads, int64_t expand, at::TensorList block, at::ArrayRef<double> eps) {
  const Listed listed(weights), around(block);
  return step(x, {position, token, nodes, q, v}, {listed, summarizer, heads, expand, around, eps});
}

}  // namespace

torch::Library implementations(c10::DispatchKey key) {
  torch::Library m(torch::Library::IMPL, "lmn_kernels", key, __FILE__, __LINE__);
  m.impl("update_", update_operation_);
  m.impl("decode_", decode_operation_);
  m.impl("step", step_operation);
  return m;
}

}  // namespace lmn
