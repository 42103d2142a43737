// Checks of arguments. Every message names the argument, what was expected and what came.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace lmn {

// A size of -1 admits any.
inline void check_shape(const char* name, const at::Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    if (!fits) break;
    fits = size < 0 || tensor.size(axis) == size;
    ++axis;
  }
  if (fits) return;
  std::ostringstream expected;
  for (const int64_t size : shape) {
    if (expected.tellp() > 0) expected << ", ";
    size < 0 ? expected << "*" : expected << size;
  }
  TORCH_CHECK_VALUE(false, name, ": expected shape [", expected.str(), "], got ", tensor.sizes());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  // Subclasses and lazy views have no memory of their own to be read.
  constexpr c10::DispatchKeySet kOther({c10::DispatchKey::Python, c10::DispatchKey::ZeroTensor,
                                        c10::DispatchKey::Negative});
  TORCH_CHECK_TYPE(tensor.has_storage() && !tensor.key_set().has_any(kOther), name,
                   ": expected a plain tensor, got a subclass or a lazy view");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", tensor.scalar_type());
}

inline void check_device(const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": expected device ", device, ", got ", tensor.device());
}

}  // namespace lmn
