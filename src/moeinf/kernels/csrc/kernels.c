#include "avx2.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#define STRING_(name) #name
#define STRING(name) STRING_(name)

/* What every processor of the kind has: NEON on 64-bit ARM, SSE2 on x86-64. */
#if defined(__aarch64__)
#define BASE neon
#else
#define BASE portable
#endif
#define SET BASE
#define TARGET
#define LANES 4
#include "kernels.inc"

#if defined(__x86_64__)
#define SET avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#include "kernels.inc"

float dot_row_avx2(const uint16_t *w, size_t width, const void *packed) {
    float out;
    dot_bf16_avx2(w, width, 1, packed, &out);
    return out;
}

/* Rows of one kind after the other, of which the loops above take what they can. */
void put_rows_avx2(const matrix *w, size_t first, size_t rows, size_t start, size_t inputs, uint16_t *out, size_t stride) {
    if (w->kind == MOE_LOSSLESS) {
        lossless packed = make_lossless(w->numbers, w->scales, w->rows, w->width);
        put_lossless_avx2(&packed, w->width, first, rows, start, inputs, out, stride);
        return;
    }
    const uint8_t *numbers = w->numbers, *scales = w->scales;
    for (size_t row = first; row < first + rows; row++, out += stride) {
        size_t at = row * w->width + start;
        if (w->kind == MOE_PLAIN)
            memcpy(out, (const uint16_t *)w->numbers + at, inputs * sizeof *out);
        else if (w->kind == MOE_MXFP4)
            expand_mxfp4_avx2(numbers + at / 2, scales + at / FP4_GROUP, inputs, 1, out);
        else if (w->kind == MOE_FP8) {
            const fp8_blocks blocks = {w->scales, w->group};
            put_fp8_avx2(numbers + row * w->width, scales_of(&blocks, row, w->width), start, inputs, out);
        } else if (w->kind == MOE_INT8) {
            const uint16_t *halves = (const uint16_t *)w->scales + row * ceil_div(w->width, w->group) + start / w->group;
            expand_int8_avx2(numbers + at, halves, inputs, w->group, out);
        } else
            expand_int4_avx2(numbers + row * ceil_div(w->width, 2), scales + row * int4_factor_bytes(w->width), start, inputs, out);
    }
}

#define SET avx512
#define TARGET __attribute__((target("avx512f,fma,f16c")))
#define LANES 16
#include "kernels.inc"

#ifdef HAS_DOT_PAIRS
void expand_part(const matrix *w, size_t row, size_t start, size_t inputs, uint16_t *out) {
    const uint8_t *numbers = w->numbers;
    size_t at = row * w->width + start;
    if (w->kind == MOE_MXFP4) {
        const uint8_t *scales = (const uint8_t *)w->scales + at / FP4_GROUP;
        expand_mxfp4_avx512(numbers + at / 2, scales, inputs, 1, out);
    } else {
        const fp8_blocks blocks = {w->scales, w->group};
        const fp8_blocks part = {scales_of(&blocks, row, w->width) + start / FP8_BLOCK, 1};
        expand_fp8_avx512(numbers + at, &part, inputs, 0, 1, out);
    }
}

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
    .columns_bf16 = chains_bf16_avx512,
    .columns_f32 = chains_f32_avx512,
    .tiles = {word_bytes, pack_words, put_words, multiply_tiles, order_tiles},
    .is_wide = true,
    .read = read_avx512,
};
#ifdef HAS_DOT_AMX
static const kernels avx512amx = {
    .name = "avx512amx",
    .pairs = {pack_pairs, PAD * sizeof(uint16_t)},
    .bytes = {pack_vnni8, PAD / 64 * VNNI_BYTES},
    .nibbles = {pack_vnni4, PAD / 128 * VNNI_BYTES},
    .dot_bf16 = dot_amx,
    .dot_f32 = dot_f32_avx512,
    .dot_int8 = dot_vnni8,
    .dot_int4 = dot_vnni4,
    .expand_int8 = expand_int8_avx512,
    .expand_int4 = expand_int4_avx512,
    .dot_mxfp4 = dot_mxfp4_amx,
    .expand_mxfp4 = expand_mxfp4_avx512,
    .turn_mxfp4 = turn_mxfp4_avx512,
    .dot_fp8 = dot_fp8_amx,
    .expand_fp8 = expand_fp8_avx512,
    .dot_lossless = dot_lossless_amx,
    .expand_lossless = expand_lossless,
    .columns_bf16 = chains_bf16_avx512,
    .columns_f32 = chains_f32_avx512,
    .tiles = {word_bytes, pack_words, put_words, multiply_amx, order_amx},
    .is_wide = true,
    .dot_chains = dot_chains_amx,
    .read = read_avx512,
};
#endif
#endif

/* Not every clang knows the name of that. */
static int has_f16c(void) {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

#ifdef HAS_DOT_NEON
static const kernels neon_dotprod = {
    .name = "neon-dotprod",
    .pairs = {pack_bf16_neon, PAD * sizeof(float)},
    .bytes = {pack_neon8, PAD / 32 * NEON_BYTES},
    .nibbles = {pack_neon4, PAD / 32 * NEON_BYTES},
    .dot_bf16 = dot_bf16_neon,
    .dot_f32 = dot_f32_neon,
    .dot_int8 = dot_neon8,
    .dot_int4 = dot_neon4,
    .expand_int8 = expand_int8_plain,
    .expand_int4 = expand_int4_plain,
    .dot_mxfp4 = dot_mxfp4_neon,
    .expand_mxfp4 = expand_mxfp4_neon,
    .turn_mxfp4 = turn_mxfp4_neon,
    .dot_fp8 = dot_fp8_neon,
    .expand_fp8 = expand_fp8_neon,
    .dot_lossless = dot_lossless_neon,
    .expand_lossless = expand_lossless_neon,
    .columns_bf16 = turns_bf16_neon,
    .columns_f32 = chains_f32_neon,
    .takes_turns = true,
    .read = read_neon,
};

static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}
#endif

const kernels *find_kernels(int number) {
    if (number == 0)
        return &BASE;
#ifdef HAS_DOT_NEON
    if (number == 1 && has_dotprod())
        return &neon_dotprod;
#endif
#if defined(__x86_64__)
    if (number == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        return &avx2;
    if (number == 2 && __builtin_cpu_supports("avx512f"))
        return &avx512;
#endif
#ifdef HAS_DOT_PAIRS
    if (number == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512bf16;
#endif
#ifdef HAS_DOT_AMX
    if (number == 4 && find_kernels(3) != NULL && has_amx())
        return &avx512amx;
#endif
    return NULL;
}
