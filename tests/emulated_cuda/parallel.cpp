// In the place of the parallel form on a CPU, which the emulated binary has no use for.
#include "../../csrc/parallel.h"

namespace lmn {

void define_parallel(py::module_&) {}

}  // namespace lmn
