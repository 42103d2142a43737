// All that is not to be of this instruction set comes before the pragma.
#include <cstdint>
#include <cstring>

#include "attention.h"

#ifdef LMN_SETS
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#define LMN_SET avx512
#define LMN_SET_NAME "avx512"
#include "attention_kernels.h"
#endif
