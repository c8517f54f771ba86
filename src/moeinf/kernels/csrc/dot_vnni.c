/* Weights of 8 and 4 bits times x, in whole numbers (whole_numbers.h), where the processor multiplies and adds bytes
 * (AVX-512 VNNI). The instruction wants one side without a sign: to weights half their range is added, and what that adds to
 * the sum is taken off beforehand. */
#include "whole_numbers.h"

#ifdef HAS_DOT_PAIRS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,f16c")))

enum {
    LANES = 16,
    VECTOR_BYTES = 64,
    TOGETHER = 2,
    AHEAD_BYTES = 8192, /* fetched so far ahead: the processor does not guess it while x takes more reads than weights do */
};

/* x for one vector of weights: of each word's weights the even ones are in [0] and the odd ones in [1] when two weights share a
 * byte, else all are in [0]. */
typedef struct {
    int8_t high[2][4 * LANES], low[2][4 * LANES];
    int32_t begin[LANES];
    float factors[LANES];
} chunk;
_Static_assert(sizeof(chunk) == VNNI_BYTES, "kernels.h tells others how large a chunk is");

/* `per` weights to a word, 4 or 8. */
static inline void pack(const float *values, size_t count, chunk *chunks, size_t per) {
    int32_t half = per == 4 ? 128 : 8;
    memset(chunks, 0, PAD / (per * LANES) * sizeof *chunks);
    for (size_t first = 0; first < count; first += GROUP) {
        size_t end = first + GROUP < count ? first + GROUP : count;
        group_scale scale = find_scale(values + first, end - first);
        for (size_t i = first; i < end; i++) {
            chunk *to = chunks + i / (per * LANES);
            whole_number x = to_whole(values[i], scale);
            size_t lane = i / per % LANES, k = i % per;
            size_t side = per == 8 ? k % 2 : 0, byte = 4 * lane + (per == 8 ? k / 2 : k);
            to->high[side][byte] = x.high;
            to->low[side][byte] = x.low;
            to->begin[lane] -= half * x.whole;
            to->factors[lane] = scale.factor;
        }
    }
}

void pack_vnni8(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 4);
}

void pack_vnni4(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 8);
}

/* Adds one vector of weights, with `count` different scales, to the sums. */
TARGET static inline __m512 add_chunk(__m512i w, const uint16_t *scales, size_t count, const chunk *x, size_t per,
                                      __m512 sums) {
    __m512i high = _mm512_setzero_si512(), low = _mm512_loadu_si512(x->begin);
    if (per == 4) {
        w = _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80));
        high = _mm512_dpbusd_epi32(high, w, _mm512_loadu_si512(x->high[0]));
        low = _mm512_dpbusd_epi32(low, w, _mm512_loadu_si512(x->low[0]));
    } else {
        __m512i nibble = _mm512_set1_epi8(0x0f);
        w = _mm512_xor_si512(w, _mm512_set1_epi8((char)0x88));
        __m512i even = _mm512_and_si512(w, nibble), odd = _mm512_and_si512(_mm512_srli_epi32(w, 4), nibble);
        high = _mm512_dpbusd_epi32(high, even, _mm512_loadu_si512(x->high[0]));
        low = _mm512_dpbusd_epi32(low, even, _mm512_loadu_si512(x->low[0]));
        high = _mm512_dpbusd_epi32(high, odd, _mm512_loadu_si512(x->high[1]));
        low = _mm512_dpbusd_epi32(low, odd, _mm512_loadu_si512(x->low[1]));
    }
    __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    uint64_t halves = 0;
    memcpy(&halves, scales, count * sizeof *scales);
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i from = _mm512_srli_epi32(lanes, count == 4 ? 2 : count == 2 ? 3 : 4);
    __m512 few = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128((long long)halves)));
    __m512 factors = _mm512_mul_ps(_mm512_permutexvar_ps(from, few), _mm512_loadu_ps(x->factors));
    return _mm512_fmadd_ps(product, factors, sums);
}

/* `together` rows, which share what is read of x; a constant, as `per` and `group` are. */
TARGET static inline void dot_rows(const uint8_t *w, const uint16_t *scales, size_t width, size_t group,
                                   size_t together, const chunk *x, float *out, size_t per) {
    const size_t step = per * LANES, count = step > group ? step / group : 1;
    size_t row_bytes = (width * 4 + per - 1) / per, row_scales = (width + group - 1) / group, at = 0;
    __m512 sums[TOGETHER];
    for (size_t r = 0; r < together; r++)
        sums[r] = _mm512_setzero_ps();
    for (; (at + 1) * step <= width; at++)
        for (size_t r = 0; r < together; r++) {
            const uint8_t *from = w + r * row_bytes + at * VECTOR_BYTES;
            _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T1);
            sums[r] = add_chunk(_mm512_loadu_si512(from), scales + r * row_scales + at * step / group, count, x + at, per,
                                sums[r]);
        }
    for (size_t r = 0; r < together; r++) {
        if (at * step < width) {
            uint8_t last[VECTOR_BYTES] = {0};
            uint16_t last_scales[4] = {0};
            memcpy(last, w + r * row_bytes + at * VECTOR_BYTES, row_bytes - at * VECTOR_BYTES);
            memcpy(last_scales, scales + r * row_scales + at * step / group,
                   (row_scales - at * step / group) * sizeof *scales);
            sums[r] = add_chunk(_mm512_loadu_si512(last), last_scales, count, x + at, per, sums[r]);
        }
        out[r] = _mm512_reduce_add_ps(sums[r]);
    }
}

TARGET static inline void dot(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                              const chunk *x, float *out, size_t per) {
    size_t row_bytes = (width * 4 + per - 1) / per, row_scales = (width + group - 1) / group, r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, TOGETHER, x, out + r, per);
    for (; r < rows; r++)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, 1, x, out + r, per);
}

TARGET void dot_vnni8(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, scales, width, 32, rows, packed, out, 4);
    else
        dot(w, scales, width, 64, rows, packed, out, 4);
}

TARGET void dot_vnni4(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, scales, width, 32, rows, packed, out, 8);
    else
        dot(w, scales, width, 64, rows, packed, out, 8);
}

#endif
