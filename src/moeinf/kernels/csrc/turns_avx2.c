/* Products in the order that torch has for weights [in, out] where oneDNN does not multiply: TURNS chains that take inputs in
 * turn. So it does with experts that lie that way in their module and as rows of outputs once they are packed (gpt-oss's in
 * MXFP4). The chains of a row are lanes of a vector, which holds two rows; of those, PAIRS are computed side by side, since each
 * addition waits for the one before. */
#include "avx2.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, PAIRS = 4, SOME = PAD };

/* x in order, of how pack_bf16 lays it out: of every 2 LANES inputs the even ones, then the odd ones. */
static void straighten(const float *x, size_t inputs, float *plain) {
    enum { STEP = 2 * LANES };
    for (size_t i = 0; i < inputs; i++)
        plain[i] = x[i / STEP * STEP + i % 2 * LANES + i % STEP / 2];
}

/* Eight inputs of two rows, a row in each half, times x. */
TARGET static inline __m256 add_eight(__m256i both, __m256 factor, __m256 x0, __m256 x1, __m256 chains) {
    __m256 first = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), both));
    __m256 second = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), both));
    chains = _mm256_fmadd_ps(_mm256_mul_ps(first, factor), x0, chains);
    return _mm256_fmadd_ps(_mm256_mul_ps(second, factor), x1, chains);
}

TARGET static inline __m256 four_twice(const float *x) {
    return _mm256_broadcast_ps((const __m128 *)x);
}

TARGET static inline __m256i both_of(const void *one, const void *other) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(one)), _mm_loadu_si128(other), 1);
}

/* A group of MXFP4 of two rows. */
TARGET static inline __m256 add_group(const uint8_t *one, const uint8_t *other, __m256 power, const float *x, __m256 chains) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)FP4_BYTES));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(FP4_BYTES + 16)));
    __m256i bytes = both_of(one, other);
    __m256i even = _mm256_and_si256(bytes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    __m256i places[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
    for (int half = 0; half < 2; half++, x += FP4_GROUP / 2) {
        __m256i low = _mm256_shuffle_epi8(lower, places[half]), high = _mm256_shuffle_epi8(upper, places[half]);
        chains = add_eight(_mm256_unpacklo_epi8(low, high), power, four_twice(x), four_twice(x + 4), chains);
        chains = add_eight(_mm256_unpackhi_epi8(low, high), power, four_twice(x + 8), four_twice(x + 12), chains);
    }
    return chains;
}

/* The powers of groups of MXFP4, those of 2 * PAIRS rows side by side. */
static void write_powers(const uint8_t *const *scales, size_t groups, float *powers) {
    for (size_t r = 0; r < 2 * PAIRS; r++)
        for (size_t g = 0; g < groups; g++)
            powers[g * 2 * PAIRS + r] = from_e8m0(scales[r][g]);
}

/* The end of row r of them, of which `count` inputs are left: those that fill no turn belong to the first chain. */
TARGET static float end_row(const __m256 *chains, size_t r, const uint16_t *w, size_t count, const float *x) {
    float each[TURNS];
    _mm_storeu_ps(each, r % 2 == 0 ? _mm256_castps256_ps128(chains[r / 2]) : _mm256_extractf128_ps(chains[r / 2], 1));
    for (size_t i = 0; i < count; i++)
        each[i / TURNS * TURNS == count / TURNS * TURNS ? 0 : i % TURNS] += from_bf16(w[i]) * x[i];
    return each[0] + each[1] + each[2] + each[3];
}

/* Rows for each of PAIRS, or fewer, and then the last one again. */
TARGET static void dot_mxfp4_rows(const matrix *w, size_t first, size_t rows, const float *x, float *out) {
    size_t width = w->width, groups = width / FP4_GROUP;
    const uint8_t *row[2 * PAIRS], *scales[2 * PAIRS];
    float powers[groups * 2 * PAIRS];
    __m256 chains[PAIRS];
    __m256i which[PAIRS];
    for (size_t r = 0; r < 2 * PAIRS; r++) {
        size_t number = first + smaller(r, rows - 1);
        row[r] = (const uint8_t *)w->numbers + number * width / 2;
        scales[r] = (const uint8_t *)w->scales + number * groups;
    }
    for (int k = 0; k < PAIRS; k++) {
        chains[k] = _mm256_setzero_ps();
        which[k] = _mm256_setr_epi32(2 * k, 2 * k, 2 * k, 2 * k, 2 * k + 1, 2 * k + 1, 2 * k + 1, 2 * k + 1);
    }
    write_powers(scales, groups, powers);
    for (size_t g = 0; g < groups; g++) {
        __m256 all = _mm256_loadu_ps(powers + g * 2 * PAIRS);
#pragma GCC unroll 4
        for (size_t k = 0; k < PAIRS; k++)
            chains[k] = add_group(row[2 * k] + g * FP4_GROUP / 2, row[2 * k + 1] + g * FP4_GROUP / 2,
                                  _mm256_permutevar8x32_ps(all, which[k]), x + g * FP4_GROUP, chains[k]);
    }
    for (size_t r = 0; r < rows; r++)
        out[r] = end_row(chains, r, NULL, 0, NULL);
}

/* The same of any other weight, which is expanded first. */
TARGET static void dot_rows(const matrix *w, size_t first, size_t rows, const float *x, float *out) {
    __m256 chains[PAIRS];
    size_t width = w->width, whole = width / SOME * SOME;
    uint16_t some[2 * PAIRS][SOME];
    for (size_t k = 0; k < PAIRS; k++)
        chains[k] = _mm256_setzero_ps();
    for (size_t i = 0; i < whole; i += SOME) {
        put_rows_avx2(w, first, rows, i, SOME, some[0], SOME);
        for (size_t k = 0; k < PAIRS; k++)
            for (size_t n = 0; n < SOME; n += LANES) {
                __m256i both = both_of(some[smaller(2 * k, rows - 1)] + n, some[smaller(2 * k + 1, rows - 1)] + n);
                chains[k] = add_eight(both, _mm256_set1_ps(1), four_twice(x + i + n), four_twice(x + i + n + 4), chains[k]);
            }
    }
    if (whole < width)
        put_rows_avx2(w, first, rows, whole, width - whole, some[0], SOME);
    for (size_t r = 0; r < rows; r++)
        out[r] = end_row(chains, r, some[r], width - whole, x + whole);
}

TARGET void dot_turns(const matrix *w, size_t first, size_t rows, int64_t chain, const void *packed, float *out) {
    float x[w->width];
    (void)chain;
    straighten(packed, w->width, x);
    for (size_t r = 0; r < rows; r += 2 * PAIRS)
        (w->kind == MOE_MXFP4 ? dot_mxfp4_rows : dot_rows)(w, first + r, smaller(2 * PAIRS, rows - r), x, out + r);
}

#endif
