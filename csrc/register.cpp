// The operations update_, decode_ and step of lmn_kernels/ops/step.py: checks, and the call of either half.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

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
#include "step.h"

#define LMN_STRING_(text) #text
#define LMN_STRING(text) LMN_STRING_(text)

namespace lmn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = at::TensorList;

// What the binary was built from and for. `backend/extension.py` looks for it in the file before it loads it.
const char kBuild[] = "lmn_kernels build: {\"version\": \"" LMN_STRING(LMN_VERSION) "\", \"torch\": \"" LMN_STRING(
    LMN_TORCH) "\", \"cuda\": \"" LMN_STRING(LMN_CUDA_VERSION) "\", \"archs\": \"" LMN_STRING(LMN_ARCHS) "\"}";

Type type_of(const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype == at::kFloat) return Type::f32;
  if (dtype == at::kBFloat16) return Type::bf16;
  if (dtype == at::kHalf && tensor.is_cuda()) return Type::f16;
  TORCH_CHECK_TYPE(false, name, ": expected dtype float32 or bfloat16", tensor.is_cuda() ? " or float16" : "",
                   ", got ", dtype);
}

struct State {
  const Tensor &position, &token, &nodes, &q, &v;
};

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

// `weights`: the list of python_ref.step.Weights.flat, which names what stands where.
void describe_weights(Call& call, const Tensor& x, Tensors weights, c10::string_view summarizer, int64_t heads) {
  Step& step = call.step;
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
    projections[i]->weight = weight(call, names[2 * i], weights[2 * i], x, {e, e});
    projections[i]->bias = weight(call, names[2 * i + 1], weights[2 * i + 1], x, {e});
  }
  const Tensor &merge = weights[8], &bias = weights[9];
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
    const Tensor& scale = weights[10];
    TORCH_CHECK_VALUE(scale.numel() == 2 * features, "summarizer.scale: expected ", 2 * features,
                      " elements, got shape ", scale.sizes());
    check_dtype("summarizer.scale", scale, x.scalar_type());
    check_device("summarizer.scale", scale, x.device());
    step.merge_scale = call.keep(scale);
  }
  if (weights.size() > plain) {
    step.expander_weight = weight(call, "expander.weight", weights[plain], x, {e, e, 1 + step.expand});
    step.expander_bias = weight(call, "expander.bias", weights[plain + 1], x, {e});
  } else {
    TORCH_CHECK_VALUE(step.expand == 0, "expand: expected 0 without an expander, got ", step.expand);
  }
}

// `block` and `eps`: what python_ref.around.Around.of_tensors takes.
void describe_block(Call& call, const Tensor& x, Tensors block, at::ArrayRef<double> eps) {
  Step& step = call.step;
  const int64_t e = step.embedding;
  const size_t norms = block.empty() ? 0 : block.size() == 1 ? 1 : 2;
  TORCH_CHECK_VALUE(block.size() <= 1 || block.size() == 6, "block: expected 0, 1 or 6 tensors, got ", block.size());
  TORCH_CHECK_VALUE(eps.size() == norms, "eps: expected ", norms, " numbers, got ", eps.size());
  if (norms == 0) return;
  step.mixing_norm = weight(call, "norm1.weight", block[0], x, {e});
  step.mixing_eps = static_cast<float>(eps[0]);
  if (norms == 1) return;
  step.feedforward_norm = weight(call, "norm2.weight", block[1], x, {e});
  step.feedforward_eps = static_cast<float>(eps[1]);
  step.hidden = block[2].dim() ? block[2].size(0) : 0;
  const int64_t f = step.hidden;
  step.up = {weight(call, "fc1.weight", block[2], x, {f, e}), weight(call, "fc1.bias", block[3], x, {f})};
  step.down = {weight(call, "fc2.weight", block[4], x, {e, f}), weight(call, "fc2.bias", block[5], x, {e})};
}

void refuse_gradients(const Tensor& x, const State& state, Tensors weights, Tensors block) {
  if (!at::GradMode::is_enabled()) return;
  bool wanted = x.requires_grad() || state.token.requires_grad() || state.nodes.requires_grad() ||
                state.q.requires_grad() || state.v.requires_grad();
  for (const Tensors& list : {weights, block})
    for (const Tensor& tensor : list) wanted = wanted || tensor.requires_grad();
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
void describe(Call& call, const Tensor& x, const OptionalTensor& slots, const State& state, Tensors weights,
              c10::string_view summarizer, int64_t heads, int64_t expand, Tensors block, at::ArrayRef<double> eps) {
  Step& step = call.step;
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected shape [batch, tokens, embedding], got ", x.sizes());
  TORCH_CHECK_VALUE(expand >= 0, "expand: expected a number of at least 0, got ", expand);
  step.rows = x.size(0);
  step.tokens = x.size(1);
  step.embedding = x.size(2);
  step.type = type_of("x", x);
  refuse_gradients(x, state, weights, block);
  describe_state(call, state, expand, x.device());
  describe_weights(call, x, weights, summarizer, heads);
  describe_block(call, x, block, eps);
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

void update_(const Tensor& x, const OptionalTensor& slots, const Tensor& position, const Tensor& token,
             const Tensor& nodes, const Tensor& q, const Tensor& v, Tensors weights, c10::string_view summarizer,
             int64_t heads, int64_t expand, Tensors block, at::ArrayRef<double> eps) {
  const State state{position, token, nodes, q, v};
  Call call;
  describe(call, x, slots, state, weights, summarizer, heads, expand, block, eps);
  bind(call.step, state);
  run(call, x);
  touch(state);
}

Tensor decode_(const Tensor& x, const OptionalTensor& slots, const Tensor& position, const Tensor& token,
               const Tensor& nodes, const Tensor& q, const Tensor& v, Tensors weights, c10::string_view summarizer,
               int64_t heads, int64_t expand, Tensors block, at::ArrayRef<double> eps) {
  const State state{position, token, nodes, q, v};
  Call call;
  describe(call, x, slots, state, weights, summarizer, heads, expand, block, eps);
  bind(call.step, state);
  const Tensor y = outputs(x, slots.has_value());
  call.step.y = y.mutable_data_ptr();
  run(call, x);
  touch(state);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(const Tensor& x, const Tensor& position,
                                                                const Tensor& token, const Tensor& nodes,
                                                                const Tensor& q, const Tensor& v, Tensors weights,
                                                                c10::string_view summarizer, int64_t heads,
                                                                int64_t expand, Tensors block,
                                                                at::ArrayRef<double> eps) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == 1, "x_t: expected shape [batch, 1, embedding], got ", x.sizes());
  refuse_gradients(x, {position, token, nodes, q, v}, weights, block);  // the copies require none
  const Tensor advanced[] = {copy(position), copy(token), copy(nodes), copy(q), copy(v)};
  const State state{advanced[0], advanced[1], advanced[2], advanced[3], advanced[4]};
  Call call;
  describe(call, x, std::nullopt, state, weights, summarizer, heads, expand, block, eps);
  bind(call.step, state);
  const Tensor y = outputs(x, false);
  call.step.y = y.mutable_data_ptr();
  run(call, x);
  return {y, advanced[0], advanced[1], advanced[2], advanced[3], advanced[4]};
}

// What TORCH_LIBRARY_IMPL does, but for the module's initialisation to call: an operation that is declared
// otherwise, as to a binary of other sources, is an ImportError there; in a static initialiser it ends the process.
torch::Library implementations(c10::DispatchKey key) {
  torch::Library m(torch::Library::IMPL, "lmn_kernels", key, __FILE__, __LINE__);
  m.impl("update_", update_);
  m.impl("decode_", decode_);
  m.impl("step", step);
  return m;
}

}  // namespace
}  // namespace lmn

namespace {

// A layer's weights, for calls without the dispatcher: reading thirty arguments takes longer than a small layer's
// step. Checked anew at every call, since a parameter may get other data.
struct Layer {
  std::vector<at::Tensor> weights, block;
  std::string summarizer;
  int64_t heads, expand;
  std::vector<double> eps;
  // Where the weights came from: (name, module) of the layer's own modules, (dictionary, key, value) of everything
  // below, and hooks. None of it refers back to the layer, which so is freed with its last name.
  py::tuple children, sources, hooks, plain;
  at::DeviceType device;  // for which, and for which dtype, it was decided that this serves
  at::ScalarType dtype;

  bool takes(const at::Tensor& x, const at::Tensor& token) const {
    const at::ScalarType kept = token.scalar_type();
    return x.device().type() == device && x.scalar_type() == dtype &&
           (kept == at::kFloat || kept == dtype || (kept == at::kBFloat16 && device == at::kCPU));
  }
};

// Whether there is more to do than a few microseconds, which is what giving up Python's lock costs.
bool is_long(const at::Tensor& x) { return x.numel() * (x.dim() ? x.size(-1) : 1) > 64 * 64; }

// Whether a plan of `layers/step_plan.py` still holds: x is a plain tensor of the kind it was made for, no gradient is
// recorded and nothing is cast or watched, the layer's modules and everything below are as they were, and all hooks
// are empty. Borrowed references throughout.
bool ready(const Layer& layer, const py::dict& modules, const py::handle& x, const at::Tensor& token) {
  if (!THPVariable_CheckExact(x.ptr()) || at::GradMode::is_enabled()) return false;
  if (at::autocast::is_autocast_enabled(layer.device) || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  // torch.func has its own tensors, which look like any other.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return false;
  const at::Tensor& given = THPVariable_Unpack(x.ptr());
  if (!layer.takes(given, token) || !given.has_storage() || given.is_neg() || given._is_zerotensor()) return false;
  if (PyDict_GET_SIZE(modules.ptr()) != PyTuple_GET_SIZE(layer.children.ptr())) return false;
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layer.plain.ptr()); ++i) {
    PyObject* module = PyTuple_GET_ITEM(layer.plain.ptr(), i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(module, 0))) != PyTuple_GET_ITEM(module, 1)) return false;
    if (PyDict_GetItemWithError(PyTuple_GET_ITEM(module, 2), forward)) return false;
  }
  const auto holds = [](PyObject* dictionary, PyObject* key, PyObject* value) {
    return PyDict_GetItemWithError(dictionary, key) == value;
  };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layer.children.ptr()); ++i) {
    PyObject* child = PyTuple_GET_ITEM(layer.children.ptr(), i);
    if (!holds(modules.ptr(), PyTuple_GET_ITEM(child, 0), PyTuple_GET_ITEM(child, 1))) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layer.sources.ptr()); ++i) {
    PyObject* source = PyTuple_GET_ITEM(layer.sources.ptr(), i);
    if (!holds(PyTuple_GET_ITEM(source, 0), PyTuple_GET_ITEM(source, 1), PyTuple_GET_ITEM(source, 2))) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layer.hooks.ptr()); ++i)
    if (PyDict_GET_SIZE(PyTuple_GET_ITEM(layer.hooks.ptr(), i)) != 0) return false;
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  static const torch::Library cpu = lmn::implementations(c10::DispatchKey::CPU);
#ifdef LMN_CUDA
  static const torch::Library cuda = lmn::implementations(c10::DispatchKey::CUDA);
#endif
  using at::Tensor;
  py::class_<Layer>(m, "Layer", py::custom_type_setup([](PyHeapTypeObject* heap) {
    PyTypeObject* type = &heap->ht_type;  // what it holds may lead back to the layer
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      const Layer& layer = py::cast<const Layer&>(py::handle(self));
      for (const py::tuple* held : {&layer.children, &layer.sources, &layer.hooks, &layer.plain}) Py_VISIT(held->ptr());
      return 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (!py::detail::is_holder_constructed(self)) return 0;
      Layer& layer = py::cast<Layer&>(py::handle(self));
      for (py::tuple* held : {&layer.children, &layer.sources, &layer.hooks, &layer.plain}) *held = py::tuple();
      return 0;
    };
  }))
      .def(py::init([](std::vector<Tensor> weights, std::string summarizer, int64_t heads, int64_t expand,
                       std::vector<Tensor> block, std::vector<double> eps, py::tuple children, py::tuple sources,
                       py::tuple hooks, py::tuple plain) {
        TORCH_CHECK_VALUE(!weights.empty(), "weights: expected at least one tensor, got none");
        const at::DeviceType device = weights[0].device().type();
        const at::ScalarType dtype = weights[0].scalar_type();
        return Layer{std::move(weights),  std::move(block),   std::move(summarizer), heads,  expand, std::move(eps),
                     std::move(children), std::move(sources), std::move(hooks),      std::move(plain),
                     device, dtype};
      }))
      .def("ready", ready)
      .def(
          "step",
          [](const Layer& l, const Tensor& x, const Tensor& position, const Tensor& token, const Tensor& nodes,
             const Tensor& q, const Tensor& v) {
            std::optional<py::gil_scoped_release> others;
            if (is_long(x)) others.emplace();
            return lmn::step(x, position, token, nodes, q, v, l.weights, l.summarizer, l.heads, l.expand, l.block,
                             l.eps);
          })
      .def(
          "decode_",
          [](const Layer& l, const Tensor& x, const std::optional<Tensor>& slots, const Tensor& position,
             const Tensor& token, const Tensor& nodes, const Tensor& q, const Tensor& v) {
            std::optional<py::gil_scoped_release> others;
            if (is_long(x)) others.emplace();
            return lmn::decode_(x, slots, position, token, nodes, q, v, l.weights, l.summarizer, l.heads, l.expand,
                                l.block, l.eps);
          });
  m.def("build", [] { return std::string(lmn::kBuild); }, "What the binary was built from and for.");
}
