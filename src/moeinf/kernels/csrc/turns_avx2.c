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

/* Exponents of weights' powers and of inputs with which chains can be kept in units of a power (dot_mxfp4_rows). In the smallest
 * unit the sum of as many of the largest products as there is room for is below 2^128; in the largest one all are multiples of
 * 2^-148. */
enum { LEAST_POWER = 127 - 40, MOST_POWER = 127 + 40, LEAST_INPUT = 127 - 60, MOST_INPUT = 127 + 28 };

/* x in order, of how pack_bf16 lays it out: of every 2 LANES inputs the even ones, then the odd ones. */
static void straighten(const float *x, size_t inputs, float *plain) {
    enum { STEP = 2 * LANES };
    for (size_t i = 0; i < inputs; i++)
        plain[i] = x[i / STEP * STEP + i % 2 * LANES + i % STEP / 2];
}

/* Eight inputs of two rows, a row in each half, times x. */
TARGET static inline __m256 add_eight(__m256i both, __m256 x0, __m256 x1, __m256 chains) {
    __m256 first = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), both));
    __m256 second = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), both));
    chains = _mm256_fmadd_ps(first, x0, chains);
    return _mm256_fmadd_ps(second, x1, chains);
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

/* Whether all of x is 0 or of a size that leaves room for powers. */
TARGET static bool is_moderate(const float *x, size_t count) {
    const __m256i zero = _mm256_setzero_si256(), size = _mm256_set1_epi32(0x7f800000);
    const __m256i least = _mm256_set1_epi32(LEAST_INPUT << 23), most = _mm256_set1_epi32(MOST_INPUT << 23);
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

/* Two inputs that follow each other in x, for each of the rows of a vector. */
TARGET static inline __m256 two_of(const float *x) {
    return _mm256_castpd_ps(_mm256_broadcast_sd((const double *)x));
}

/* Four steps, of weights of each block that have these places in the table. */
TARGET static inline void add_places(const __m256i places[BLOCKS], const float *x, __m256 chains[BLOCKS]) {
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)FP4_BYTES));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(FP4_BYTES + 16)));
    __m256i weights[2][BLOCKS]; /* of two steps, one in the lower half of a word, one in the upper */
    for (size_t k = 0; k < BLOCKS; k++) {
        __m256i low = _mm256_shuffle_epi8(lower, places[k]), high = _mm256_shuffle_epi8(upper, places[k]);
        weights[0][k] = _mm256_unpacklo_epi8(low, high);
        weights[1][k] = _mm256_unpackhi_epi8(low, high);
    }
    for (size_t two = 0; two < 2; two++, x += 4) {
        __m256 first = two_of(x), second = two_of(x + 2);
        for (size_t k = 0; k < BLOCKS; k++) {
            __m256i late = _mm256_and_si256(weights[two][k], _mm256_set1_epi32((int)0xffff0000));
            chains[k] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights[two][k], 16)), first, chains[k]);
            chains[k] = _mm256_fmadd_ps(_mm256_castsi256_ps(late), second, chains[k]);
        }
    }
}

/* Half a group of the rows of each block, of which a vector has eight bytes each; `even` are chains of inputs 0 and 2 of every
 * four, `odd` those of 1 and 3, for rows one and two, three and four. x has the even ones of 2 LANES inputs, then the odd ones. */
TARGET static inline void add_half(const __m256i bytes[BLOCKS], const float *x, __m256 even[BLOCKS], __m256 odd[BLOCKS]) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15));
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i first[BLOCKS], second[BLOCKS];
    for (size_t k = 0; k < BLOCKS; k++) {
        __m256i ordered = _mm256_shuffle_epi8(bytes[k], order);
        first[k] = _mm256_and_si256(ordered, nibble);
        second[k] = _mm256_and_si256(_mm256_srli_epi16(ordered, 4), nibble);
    }
    add_places(first, x, even);
    add_places(second, x + LANES, odd);
}

/* TOGETHER rows of MXFP4 from `first` on. Whether their powers are moderate; if not, nothing is done.
 *
 * Chains are in units of a group's power: that is a factor of all that is added, and no rounding depends on it as long as nothing
 * is too large or too small, so it is taken off them once and not put on each weight. */
TARGET static bool dot_mxfp4_rows(const matrix *w, size_t first, size_t rows, const float *x, float *out) {
    size_t groups = w->width / FP4_GROUP, stride = w->width / 2;
    const uint8_t *numbers = (const uint8_t *)w->numbers + first * stride;
    uint32_t ratios[BLOCKS][BLOCK][ROOM];
    __m256 even[BLOCKS], odd[BLOCKS];
    if (rows < TOGETHER || groups > MOST_GROUPS)
        return false;
    for (size_t r = 0; r < TOGETHER; r++)
        if (!write_ratios((const uint8_t *)w->scales + (first + r) * groups, groups, ratios[r / BLOCK][r % BLOCK]))
            return false;
    for (size_t k = 0; k < BLOCKS; k++)
        even[k] = odd[k] = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++, numbers += FP4_GROUP / 2, x += FP4_GROUP) {
        __m256i early[BLOCKS], late[BLOCKS];
        for (size_t k = 0; k < BLOCKS; k++) {
            const uint8_t *rows = numbers + k * BLOCK * stride;
            __m256i outer = both_of(rows, rows + 2 * stride), inner = both_of(rows + stride, rows + 3 * stride);
            __m256 ratio = of_rows(ratios[k], g);
            early[k] = _mm256_unpacklo_epi64(outer, inner);
            late[k] = _mm256_unpackhi_epi64(outer, inner);
            even[k] = _mm256_mul_ps(even[k], ratio);
            odd[k] = _mm256_mul_ps(odd[k], ratio);
        }
        add_half(early, x, even, odd);
        add_half(late, x + FP4_GROUP / 2, even, odd);
    }
    for (size_t k = 0; k < BLOCKS; k++) {
        __m256 powers = of_rows(ratios[k], groups);
        float evens[LANES], odds[LANES];
        _mm256_storeu_ps(evens, _mm256_mul_ps(even[k], powers));
        _mm256_storeu_ps(odds, _mm256_mul_ps(odd[k], powers));
        for (size_t r = 0; r < BLOCK; r++)
            *out++ = evens[2 * r] + odds[2 * r] + evens[2 * r + 1] + odds[2 * r + 1];
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
                chains[k] = add_eight(both, four_twice(x + i + n), four_twice(x + i + n + 4), chains[k]);
            }
    }
    if (whole < width)
        put_rows_avx2(w, first, rows, whole, width - whole, some[0], SOME);
    for (size_t r = 0; r < rows; r++)
        out[r] = end_row(chains, r, some[r], width - whole, x + whole);
}

TARGET void dot_turns(const matrix *w, size_t first, size_t rows, int64_t chain, const void *packed, float *out) {
    bool fits = w->kind == MOE_MXFP4 && is_moderate(packed, w->width), is_straight = false;
    float x[w->width];
    (void)chain;
    for (size_t r = 0, count; r < rows; r += count) {
        count = smaller(TOGETHER, rows - r);
        if (fits && dot_mxfp4_rows(w, first + r, count, packed, out + r))
            continue;
        if (!is_straight)
            straighten(packed, w->width, x);
        is_straight = true;
        dot_rows(w, first + r, count, x, out + r);
    }
}

#endif
