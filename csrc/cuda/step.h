// The step on CUDA; no torch headers, so that nvcc alone compiles the other side of this.
#pragma once

#include <cuda_runtime_api.h>

#include "../step.h"

namespace lmn {

// Device memory that `step_cuda` needs; the same for every position, so that a graph can hold on to it.
int64_t workspace_bytes(const Step& step);

// One cooperative launch for each token of the rows, on `stream`. The text of an error, or null.
const char* step_cuda(const Step& step, void* workspace, cudaStream_t stream);

}  // namespace lmn
