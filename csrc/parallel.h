// The parallel form's operations on a CPU, as the module hands them to Python.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace lmn {

void define_parallel(py::module_& m);

}  // namespace lmn
