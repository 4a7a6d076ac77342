// What the library as a whole offers: which instruction sets this CPU has, and the threads to run on.

#include "parallel.h"

namespace bert_fast {
run_team_function run_team = nullptr;
}

extern "C" {

// Bit i is set where the CPU has the i-th of scalar, avx2, avx512, avx512_bf16 (kernels/cpu/__init__.py).
BERT_FAST_EXPORT int bert_fast_instruction_sets() {
    int found = 1;
#ifdef BERT_FAST_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found |= 2;
    if ((found & 2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found |= 4;
    if ((found & 4) && __builtin_cpu_supports("avx512bf16")) found |= 8;
#ifdef BERT_FAST_EMULATE_AVX512
    if (found & 2) found |= 12;
#endif
#endif
    return found;
}

// The function that runs a team of threads: GOMP_parallel of the OpenMP runtime that torch uses, or null.
BERT_FAST_EXPORT void bert_fast_set_team(void* function) {
    bert_fast::run_team = reinterpret_cast<bert_fast::run_team_function>(function);
}
}
