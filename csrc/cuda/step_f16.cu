#include "step_kernel.cuh"

namespace lmn {

template cudaError_t launch<__half, float>(const Step&, void*, cudaStream_t);
template cudaError_t launch<__half, __half>(const Step&, void*, cudaStream_t);

}  // namespace lmn
