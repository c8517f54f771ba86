/* MXFP4 times bfloat16: dot_pairs.c's sums, to the last bit, of weights that are expanded in registers.
 *
 * Four pairs of weights share a word, so a quarter of the loads and of the transposing serves for as many products. A
 * table gives a weight's bfloat16 as if the power of its group were the largest there may be; what that is too much is
 * taken off the exponent. */
#include "pairs.h"

#ifdef HAS_DOT_PAIRS

#include <stdbool.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

enum {
    TOGETHER = 2,               /* sixteens of rows: one chain alone would wait for itself */
    GROUPS = CHAIN / FP4_GROUP, /* of a row in a chain */
    LARGEST = 252,              /* of powers: 6 times the next one is infinite */
    SMALLEST = 2,               /* half of the one before is below what an exponent can say */
};

/* The bytes of 16 rows, so many apart, `count` of each up to 16: words[i] will have word i of row r in lane r. */
TARGET static inline void transpose_few(const uint8_t *rows, size_t stride, size_t count, __m512i words[4]) {
    __m512i fours[4];
    __mmask16 which = (__mmask16)((1u << count) - 1);
    for (size_t j = 0; j < 4; j++) {
        const uint8_t *row = rows + j * stride;
        fours[j] = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(which, row));
        fours[j] = _mm512_inserti32x4(fours[j], _mm_maskz_loadu_epi8(which, row + 4 * stride), 1);
        fours[j] = _mm512_inserti32x4(fours[j], _mm_maskz_loadu_epi8(which, row + 8 * stride), 2);
        fours[j] = _mm512_inserti32x4(fours[j], _mm_maskz_loadu_epi8(which, row + 12 * stride), 3);
    }
    __m512i low01 = _mm512_unpacklo_epi32(fours[0], fours[1]), high01 = _mm512_unpackhi_epi32(fours[0], fours[1]);
    __m512i low23 = _mm512_unpacklo_epi32(fours[2], fours[3]), high23 = _mm512_unpackhi_epi32(fours[2], fours[3]);
    words[0] = _mm512_unpacklo_epi64(low01, low23);
    words[1] = _mm512_unpackhi_epi64(low01, low23);
    words[2] = _mm512_unpacklo_epi64(high01, high23);
    words[3] = _mm512_unpackhi_epi64(high01, high23);
}

/* Both halves of every word become what these two of its bytes are; 0x80 stands for 0. */
TARGET static inline __m512i spread(__m512i words, int first, int second) {
    __m512i begins = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    __m512i which = _mm512_set1_epi32((int)((uint32_t)(first | second << 8) * 0x00010001u));
    return _mm512_shuffle_epi8(words, _mm512_or_si512(begins, which));
}

/* FP4_VALUES, twice, times 2 ^ (LARGEST - 127), in bfloat16. There is no -0, from which nothing can be taken; it adds what
 * 0 adds. */
static const uint16_t TABLE[32] = {
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40, 0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40, 0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
};

/* One group, the slow way. */
static void expand(const uint8_t *w, uint8_t scale, uint16_t *out) {
    float power = from_e8m0(scale);
    for (int i = 0; i < FP4_GROUP; i++)
        out[i] = to_bf16(FP4_VALUES[i % 2 ? w[i / 2] >> 4 : w[i / 2] & 15] * power);
}

/* Four weights of each of 16 rows, which a word has in its half `half`, as pairs; `below`: how far the rows' powers are below
 * the table's, as bfloat16 has exponents. */
TARGET static inline void expand_four(__m512i words, int half, __m512i below, __m512i pairs[2]) {
    /* Each half of a word has four weights: of the first two and of the others, one in each half is moved to the lowest bits,
     * where the table is looked into; its second half makes it no matter what the next bit is. */
    const __m512i table = _mm512_loadu_si512(TABLE);
    __m512i four = spread(words, half * 2, half * 2 + 1);
    __m512i early = _mm512_srlv_epi16(four, _mm512_set1_epi32(4 << 16));
    __m512i late = _mm512_mulhi_epu16(four, _mm512_set1_epi32(1 << (4 + 16) | 1 << 8));
    pairs[0] = _mm512_subs_epu16(_mm512_permutexvar_epi16(early, table), below);
    pairs[1] = _mm512_subs_epu16(_mm512_permutexvar_epi16(late, table), below);
}

/* How far the rows' powers are below the table's, of a byte of each word; whether some are too small or too large for its
 * arithmetic. */
TARGET static inline bool measure(__m512i exponents, int byte, __m512i *below) {
    __m512i powers = spread(exponents, byte, 0x80);
    *below = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(LARGEST), powers), 7);
    __m512i above = _mm512_sub_epi16(powers, _mm512_set1_epi16(SMALLEST));
    return _mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16(LARGEST - SMALLEST)) != 0;
}

/* Adds a group of `sets` sixteens of rows to their chains. */
TARGET static inline void add_group(const uint8_t *w, size_t stride, size_t sets, const __m512i *below,
                                    const uint16_t *x, __m512 *chains) {
    __m512i words[TOGETHER][4];
    for (size_t s = 0; s < sets; s++)
        transpose_few(w + s * ROWS * stride, stride, FP4_GROUP / 2, words[s]);
    for (int i = 0; i < FP4_GROUP / 4; i++, x += 4)
        for (size_t s = 0; s < sets; s++) {
            __m512i pairs[2];
            expand_four(words[s][i / 2], i % 2, below[s], pairs);
            chains[s] = add_pair(pairs[1], x + 2, add_pair(pairs[0], x, chains[s]));
        }
}

/* The same of rows some of whose powers are so small or large that the table's arithmetic does not hold. */
TARGET static void add_tiny(const uint8_t *w, size_t stride, const uint8_t *scales, size_t scale_stride, size_t sets,
                            const uint16_t *x, __m512 *chains) {
    for (size_t s = 0; s < sets; s++) {
        uint16_t rows[ROWS][FP4_GROUP];
        for (size_t r = 0; r < ROWS; r++, w += stride, scales += scale_stride)
            expand(w, *scales, rows[r]);
        chains[s] = add_step((const char *)rows, sizeof rows[0], x, chains[s]);
    }
}

/* One chain of `sets` sixteens of rows; it has `count` groups. Fetches as much as it reads, from `next` on. */
TARGET static inline void add_chains(const uint8_t *w, size_t stride, const uint8_t *scales, size_t scale_stride,
                                     size_t count, size_t sets, const uint16_t *x, const char *next,
                                     __m512 *chains) {
    __m512i exponents[TOGETHER][4];
    for (size_t s = 0; s < sets; s++)
        transpose_few(scales + s * ROWS * scale_stride, scale_stride, count, exponents[s]);
    for (size_t g = 0; g < count; g++) {
        __m512i below[TOGETHER];
        bool is_tiny = false;
        for (size_t s = 0; s < sets; s++)
            is_tiny |= measure(exponents[s][g / 4], (int)(g % 4), &below[s]);
        for (size_t line = 0; line < sets * ROWS * FP4_GROUP / 2 / LINE_BYTES; line++, next += LINE_BYTES)
            _mm_prefetch(next, _MM_HINT_T1);
        if (is_tiny)
            add_tiny(w + g * FP4_GROUP / 2, stride, scales + g, scale_stride, sets, x + g * FP4_GROUP, chains);
        else
            add_group(w + g * FP4_GROUP / 2, stride, sets, below, x + g * FP4_GROUP, chains);
    }
}

TARGET void write_mxfp4(const uint8_t *w, const uint8_t *scales, size_t width, size_t start, size_t inputs, void *words) {
    size_t stride = width / 2, scale_stride = width / FP4_GROUP, groups = inputs / FP4_GROUP;
    __m512i *pairs = words, exponents[4], below;
    w += start / 2;
    scales += start / FP4_GROUP;
    transpose_few(scales, scale_stride, groups, exponents);
    for (size_t g = 0; g < groups; g++, w += FP4_GROUP / 2, pairs += FP4_GROUP / 2) {
        if (measure(exponents[g / 4], (int)(g % 4), &below)) {
            uint16_t rows[ROWS][FP4_GROUP];
            for (size_t r = 0; r < ROWS; r++)
                expand(w + r * stride, scales[r * scale_stride + g], rows[r]);
            transpose((const char *)rows, sizeof rows[0], pairs);
            continue;
        }
        __m512i four[4];
        transpose_few(w, stride, FP4_GROUP / 2, four);
        for (int i = 0; i < FP4_GROUP / 4; i++)
            expand_four(four[i / 2], i % 2, below, pairs + 2 * i);
    }
}

static float dot_row(const uint8_t *w, const uint8_t *scales, size_t width, const uint16_t *x) {
    float total = 0;
    for (size_t start = 0; start < width; start += CHAIN) {
        uint16_t chain[CHAIN];
        size_t count = width - start < CHAIN ? width - start : CHAIN;
        for (size_t i = 0; i < count; i += FP4_GROUP)
            expand(w + (start + i) / 2, scales[(start + i) / FP4_GROUP], chain + i);
        total += dot_chain(chain, count, x + start);
    }
    return total;
}

TARGET static inline void dot_rows(const uint8_t *w, const uint8_t *scales, size_t width, size_t sets,
                                   const uint16_t *x, float *out) {
    size_t stride = width / 2, scale_stride = width / FP4_GROUP;
    const char *next = (const char *)w + sets * ROWS * stride;
    __m512 totals[TOGETHER];
    for (size_t s = 0; s < sets; s++)
        totals[s] = _mm512_setzero_ps();
    for (size_t start = 0; start < width; start += CHAIN) {
        size_t groups = width - start < CHAIN ? (width - start) / FP4_GROUP : GROUPS;
        __m512 chains[TOGETHER];
        for (size_t s = 0; s < sets; s++)
            chains[s] = _mm512_setzero_ps();
        add_chains(w + start / 2, stride, scales + start / FP4_GROUP, scale_stride, groups, sets, x + start,
                   next + start / 2 * sets * ROWS, chains);
        for (size_t s = 0; s < sets; s++)
            totals[s] = _mm512_add_ps(totals[s], chains[s]);
    }
    for (size_t s = 0; s < sets; s++)
        _mm512_storeu_ps(out + s * ROWS, totals[s]);
}

void dot_mxfp4(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    size_t r = 0;
    for (; r + TOGETHER * ROWS <= rows; r += TOGETHER * ROWS)
        dot_rows(w + r * width / 2, scales + r * (width / FP4_GROUP), width, TOGETHER, packed, out + r);
    for (; r + ROWS <= rows; r += ROWS)
        dot_rows(w + r * width / 2, scales + r * (width / FP4_GROUP), width, 1, packed, out + r);
    if (r < rows && rows >= ROWS) {
        r = rows - ROWS;
        dot_rows(w + r * width / 2, scales + r * (width / FP4_GROUP), width, 1, packed, out + r);
        return;
    }
    for (; r < rows; r++)
        out[r] = dot_row(w + r * width / 2, scales + r * (width / FP4_GROUP), width, packed);
}

#endif
