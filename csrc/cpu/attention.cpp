#include "attention.h"

#define LMN_SET base
#define LMN_SET_NAME "base"
#include "attention_kernels.h"

namespace lmn {

#ifdef LMN_SETS
namespace avx2 {
extern const AttentionKernels kernels;
}
namespace avx512 {
extern const AttentionKernels kernels;
}
#endif

std::vector<const AttentionKernels*> attention_kernels() {
  std::vector<const AttentionKernels*> found{&base::kernels};
#ifdef LMN_SETS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2"))
    found.push_back(&avx2::kernels);
  if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
#endif
  return found;
}

}  // namespace lmn
