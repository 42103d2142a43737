#include "step_kernel.cuh"

namespace lmn {

template cudaError_t launch<__nv_bfloat16, float>(const Step&, void*, cudaStream_t);
template cudaError_t launch<__nv_bfloat16, __nv_bfloat16>(const Step&, void*, cudaStream_t);

}  // namespace lmn
