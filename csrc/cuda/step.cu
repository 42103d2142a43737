#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "step_kernel.cuh"

namespace lmn {

extern template cudaError_t launch<float, float>(const Step&, void*, cudaStream_t);
extern template cudaError_t launch<__nv_bfloat16, float>(const Step&, void*, cudaStream_t);
extern template cudaError_t launch<__nv_bfloat16, __nv_bfloat16>(const Step&, void*, cudaStream_t);
extern template cudaError_t launch<__half, float>(const Step&, void*, cudaStream_t);
extern template cudaError_t launch<__half, __half>(const Step&, void*, cudaStream_t);

int64_t workspace_bytes(const Step& step) {
  const Sizes n = sizes_of(step);
  const int64_t floats = 7 * n.tokens + n.hidden + n.nodes * (step.expander_weight ? 2 : 1);
  return floats * static_cast<int64_t>(sizeof(float)) + n.lists * static_cast<int64_t>(sizeof(int));
}

const char* step_cuda(const Step& step, void* workspace, cudaStream_t stream) {
  const bool same = step.state_type == step.type;
  cudaError_t error = cudaErrorInvalidValue;
  if (step.type == Type::f32) {
    error = launch<float, float>(step, workspace, stream);
  } else if (step.type == Type::bf16) {
    error = same ? launch<__nv_bfloat16, __nv_bfloat16>(step, workspace, stream)
                 : launch<__nv_bfloat16, float>(step, workspace, stream);
  } else {
    error = same ? launch<__half, __half>(step, workspace, stream) : launch<__half, float>(step, workspace, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lmn
