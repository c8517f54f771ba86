/* Products in the order that torch has for weights [in, out] where oneDNN does not multiply: TURNS chains that take inputs in
 * turn. So it does with experts that lie that way in their module and as rows of outputs once they are packed (gpt-oss's in
 * MXFP4). The chains of a row are lanes of vectors that hold several rows, of which some are computed side by side, since each
 * addition waits for the one before. */
#include "avx2.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, TOGETHER = 8, PAIRS = TOGETHER / 2, SOME = PAD };

/* Of MXFP4: rows in a block, which are a vector for even inputs and one for odd ones; and as many groups as there is room for. */
enum { BLOCK = 4, BLOCKS = TOGETHER / BLOCK, MOST_GROUPS = 512, ROOM = MOST_GROUPS + LANES };

/* Powers of weights and of inputs for which chains can be kept in units of a power (add_group). */
enum { LEAST_POWER = 127 - 40, MOST_POWER = 127 + 40, MOST_INPUT = 60 };

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

/* The end of row r of them, of which `count` inputs are left: those that fill no turn belong to the first chain. */
TARGET static float end_row(const __m256 *chains, size_t r, const uint16_t *w, size_t count, const float *x) {
    float each[TURNS];
    _mm_storeu_ps(each, r % 2 == 0 ? _mm256_castps256_ps128(chains[r / 2]) : _mm256_extractf128_ps(chains[r / 2], 1));
    for (size_t i = 0; i < count; i++)
        each[i / TURNS * TURNS == count / TURNS * TURNS ? 0 : i % TURNS] += from_bf16(w[i]) * x[i];
    return each[0] + each[1] + each[2] + each[3];
}

/* The inputs of every four that are even, and those that are odd, for each of the rows of a vector: of x as pack_bf16 lays it
 * out, which has them together. */
TARGET static void spread_out(const float *packed, size_t inputs, float *spread) {
    enum { STEP = 2 * LANES };
    for (size_t i = 0; i < inputs; i += STEP)
        for (size_t two = 0; two < LANES; two += 2, spread += STEP) {
            const double *even = (const double *)(packed + i + two), *odd = (const double *)(packed + i + LANES + two);
            _mm256_storeu_ps(spread, _mm256_castpd_ps(_mm256_broadcast_sd(even)));
            _mm256_storeu_ps(spread + LANES, _mm256_castpd_ps(_mm256_broadcast_sd(odd)));
        }
}

/* Whether all of x is 0 or of a size that leaves room for powers. */
TARGET static bool is_moderate(const float *x, size_t count) {
    const __m256i zero = _mm256_setzero_si256(), size = _mm256_set1_epi32(0x7f800000);
    const __m256i least = _mm256_set1_epi32((127 - MOST_INPUT) << 23), most = _mm256_set1_epi32((127 + MOST_INPUT) << 23);
    __m256i others = zero;
    for (size_t i = 0; i < count; i += LANES) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i)), exponents = _mm256_and_si256(bits, size);
        __m256i is_other = _mm256_or_si256(_mm256_cmpgt_epi32(least, exponents), _mm256_cmpgt_epi32(exponents, most));
        __m256i is_zero = _mm256_cmpeq_epi32(_mm256_slli_epi32(bits, 1), zero);
        others = _mm256_or_si256(others, _mm256_andnot_si256(is_zero, is_other));
    }
    return _mm256_testz_si256(others, others);
}

/* By how much a row's power is smaller from group to group, and in the end by how much the last one is larger than 1. Whether
 * all are moderate. */
TARGET static bool write_ratios(const uint8_t *scales, size_t groups, uint32_t *ratios) {
    uint8_t least = scales[0], most = scales[0];
    for (size_t g = 0; g < groups; g++) {
        least = scales[g] < least ? scales[g] : least;
        most = scales[g] > most ? scales[g] : most;
    }
    ratios[0] = (uint32_t)127 << 23;
    for (size_t g = 1; g < groups; g++)
        ratios[g] = (uint32_t)(127 + scales[g - 1] - scales[g]) << 23;
    ratios[groups] = (uint32_t)scales[groups - 1] << 23;
    return least >= LEAST_POWER && most <= MOST_POWER;
}

/* What a block's rows have in the same place, for the lanes of each. */
TARGET static inline __m256 of_rows(uint32_t ratios[BLOCK][ROOM], size_t place) {
    __m256 each[BLOCK];
    for (size_t r = 0; r < BLOCK; r++)
        each[r] = _mm256_broadcast_ss((const float *)&ratios[r][place]);
    return _mm256_blend_ps(_mm256_blend_ps(each[0], each[1], 0x0c), _mm256_blend_ps(each[2], each[3], 0xc0), 0xf0);
}

/* The chains of a block: of rows one and two, three and four, those of inputs 0 and 2 of every four, and those of 1 and 3. */
typedef struct {
    __m256 even, odd;
} block;

/* Two steps, of which a word has the weights in its lower and its upper half. */
TARGET static inline __m256 add_steps(__m256i weights, const float *x, __m256 chains) {
    chains = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)), _mm256_loadu_ps(x), chains);
    weights = _mm256_and_si256(weights, _mm256_set1_epi32((int)0xffff0000));
    return _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_loadu_ps(x + 2 * LANES), chains);
}

/* Four steps, of weights that have these places in the table. */
TARGET static inline __m256 add_places(__m256i places, const float *x, __m256 chains) {
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)FP4_BYTES));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(FP4_BYTES + 16)));
    __m256i low = _mm256_shuffle_epi8(lower, places), high = _mm256_shuffle_epi8(upper, places);
    chains = add_steps(_mm256_unpacklo_epi8(low, high), x, chains);
    return add_steps(_mm256_unpackhi_epi8(low, high), x + 4 * LANES, chains);
}

/* Half a group of four rows, of which a vector has eight bytes each. */
TARGET static inline block add_half(__m256i bytes, const float *x, block chains) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15));
    const __m256i nibble = _mm256_set1_epi8(15);
    bytes = _mm256_shuffle_epi8(bytes, order);
    chains.even = add_places(_mm256_and_si256(bytes, nibble), x, chains.even);
    chains.odd = add_places(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), x + LANES, chains.odd);
    return chains;
}

/* A group of four rows, so many bytes apart. Chains are in units of a group's power: that is a factor of all that is added, and
 * no rounding depends on it as long as nothing is too large or too small, so it is taken off them once and not put on each
 * weight. */
TARGET static inline block add_group(const uint8_t *w, size_t stride, const float *x, __m256 ratio, block chains) {
    __m256i outer = both_of(w, w + 2 * stride), inner = both_of(w + stride, w + 3 * stride);
    chains = (block){_mm256_mul_ps(chains.even, ratio), _mm256_mul_ps(chains.odd, ratio)};
    chains = add_half(_mm256_unpacklo_epi64(outer, inner), x, chains);
    return add_half(_mm256_unpackhi_epi64(outer, inner), x + FP4_GROUP / 2 * TURNS, chains);
}

/* TOGETHER rows of MXFP4 from `first` on. Whether their powers are moderate; if not, nothing is done. */
TARGET static bool dot_mxfp4_rows(const matrix *w, size_t first, const float *x, float *out) {
    size_t groups = w->width / FP4_GROUP, stride = w->width / 2;
    const uint8_t *numbers = (const uint8_t *)w->numbers + first * stride;
    uint32_t ratios[BLOCKS][BLOCK][ROOM];
    block chains[BLOCKS];
    for (size_t r = 0; r < TOGETHER; r++)
        if (!write_ratios((const uint8_t *)w->scales + (first + r) * groups, groups, ratios[r / BLOCK][r % BLOCK]))
            return false;
#pragma GCC unroll 2
    for (size_t k = 0; k < BLOCKS; k++)
        chains[k] = (block){_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t g = 0; g < groups; g++, numbers += FP4_GROUP / 2, x += FP4_GROUP * TURNS)
#pragma GCC unroll 2
        for (size_t k = 0; k < BLOCKS; k++)
            chains[k] = add_group(numbers + k * BLOCK * stride, stride, x, of_rows(ratios[k], g), chains[k]);
#pragma GCC unroll 2
    for (size_t k = 0; k < BLOCKS; k++) {
        __m256 powers = of_rows(ratios[k], groups);
        float even[LANES], odd[LANES];
        _mm256_storeu_ps(even, _mm256_mul_ps(chains[k].even, powers));
        _mm256_storeu_ps(odd, _mm256_mul_ps(chains[k].odd, powers));
        for (size_t r = 0; r < BLOCK; r++)
            *out++ = even[2 * r] + odd[2 * r] + even[2 * r + 1] + odd[2 * r + 1];
    }
    return true;
}

/* The same of any other weight, which is expanded first. */
TARGET static void dot_rows(const matrix *w, size_t first, size_t rows, const float *x, float *out) {
    __m256 chains[PAIRS];
    size_t width = w->width, whole = width / SOME * SOME;
    uint16_t some[TOGETHER][SOME];
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
    bool fits = w->kind == MOE_MXFP4 && w->width <= MOST_GROUPS * FP4_GROUP && is_moderate(packed, w->width);
    float spread[fits ? w->width * TURNS : 1], x[w->width];
    bool is_straight = false;
    (void)chain;
    if (fits)
        spread_out(packed, w->width, spread);
    for (size_t r = 0, count; r < rows; r += count) {
        count = smaller(TOGETHER, rows - r);
        if (fits && count == TOGETHER && dot_mxfp4_rows(w, first + r, spread, out + r))
            continue;
        if (!is_straight)
            straighten(packed, w->width, x);
        is_straight = true;
        dot_rows(w, first + r, count, x, out + r);
    }
}

#endif
