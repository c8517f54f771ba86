/* float8 in blocks times bfloat16: dot_pairs.c's sums, to the last bit, of weights that are expanded in registers.
 *
 * A scale is any number, so a scaled weight is rounded to bfloat16; but a block has only 128 different ones and their
 * negatives. They are computed once for many rows and looked up by byte, the lower bytes of 64 weights at once and then the
 * upper ones. What does not fit this goes through memory: rows of two blocks, blocks that are no whole ones, and all on
 * processors that look up no bytes (AVX-512 VBMI). */
#include "pairs.h"

#ifdef HAS_DOT_PAIRS

#include <stdbool.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define VBMI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")))

enum {
    TOGETHER = 2, /* sixteens of rows: one chain alone would wait for itself */
    AHEAD = 512,  /* columns that are fetched before they are computed */
};

/* The bytes of what 128 weights without a sign become in bfloat16. */
typedef struct {
    __m512i low[2], high[2];
} table;

TARGET static inline __m512i lanes(void) {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* What from_e4m3 and to_bf16 do, of 16 weights from `first` on. */
TARGET static inline __m512i values(int first, __m512 scale) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(lanes(), _mm512_set1_epi32(first)), 20);
    if (first + 16 == 128)
        bits = _mm512_mask_mov_epi32(bits, 0x8000, _mm512_set1_epi32(0x7fc00000));
    __m512 exact = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
    __m512 scaled = _mm512_mul_ps(exact, scale);
    __mmask16 none = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q); /* the rounding of a NaN may reach the sign */
    bits = _mm512_mask_mov_epi32(_mm512_castps_si512(scaled), none, _mm512_set1_epi32(0x7fc00000));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
}

/* The first bytes of four times 16 words, after a shift. */
TARGET static inline __m512i gather(const __m512i *words, unsigned shift) {
    __m512i all = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(_mm512_srli_epi32(words[0], shift)));
    all = _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(_mm512_srli_epi32(words[1], shift)), 1);
    all = _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(_mm512_srli_epi32(words[2], shift)), 2);
    return _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(_mm512_srli_epi32(words[3], shift)), 3);
}

TARGET static inline table make_table(float scale) {
    table made;
    for (int half = 0; half < 2; half++) {
        __m512i words[4];
        for (int i = 0; i < 4; i++)
            words[i] = values(64 * half + 16 * i, _mm512_set1_ps(scale));
        made.low[half] = gather(words, 0);
        made.high[half] = gather(words, 8);
    }
    return made;
}

/* Four weights of each of 16 rows, in words, as pairs. */
VBMI_TARGET static inline void expand_four(__m512i words, const table *table, __m512i pairs[2]) {
    /* Lower and upper bytes of each word's first two weights, and of its others. */
    const __m512i words_begin = _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(0x04040404));
    const __m512i first = _mm512_add_epi32(words_begin, _mm512_set1_epi32(0x41014000));
    const __m512i second = _mm512_add_epi32(words_begin, _mm512_set1_epi32(0x43034202));
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i low = _mm512_permutex2var_epi8(table->low[0], words, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], words, table->high[1]);
    high = _mm512_ternarylogic_epi32(high, words, sign, 0x78); /* a ^ (b & c) */
    pairs[0] = _mm512_permutex2var_epi8(low, first, high);
    pairs[1] = _mm512_permutex2var_epi8(low, second, high);
}

/* Adds a block of `sets` sixteens of rows that share it to their chains. Fetches as much as it reads, of `next`. */
VBMI_TARGET static inline void add_block(const uint8_t *w, size_t stride, float scale, size_t sets, const uint16_t *x,
                                         const uint8_t *next, __m512 *chains) {
    table table = make_table(scale);
    for (size_t i = 0; i < FP8_BLOCK; i += LINE_BYTES) {
        __m512i words[TOGETHER][16];
        for (size_t s = 0; s < sets; s++)
            transpose((const char *)w + i + s * ROWS * stride, stride, words[s]);
        for (int k = 0; k < 16; k++)
            for (size_t s = 0; s < sets; s++) {
                _mm_prefetch((const char *)next + i + ((size_t)k * sets + s) * stride, _MM_HINT_T1);
                __m512i pairs[2];
                expand_four(words[s][k], &table, pairs);
                const uint16_t *four = x + i + 4 * (size_t)k;
                chains[s] = add_pair(pairs[1], four + 2, add_pair(pairs[0], four, chains[s]));
            }
    }
}

/* One block of one row, or what there is of it. */
TARGET static void expand(const uint8_t *w, float scale, size_t count, uint16_t *out) {
    for (size_t i = 0; i < count; i++)
        out[i] = to_bf16(from_e4m3(w[i]) * scale);
}

/* The same as add_block of 16 rows, whatever their scales are and however many columns there are. */
TARGET static void add_slowly(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t column,
                              size_t count, const uint16_t *x, __m512 *chain) {
    uint16_t rows[ROWS][FP8_BLOCK] = {{0}};
    for (size_t r = 0; r < ROWS; r++)
        expand(w + (first + r) * width + column, scales_of(blocks, first + r, width)[column / FP8_BLOCK], count, rows[r]);
    for (size_t i = 0; i < count; i += STEP)
        *chain = add_step((const char *)(rows[0] + i), sizeof rows[0], x + column + i, *chain);
}

/* Whole blocks, which all rows share. */
VBMI_TARGET static void write_blocks(const uint8_t *w, const float *scales, size_t stride, size_t inputs, __m512i *words) {
    for (size_t i = 0; i < inputs; i += FP8_BLOCK, scales++) {
        table table = make_table(*scales);
        for (size_t k = i; k < i + FP8_BLOCK; k += LINE_BYTES, words += LINE_BYTES / 2) {
            __m512i fours[16];
            transpose((const char *)w + k, stride, fours);
            for (int j = 0; j < 16; j++)
                expand_four(fours[j], &table, words + 2 * j);
        }
    }
}

TARGET void write_fp8(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t start, size_t inputs,
                      void *words) {
    const float *scales = scales_of(blocks, first, width) + start / FP8_BLOCK;
    const uint8_t *from = w + first * width + start;
    bool is_shared = blocks->rows - first % blocks->rows >= ROWS;
    if (is_shared && inputs % FP8_BLOCK == 0 && width % FP8_BLOCK == 0 && __builtin_cpu_supports("avx512vbmi")) {
        write_blocks(from, scales, width, inputs, words);
        return;
    }
    for (size_t i = 0; i < inputs; i += STEP) {
        uint16_t rows[ROWS][STEP] = {{0}};
        size_t count = inputs - i < STEP ? inputs - i : STEP;
        for (size_t r = 0; r < ROWS; r++)
            expand(from + r * width + i, scales_of(blocks, first + r, width)[(start + i) / FP8_BLOCK], count, rows[r]);
        transpose((const char *)rows, sizeof rows[0], (__m512i *)words + i / 2);
    }
}

static float dot_row(const uint8_t *w, const float *scales, size_t width, const uint16_t *x) {
    float total = 0;
    for (size_t start = 0; start < width; start += CHAIN) {
        uint16_t chain[CHAIN];
        size_t end = width - start < CHAIN ? width : start + CHAIN;
        for (size_t i = start; i < end; i += FP8_BLOCK)
            expand(w + i, scales[i / FP8_BLOCK], end - i < FP8_BLOCK ? end - i : FP8_BLOCK, chain + i - start);
        total += dot_chain(chain, end - start, x + start);
    }
    return total;
}

/* A constant number of `sets` of 16 rows, from `first` on. */
VBMI_TARGET static inline void dot_fast(const uint8_t *w, const float *scales, size_t width, size_t sets,
                                        const uint16_t *x, float *out) {
    const uint8_t *rest = w + sets * ROWS * width - width; /* the next rows, as if they went on with these */
    __m512 totals[TOGETHER];
    for (size_t s = 0; s < sets; s++)
        totals[s] = _mm512_setzero_ps();
    for (size_t start = 0; start < width; start += CHAIN) {
        __m512 chains[TOGETHER];
        for (size_t s = 0; s < sets; s++)
            chains[s] = _mm512_setzero_ps();
        for (size_t i = start; i < width && i < start + CHAIN; i += FP8_BLOCK) {
            const uint8_t *next = (i + AHEAD < width ? w : rest) + i + AHEAD;
            add_block(w + i, width, scales[i / FP8_BLOCK], sets, x + i, next, chains);
        }
        for (size_t s = 0; s < sets; s++)
            totals[s] = _mm512_add_ps(totals[s], chains[s]);
    }
    for (size_t s = 0; s < sets; s++)
        _mm512_storeu_ps(out + s * ROWS, totals[s]);
}

TARGET static void dot_slowly(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first,
                              const uint16_t *x, float *out) {
    __m512 total = _mm512_setzero_ps();
    for (size_t start = 0; start < width; start += CHAIN) {
        __m512 chain = _mm512_setzero_ps();
        for (size_t i = start; i < width && i < start + CHAIN; i += FP8_BLOCK)
            add_slowly(w, blocks, width, first, i, width - i < FP8_BLOCK ? width - i : FP8_BLOCK, x, &chain);
        total = _mm512_add_ps(total, chain);
    }
    _mm512_storeu_ps(out, total);
}

void dot_fp8(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows, const void *packed,
             float *out) {
    bool is_fast = width % FP8_BLOCK == 0 && __builtin_cpu_supports("avx512vbmi");
    size_t r = 0;
    while (r + ROWS <= rows) {
        size_t row = first + r, left = blocks->rows - row % blocks->rows; /* rows of this block */
        const uint8_t *from = w + row * width;
        const float *scales = scales_of(blocks, row, width);
        if (is_fast && left >= TOGETHER * ROWS && r + TOGETHER * ROWS <= rows) {
            dot_fast(from, scales, width, TOGETHER, packed, out + r);
            r += TOGETHER * ROWS;
            continue;
        }
        if (is_fast && left >= ROWS)
            dot_fast(from, scales, width, 1, packed, out + r);
        else
            dot_slowly(w, blocks, width, row, packed, out + r);
        r += ROWS;
    }
    if (r < rows && rows >= ROWS) {
        dot_slowly(w, blocks, width, first + rows - ROWS, packed, out + rows - ROWS);
        return;
    }
    for (; r < rows; r++)
        out[r] = dot_row(w + (first + r) * width, scales_of(blocks, first + r, width), width, packed);
}

#endif
