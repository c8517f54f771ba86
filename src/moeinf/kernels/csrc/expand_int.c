#include "library.h"

/* A row of whole numbers as bfloat16: the products with their factors, in float32, rounded. */
void expand_int8_plain(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, uint16_t *out) {
    for (size_t begin = 0; begin < width; begin += group) {
        float scale = from_f16(*scales++);
        size_t end = smaller(begin + group, width);
        for (size_t i = begin; i < end; i++)
            out[i] = to_bf16((float)(int8_t)w[i] * scale);
    }
}

void expand_int4_plain(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, uint16_t *out) {
    for (size_t begin = 0; begin < width; begin += group) {
        float scale = from_f16(*scales++);
        size_t end = smaller(begin + group, width);
        for (size_t i = begin / 2; i < end / 2; i++) {
            out[2 * i] = to_bf16((float)((int8_t)(w[i] << 4) >> 4) * scale);
            out[2 * i + 1] = to_bf16((float)((int8_t)w[i] >> 4) * scale);
        }
        if (end % 2 != 0)
            out[end - 1] = to_bf16((float)((int8_t)(w[end / 2] << 4) >> 4) * scale);
    }
}

#ifdef HAS_DOT_PAIRS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,f16c")))

enum { STEP = 32 };

/* The lowest `count` bits, or all of them. */
static inline uint32_t first_bits(size_t count) {
    return count < 32 ? ((uint32_t)1 << count) - 1 : UINT32_MAX;
}

TARGET static inline __m512 widen(__m128i numbers, __m512 scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers)), scale);
}

TARGET void expand_int8_avx512(const uint8_t *w, const uint16_t *scales, size_t width, size_t group,
                                   uint16_t *out) {
    __m512 scale = _mm512_setzero_ps();
    for (size_t i = 0; i < width; i += STEP) {
        if (i % group == 0)
            scale = _mm512_set1_ps(_cvtsh_ss(*scales++));
        __mmask32 mask = first_bits(width - i);
        __m256i numbers = _mm256_maskz_loadu_epi8(mask, w + i);
        __m512 low = widen(_mm256_castsi256_si128(numbers), scale);
        __m512 high = widen(_mm256_extracti128_si256(numbers, 1), scale);
        _mm512_mask_storeu_epi16(out + i, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* What the 16 numbers stand for in a group is computed once, and looked up. */
TARGET void expand_int4_avx512(const uint8_t *w, const uint16_t *scales, size_t width, size_t group,
                                   uint16_t *out) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    __m512i values = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += STEP) {
        if (i % group == 0) {
            __m512 scale = _mm512_set1_ps(_cvtsh_ss(*scales++));
            values = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(numbers, scale)));
        }
        __mmask16 bytes = (__mmask16)first_bits((width - i + 1) / 2);
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, w + i / 2));
        __m512i each = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
        __m512i looked_up = _mm512_permutexvar_epi16(_mm512_and_si512(each, _mm512_set1_epi32(0xf000f)), values);
        _mm512_mask_storeu_epi16(out + i, first_bits(width - i), looked_up);
    }
}

#endif

/* One call of moe_expand_int. A ticket is PAD rows. */
typedef struct {
    expand_int *expand;
    const uint8_t *weights;
    const uint16_t *scales;
    size_t rows, width, group;
    size_t row_bytes;
    uint16_t *output;
} expansion;

static void run_ticket(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, end = smaller(first + PAD, all->rows), groups = ceil_div(all->width, all->group);
    for (size_t r = first; r < end; r++)
        all->expand(all->weights + r * all->row_bytes, all->scales + r * groups, all->width, all->group,
                    all->output + r * all->width);
}

void moe_expand_int(moe_pool *pool, int kind, int64_t group, const void *weights, const void *scales, int64_t rows,
                    int64_t width, void *output) {
    bool is_int8 = kind == MOE_INT8;
    expansion all = {
        .expand = is_int8 ? pool->kernels->expand_int8 : pool->kernels->expand_int4,
        .weights = weights,
        .scales = scales,
        .rows = (size_t)rows,
        .width = (size_t)width,
        .group = (size_t)group,
        .row_bytes = is_int8 ? (size_t)width : ceil_div((size_t)width, 2),
        .output = output,
    };
    pool_run(pool->threads, run_ticket, &all, ceil_div(all.rows, PAD));
}
