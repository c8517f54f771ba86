#include "kernels.h"

#define STRING_(name) #name
#define STRING(name) STRING_(name)

/* Whatever the compiler aims at: SSE2 on x86-64, NEON on 64-bit ARM. */
#define SET portable
#define TARGET
#define LANES 4
#include "kernels.inc"

#if defined(__x86_64__)
#define SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#include "kernels.inc"

#define SET avx512
#define TARGET __attribute__((target("avx512f,fma")))
#define LANES 16
#include "kernels.inc"
#endif

const kernels *find_kernels(int number) {
    if (number == 0)
        return &portable;
#if defined(__x86_64__)
    if (number == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2;
    if (number == 2 && __builtin_cpu_supports("avx512f"))
        return &avx512;
#endif
    return NULL;
}
