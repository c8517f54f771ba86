#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define STRING_(name) #name
#define STRING(name) STRING_(name)

/* Whatever the compiler aims at: SSE2 on x86-64, NEON on 64-bit ARM. */
#define SET portable
#define TARGET
#define LANES 4
#include "kernels.inc"

#if defined(__x86_64__)
#define SET avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#include "kernels.inc"

#define SET avx512
#define TARGET __attribute__((target("avx512f,fma,f16c")))
#define LANES 16
#include "kernels.inc"

#ifdef HAS_DOT_PAIRS
static const kernels avx512bf16 = {
    .name = "avx512bf16",
    .pairs = {pack_pairs, PAD * sizeof(uint16_t)},
    .bytes = {pack_vnni8, PAD / 64 * VNNI_BYTES},
    .nibbles = {pack_vnni4, PAD / 128 * VNNI_BYTES},
    .dot_bf16 = dot_pairs,
    .dot_f32 = dot_f32_avx512,
    .dot_int8 = dot_vnni8,
    .dot_int4 = dot_vnni4,
    .expand_int8 = expand_int8_avx512,
    .expand_int4 = expand_int4_avx512,
    .dot_mxfp4 = dot_mxfp4,
    .expand_mxfp4 = expand_mxfp4_avx512,
    .turn_mxfp4 = turn_mxfp4_avx512,
    .dot_fp8 = dot_fp8,
    .expand_fp8 = expand_fp8_avx512,
    .dot_lossless = dot_lossless,
    .expand_lossless = expand_lossless,
    .columns_bf16 = columns_bf16_avx512,
    .columns_f32 = columns_f32_avx512,
    .tiles = {pack_tile, multiply_tiles},
    .read = read_avx512,
};
#endif
#endif

const kernels *find_kernels(int number) {
    if (number == 0)
        return &portable;
#if defined(__x86_64__)
    if (number == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return &avx2;
    if (number == 2 && __builtin_cpu_supports("avx512f"))
        return &avx512;
#endif
#ifdef HAS_DOT_PAIRS
    if (number == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return &avx512bf16;
#endif
    return NULL;
}
