// The operations of register.cpp, for calls that do not go through the dispatcher.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace lmn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
// Tensors that are held elsewhere; a reference to one that Python holds too is taken and given up through Python.
using Tensors = at::ArrayRef<const Tensor*>;
// y and the new state.
using Stepped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct State {
  const Tensor &position, &token, &nodes, &q, &v;
};

// As python_ref.step.StepWeights: `weights` is the list of python_ref.step.Weights.flat, which names what stands
// where; `block` and `eps` are what python_ref.around.Around.of_tensors takes.
struct Weights {
  Tensors weights;
  c10::string_view summarizer;
  int64_t heads, expand;
  Tensors block;
  at::ArrayRef<double> eps;
};

Tensor decode_(const Tensor& x, const OptionalTensor& slots, const State& state, const Weights& given);

Stepped step(const Tensor& x, const State& old, const Weights& given);

// What TORCH_LIBRARY_IMPL does, but for the module's initialisation to call: an operation that is declared
// otherwise, as to a binary of other sources, is an ImportError there; in a static initialiser it ends the process.
torch::Library implementations(c10::DispatchKey key);

}  // namespace lmn
