#include "attention.h"

#define LMN_SET base
#include "attention_kernels.h"

namespace lmn {

#ifdef LMN_SETS
namespace avx2 {
extern const AttentionKernels kernels;
}
namespace avx512 {
extern const AttentionKernels kernels;
}

const AttentionKernels& attention_kernels() {
  static const bool eight = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  static const bool sixteen = eight && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl");
  return sixteen ? avx512::kernels : eight ? avx2::kernels : base::kernels;
}
#else
const AttentionKernels& attention_kernels() { return base::kernels; }
#endif

}  // namespace lmn
