#include "library.h"

/* A row of numbers as bfloat16: the products with their factors, in float32, rounded. */
void expand_int8_plain(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, uint16_t *out) {
    for (size_t begin = 0; begin < width; begin += group) {
        float scale = from_f16(*scales++);
        size_t end = smaller(begin + group, width);
        for (size_t i = begin; i < end; i++)
            out[i] = to_bf16((float)(int8_t)w[i] * scale);
    }
}

void expand_int4_plain(const uint8_t *w, const uint8_t *scales, size_t start, size_t inputs, uint16_t *out) {
    float unit = unit_of(scales);
    for (size_t i = start; i < start + inputs; i++) {
        float factor = unit * (int8_t)scales[UNIT_BYTES + i / INT4_GROUP];
        out[i - start] = to_bf16(INT4_VALUES[w[i / 2] >> i % 2 * 4 & 15] * factor);
    }
}

#if defined(__x86_64__)

#include <immintrin.h>

enum { LANES = 8 };

/* Finite numbers rounded to bfloat16, in the lower halves of words. */
AVX2_TARGET static inline __m256i round_bf16(__m256 values) {
    __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

/* Sixteen of them. */
AVX2_TARGET static inline __m256i join(__m256i first, __m256i second) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
}

AVX2_TARGET void expand_int8_avx2(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, uint16_t *out) {
    enum { STEP = 2 * LANES };
    size_t i = 0;
    for (; i + STEP <= width; i += STEP) {
        __m256 scale = _mm256_set1_ps(from_f16(scales[i / group]));
        __m128i bytes = _mm_loadu_si128((const __m128i *)(w + i));
        __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        __m256 second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, LANES)));
        __m256i both = join(round_bf16(_mm256_mul_ps(first, scale)), round_bf16(_mm256_mul_ps(second, scale)));
        _mm256_storeu_si256((__m256i *)(out + i), both);
    }
    expand_int8_plain(w + i, scales + i / group, width - i, group, out + i);
}

/* What the 16 numbers stand for in a group is computed once, and looked up. */
AVX2_TARGET void expand_int4_avx2(const uint8_t *w, const uint8_t *scales, size_t start, size_t inputs, uint16_t *out) {
    const __m256 low = _mm256_loadu_ps(INT4_VALUES), high = _mm256_loadu_ps(INT4_VALUES + LANES);
    const __m128i nibble = _mm_set1_epi8(15), even = _mm_set1_epi16(0xff);
    float unit = unit_of(scales);
    size_t i = start, end = start + inputs;
    for (; i + INT4_GROUP <= end; i += INT4_GROUP) {
        __m256 factor = _mm256_set1_ps(unit * (int8_t)scales[UNIT_BYTES + i / INT4_GROUP]);
        __m256i values = join(round_bf16(_mm256_mul_ps(low, factor)), round_bf16(_mm256_mul_ps(high, factor)));
        __m128i first = _mm256_castsi256_si128(values), second = _mm256_extracti128_si256(values, 1);
        __m128i lower = _mm_packus_epi16(_mm_and_si128(first, even), _mm_and_si128(second, even));
        __m128i upper = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(w + i / 2));
        __m128i places = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
        lower = _mm_shuffle_epi8(lower, places);
        upper = _mm_shuffle_epi8(upper, places);
        _mm_storeu_si128((__m128i *)(out + i - start), _mm_unpacklo_epi8(lower, upper));
        _mm_storeu_si128((__m128i *)(out + i - start + LANES), _mm_unpackhi_epi8(lower, upper));
    }
    expand_int4_plain(w, scales, i, end - i, out + i - start);
}

#endif

#ifdef HAS_DOT_PAIRS

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

/* What the 16 numbers stand for in two groups is computed once, and looked up. */
TARGET void expand_int4_avx512(const uint8_t *w, const uint8_t *scales, size_t start, size_t inputs, uint16_t *out) {
    const __m512 numbers = _mm512_loadu_ps(INT4_VALUES);
    const __m512i nibbles = _mm512_set1_epi32(0xf000f);
    const __m512i second = _mm512_mask_set1_epi32(_mm512_setzero_si512(), 0xff00, 0x100010);
    const int8_t *factors = (const int8_t *)scales + UNIT_BYTES + start / INT4_GROUP;
    float unit = unit_of(scales);
    w += start / 2;
    for (size_t i = 0; i < inputs; i += STEP) {
        size_t group = i / INT4_GROUP;
        float low = unit * factors[group], high = i + INT4_GROUP < inputs ? unit * factors[group + 1] : 0;
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(numbers, _mm512_set1_ps(high)),
                                                      _mm512_mul_ps(numbers, _mm512_set1_ps(low)));
        __mmask16 bytes = (__mmask16)first_bits((inputs - i + 1) / 2);
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, w + i / 2));
        __m512i each = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
        __m512i places = _mm512_or_si512(_mm512_and_si512(each, nibbles), second);
        _mm512_mask_storeu_epi16(out + i, first_bits(inputs - i), _mm512_permutexvar_epi16(places, values));
    }
}

#endif

/* One call of moe_expand_int. A ticket is PAD rows. */
typedef struct {
    const kernels *kernels;
    bool is_int8;
    const uint8_t *weights;
    const void *scales;
    size_t rows, width, group;
    uint16_t *output;
} expansion;

static void run_ticket(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, end = smaller(first + PAD, all->rows), width = all->width;
    for (size_t r = first; r < end; r++) {
        uint16_t *out = all->output + r * width;
        if (all->is_int8)
            all->kernels->expand_int8(all->weights + r * width, (const uint16_t *)all->scales + r * ceil_div(width, all->group),
                                      width, all->group, out);
        else
            all->kernels->expand_int4(all->weights + r * ceil_div(width, 2),
                                      (const uint8_t *)all->scales + r * int4_factor_bytes(width), 0, width, out);
    }
}

void moe_expand_int(moe_pool *pool, int kind, int64_t group, const void *weights, const void *scales, int64_t rows,
                    int64_t width, void *output) {
    expansion all = {
        .kernels = pool->kernels,
        .is_int8 = kind == MOE_INT8,
        .weights = weights,
        .scales = scales,
        .rows = (size_t)rows,
        .width = (size_t)width,
        .group = (size_t)group,
        .output = output,
    };
    pool_run(pool->threads, run_ticket, &all, ceil_div(all.rows, PAD));
}
