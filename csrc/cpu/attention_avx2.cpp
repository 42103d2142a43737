// All that is not to be of this instruction set comes before the pragma.
#include <cstdint>
#include <cstring>

#include "attention.h"

#ifdef LMN_SETS
#pragma GCC target("avx2,fma,bmi,bmi2")
#define LMN_SET avx2
#define LMN_SET_NAME "avx2"
#include "attention_kernels.h"
#endif
