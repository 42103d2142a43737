// The CUDA half under the name of the CPU half: csrc/register.cpp calls step_cpu, and gets the emulated kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <limits>
#include <vector>

#include "../../csrc/step.h"

// What launches look like for the one kernel that there is.
template <class Function>
cudaError_t cudaLaunchCooperativeKernel(Function* kernel, dim3 blocks, dim3 threads, void** arguments, size_t,
                                        cudaStream_t) {
  using Kernel = void (*)(lmn::Step, void*, int64_t);
  const Kernel function = reinterpret_cast<Kernel>(kernel);
  emulated::run_grid(blocks.x, threads.x, [=] {
    function(*static_cast<lmn::Step*>(arguments[0]), *static_cast<void**>(arguments[1]),
             *static_cast<int64_t*>(arguments[2]));
  });
  return cudaSuccess;
}

#include "../../csrc/cuda/step.cu"

#include "../../csrc/cuda/step_bf16.cu"
#include "../../csrc/cuda/step_f16.cu"
#include "../../csrc/cuda/step_f32.cu"

namespace lmn {

void step_cpu(const Step& step, int64_t) {
  // Device memory holds whatever it held.
  std::vector<float> space(static_cast<size_t>(workspace_bytes(step) / 4 + 1), std::numeric_limits<float>::quiet_NaN());
  step_cuda(step, space.data(), nullptr);
}

}  // namespace lmn
