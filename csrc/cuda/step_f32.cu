#include "step_kernel.cuh"

namespace lmn {

template cudaError_t launch<float, float>(const Step&, void*, cudaStream_t);

}  // namespace lmn
