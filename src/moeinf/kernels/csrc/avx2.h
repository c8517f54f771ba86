/* What the files that are named for AVX2 share. */
#ifndef AVX2_H
#define AVX2_H

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

/* Eight bfloat16 as float32. */
AVX2_TARGET static inline __m256 widen_avx2(const uint16_t *values) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* Upper halves are added to lower ones until one number is left. */
AVX2_TARGET static inline float fold_avx2(__m256 sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#endif
#endif
