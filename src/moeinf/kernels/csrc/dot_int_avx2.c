/* Weights of 8 and 4 bits times x, in whole numbers (whole_numbers.h), where the processor multiplies and adds numbers of 16
 * bits (AVX2). Those of 8 bits are widened. Those of 4 bits are looked up in place: of the four that share a half-word, each
 * becomes a place alone in it, and a table without signs, whose first number is 0, leaves the upper byte 0; what that adds to
 * the sum is taken off beforehand. Memory is asked for those of 4 bits AHEAD bytes before they are read. */
#include "avx2.h"
#include "whole_numbers.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, WORDS = 16, PER = 4, STEP = PER * WORDS, OFFSET = 127, SCALES = 8, TOGETHER = 2, AHEAD = 4096 };

/* x for GROUP weights of 8 bits. */
typedef struct {
    int16_t numbers[GROUP];
    float factor;
} eights;
_Static_assert(sizeof(eights) == EIGHTS_BYTES, "kernels.h tells others how large they are");

/* x for STEP weights of 4 bits: those of each place in a half-word. */
typedef struct {
    int16_t numbers[PER][WORDS];
    int32_t begin[LANES];
    float factors[LANES];
} fours;
_Static_assert(sizeof(fours) == FOURS_BYTES, "kernels.h tells others how large they are");

void pack_int8_avx2(const float *values, size_t count, void *packed) {
    eights *to = packed;
    memset(to, 0, PAD / GROUP * sizeof *to);
    for (size_t first = 0; first < count; first += GROUP, to++) {
        size_t size = smaller(GROUP, count - first);
        group_scale scale = find_scale(values + first, size);
        for (size_t i = 0; i < size; i++)
            to->numbers[i] = (int16_t)to_whole(values[first + i], scale).whole;
        to->factor = scale.factor;
    }
}

void pack_int4_avx2(const float *values, size_t count, void *packed) {
    fours *all = packed;
    memset(all, 0, PAD / STEP * sizeof *all);
    for (size_t first = 0; first < count; first += GROUP) {
        size_t end = first + smaller(GROUP, count - first);
        group_scale scale = find_scale(values + first, end - first);
        for (size_t i = first; i < end; i++) {
            fours *to = all + i / STEP;
            size_t lane = i % STEP / (STEP / LANES);
            int32_t whole = to_whole(values[i], scale).whole;
            to->numbers[i % PER][i % STEP / PER] = (int16_t)whole;
            to->begin[lane] -= OFFSET * whole;
            to->factors[lane] = scale.factor;
        }
    }
}

/* GROUP weights of each of `together` rows, which share what is read of x. */
TARGET static inline __attribute__((always_inline)) void add_eights(const uint8_t *const *w, size_t i, float (*scales)[SCALES],
                                                                    size_t scale, size_t together, const eights *x,
                                                                    __m256 *sums) {
    __m256i x0 = _mm256_loadu_si256((const __m256i *)x->numbers), x1 = _mm256_loadu_si256((const __m256i *)(x->numbers + WORDS));
    __m256 factor = _mm256_broadcast_ss(&x->factor);
#pragma GCC unroll 2
    for (size_t r = 0; r < together; r++) {
        __m256i first = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w[r] + i))), x0);
        __m256i second = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w[r] + i + WORDS))), x1);
        __m256 factors = _mm256_mul_ps(_mm256_broadcast_ss(scales[r] + scale), factor);
        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(first, second)), factors, sums[r]);
    }
}

/* The scales of the next groups of 32 or 64, for each GROUP of a row one. */
TARGET static inline void load_scales(const uint16_t *scales, size_t count, float *out) {
    uint16_t some[SCALES] = {0};
    if (count < SCALES) {
        memcpy(some, scales, count * sizeof *scales);
        scales = some;
    }
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales)));
}

/* `together` rows, `apart` from each other; this and `group` are constants. */
TARGET static inline __attribute__((always_inline)) void dot_eights(const uint8_t *w, const uint16_t *scales, size_t width,
                                                                    size_t group, size_t together, size_t apart,
                                                                    const eights *x, float *out) {
    const size_t per = group / GROUP, step = SCALES * group, row_scales = (width + group - 1) / group;
    const uint8_t *row[TOGETHER];
    __m256 sums[TOGETHER];
    float some[TOGETHER][SCALES];
    for (size_t r = 0; r < together; r++) {
        row[r] = w + r * apart * width;
        sums[r] = _mm256_setzero_ps();
    }
    size_t i = 0;
    for (; i + step <= width; i += step) {
        for (size_t r = 0; r < together; r++)
            load_scales(scales + r * apart * row_scales + i / group, SCALES, some[r]);
#pragma GCC unroll 16
        for (size_t k = 0; k < SCALES * per; k++)
            add_eights(row, i + k * GROUP, some, k / per, together, x + i / GROUP + k, sums);
    }
    for (size_t r = 0; r < together; r++) {
        if (i < width)
            load_scales(scales + r * apart * row_scales + i / group, row_scales - i / group, some[r]);
        for (size_t at = i; at < width; at += GROUP) {
            uint8_t last[GROUP] = {0};
            const uint8_t *only = last;
            memcpy(last, row[r] + at, smaller(GROUP, width - at));
            add_eights(&only, 0, some + r, (at - i) / group, 1, x + at / GROUP, sums + r);
        }
        out[r * apart] = fold_avx2(sums[r]);
    }
}

TARGET static inline __attribute__((always_inline)) void dot_all(const uint8_t *w, const uint16_t *scales, size_t width,
                                                                 size_t group, size_t rows, const eights *x, float *out) {
    size_t part = rows / TOGETHER, row_scales = (width + group - 1) / group;
    for (size_t r = 0; r < part; r++)
        dot_eights(w + r * width, scales + r * row_scales, width, group, TOGETHER, part, x, out + r);
    for (size_t r = part * TOGETHER; r < rows; r++)
        dot_eights(w + r * width, scales + r * row_scales, width, group, 1, 0, x, out + r);
}

TARGET void dot_int8_avx2(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows, const void *packed,
                      float *out) {
    if (group == GROUP)
        dot_all(w, scales, width, GROUP, rows, packed, out);
    else
        dot_all(w, scales, width, 2 * GROUP, rows, packed, out);
}

/* The factors of STEP weights, without the unit. */
TARGET static inline __m256 load_factors(const uint8_t *factors) {
    int32_t four;
    memcpy(&four, factors, sizeof four);
    __m128i bytes = _mm_cvtsi32_si128(four);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpacklo_epi8(bytes, bytes)));
}

TARGET static inline __attribute__((always_inline)) void add_fours(const uint8_t *const *w, const uint8_t *const *factors,
                                                                   size_t i, size_t together, const fours *x, __m256i table,
                                                                   __m256 *sums) {
    const __m256i nibble = _mm256_set1_epi16(15);
    __m256i each[TOGETHER], words[TOGETHER];
    for (size_t r = 0; r < together; r++) {
        words[r] = _mm256_loadu_si256((const __m256i *)(w[r] + i / 2));
        each[r] = _mm256_loadu_si256((const __m256i *)x->begin);
    }
#pragma GCC unroll 4
    for (int k = 0; k < PER; k++) {
        __m256i numbers = _mm256_loadu_si256((const __m256i *)x->numbers[k]);
#pragma GCC unroll 2
        for (size_t r = 0; r < together; r++) {
            __m256i places = _mm256_srli_epi16(words[r], 4 * k);
            if (k + 1 < PER)
                places = _mm256_and_si256(places, nibble);
            each[r] = _mm256_add_epi32(each[r], _mm256_madd_epi16(_mm256_shuffle_epi8(table, places), numbers));
        }
    }
    for (size_t r = 0; r < together; r++) {
        __m256 factor = _mm256_mul_ps(load_factors(factors[r] + i / INT4_GROUP), _mm256_loadu_ps(x->factors));
        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(each[r]), factor, sums[r]);
    }
}

/* The same as dot_eights. */
TARGET static inline __attribute__((always_inline)) void dot_fours(const uint8_t *w, const uint8_t *scales, size_t width,
                                                                   size_t together, size_t apart, const fours *x, float *out) {
    const __m128i numbers = _mm_add_epi8(_mm_loadu_si128((const __m128i *)INT4_BYTES), _mm_set1_epi8(OFFSET));
    const __m256i table = _mm256_broadcastsi128_si256(numbers);
    size_t row_bytes = (width + 1) / 2, row_scales = int4_factor_bytes(width), i = 0;
    const uint8_t *row[TOGETHER], *factors[TOGETHER];
    __m256 sums[TOGETHER];
    for (size_t r = 0; r < together; r++) {
        row[r] = w + r * apart * row_bytes;
        factors[r] = scales + r * apart * row_scales + UNIT_BYTES;
        sums[r] = _mm256_setzero_ps();
    }
    for (; i + STEP <= width; i += STEP, x++) {
        for (size_t r = 0; r < together; r++)
            _mm_prefetch((const char *)row[r] + i / 2 + AHEAD, _MM_HINT_T0);
        add_fours(row, factors, i, together, x, table, sums);
    }
    for (size_t r = 0; r < together; r++) {
        if (i < width) {
            uint8_t last[STEP / 2] = {0}, last_factors[STEP / INT4_GROUP] = {0};
            const uint8_t *only[2] = {last, last_factors};
            memcpy(last, row[r] + i / 2, row_bytes - i / 2);
            memcpy(last_factors, factors[r] + i / INT4_GROUP, row_scales - UNIT_BYTES - i / INT4_GROUP);
            add_fours(only, only + 1, 0, 1, x, table, sums + r);
        }
        out[r * apart] = fold_avx2(sums[r]) * unit_of(scales + r * apart * row_scales);
    }
}

TARGET void dot_int4_avx2(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    size_t part = rows / TOGETHER, row_bytes = (width + 1) / 2, row_scales = int4_factor_bytes(width);
    for (size_t r = 0; r < part; r++)
        dot_fours(w + r * row_bytes, scales + r * row_scales, width, TOGETHER, part, packed, out + r);
    for (size_t r = part * TOGETHER; r < rows; r++)
        dot_fours(w + r * row_bytes, scales + r * row_scales, width, 1, 0, packed, out + r);
}

#endif
