// The module that Python imports: what it was built for, and a layer's own entry to the operations of register.cpp.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "operations.h"
#include "parallel.h"

#define LMN_STRING_(text) #text
#define LMN_STRING(text) LMN_STRING_(text)

namespace lmn {
namespace {

// What the binary was built from and for. `backend/extension.py` looks for it in the file before it loads it.
const char kBuild[] = "lmn_kernels build: {\"version\": \"" LMN_STRING(LMN_VERSION) "\", \"torch\": \"" LMN_STRING(
    LMN_TORCH) "\", \"cuda\": \"" LMN_STRING(LMN_CUDA_VERSION) "\", \"archs\": \"" LMN_STRING(LMN_ARCHS) "\"}";

// A layer's weights, for calls without the dispatcher: reading thirty arguments takes longer than a small layer's
// step. Held as Python holds them, since torch.utils.swap_tensors refuses a tensor with any other reference, a weak
// one included; so what each of them is, is found out anew at every call.
struct Layer {
  py::tuple weights, block;
  std::string summarizer;
  int64_t heads, expand;
  std::vector<double> eps;
  // Where the weights came from: (name, module) of the layer's own modules, (dictionary, key, value) of everything
  // below, and hooks. None of it refers back to the layer, which so is freed with its last name.
  py::tuple children, sources, hooks, plain;
  // For which it was decided that this serves.
  at::DeviceType device{};
  at::ScalarType dtype{};

  auto held() { return std::array{&weights, &block, &children, &sources, &hooks, &plain}; }

  bool takes(const Tensor& x, const Tensor& token) const {
    const at::ScalarType kept = token.scalar_type();
    return x.device().type() == device && x.scalar_type() == dtype &&
           (kept == at::kFloat || kept == dtype || (kept == at::kBFloat16 && device == at::kCPU));
  }
};

// A layer's operands for one call, which gives up Python's lock where there is more to do than a few microseconds,
// the price of that; others may then give a parameter another tensor, so that references must be counted.
class Operands {
 public:
  Operands(const Layer& layer, const Tensor& x) : layer_(layer) {
    const bool is_long = x.numel() * (x.dim() ? x.size(-1) : 1) > 64 * 64;
    counted_.reserve(is_long ? layer.weights.size() + layer.block.size() : 0);
    for (const auto& [tensors, pointers] : {std::pair{&layer.weights, &weights_}, {&layer.block, &block_}}) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors->ptr()); ++i) {
        const Tensor* tensor = &THPVariable_Unpack(PyTuple_GET_ITEM(tensors->ptr(), i));
        pointers->push_back(is_long ? &counted_.emplace_back(*tensor) : tensor);
      }
    }
    if (is_long) others_.emplace();
  }
  operator Weights() const {
    return {weights_, layer_.summarizer, layer_.heads, layer_.expand, block_, layer_.eps};
  }

 private:
  const Layer& layer_;
  c10::SmallVector<const Tensor*, 13> weights_, block_;
  std::vector<Tensor> counted_;
  std::optional<py::gil_scoped_release> others_;  // taken back before the references are given up
};

bool are_tensors(const py::tuple& values, bool (*is)(PyObject*)) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values.ptr()); ++i)
    if (!is(PyTuple_GET_ITEM(values.ptr(), i))) return false;
  return true;
}

Layer make_layer(const py::sequence& weights, std::string summarizer, int64_t heads, int64_t expand,
                 const py::sequence& block, std::vector<double> eps, py::tuple children, py::tuple sources,
                 py::tuple hooks, py::tuple plain) {
  Layer layer{py::tuple(weights),  py::tuple(block),   std::move(summarizer), heads,          expand, std::move(eps),
              std::move(children), std::move(sources), std::move(hooks),      std::move(plain)};
  TORCH_CHECK_VALUE(!layer.weights.empty(), "weights: expected at least one tensor, got none");
  TORCH_CHECK_TYPE(are_tensors(layer.weights, THPVariable_Check), "weights: expected tensors, got something else");
  TORCH_CHECK_TYPE(are_tensors(layer.block, THPVariable_Check), "block: expected tensors, got something else");
  const Tensor& first = THPVariable_Unpack(PyTuple_GET_ITEM(layer.weights.ptr(), 0));
  layer.device = first.device().type();
  layer.dtype = first.scalar_type();
  return layer;
}

// Whether a plan of `layers/step_plan.py` still holds: x is a plain tensor of the kind it was made for, no gradient is
// recorded and nothing is cast or watched, the layer's modules and everything below are as they were, all weights are
// plain tensors still, and all hooks are empty. Borrowed references throughout.
bool ready(const Layer& layer, const py::dict& modules, const py::handle& x, const Tensor& token) {
  if (!THPVariable_CheckExact(x.ptr()) || at::GradMode::is_enabled()) return false;
  if (at::autocast::is_autocast_enabled(layer.device) || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  // torch.func has its own tensors, which look like any other.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return false;
  const Tensor& given = THPVariable_Unpack(x.ptr());
  if (!layer.takes(given, token) || !given.has_storage() || given.is_neg() || given._is_zerotensor()) return false;
  // A swap changes the class of a tensor, too.
  if (!are_tensors(layer.weights, THPVariable_CheckExact) || !are_tensors(layer.block, THPVariable_CheckExact))
    return false;
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

Stepped step_layer(const Layer& layer, const Tensor& x, const Tensor& position, const Tensor& token,
                   const Tensor& nodes, const Tensor& q, const Tensor& v) {
  return step(x, {position, token, nodes, q, v}, Operands(layer, x));
}

Tensor decode_layer_(const Layer& layer, const Tensor& x, const OptionalTensor& slots, const Tensor& position,
                     const Tensor& token, const Tensor& nodes, const Tensor& q, const Tensor& v) {
  return decode_(x, slots, {position, token, nodes, q, v}, Operands(layer, x));
}

// What a layer holds may lead back to its owner.
void collect(PyHeapTypeObject* heap) {
  PyTypeObject* type = &heap->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    for (const py::tuple* held : py::cast<Layer&>(py::handle(self)).held()) Py_VISIT(held->ptr());
    return 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (!py::detail::is_holder_constructed(self)) return 0;
    for (py::tuple* held : py::cast<Layer&>(py::handle(self)).held()) *held = py::tuple();
    return 0;
  };
}

}  // namespace
}  // namespace lmn

PYBIND11_MODULE(_C, m) {
  static const torch::Library cpu = lmn::implementations(c10::DispatchKey::CPU);
#ifdef LMN_CUDA
  static const torch::Library cuda = lmn::implementations(c10::DispatchKey::CUDA);
#endif
  py::class_<lmn::Layer>(m, "Layer", py::custom_type_setup(lmn::collect))
      .def(py::init(&lmn::make_layer))
      .def("ready", lmn::ready)
      .def("step", lmn::step_layer)
      .def("decode_", lmn::decode_layer_);
  lmn::define_parallel(m);
  m.def("build", [] { return std::string(lmn::kBuild); }, "What the binary was built from and for.");
}
