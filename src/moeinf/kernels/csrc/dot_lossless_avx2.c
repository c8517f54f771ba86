/* Lossless weights times bfloat16 in torch's own order (VECTORS in kernels.h), where the processor has vectors of eight float32.
 *
 * A word of a panel has four columns of one row, so lanes are rows, and weights are read as they lie. Each of the columns that
 * torch adds up side by side has a vector of sums for every eight rows: 4 KiB for a panel, which the nearest cache holds. Memory
 * is asked for what comes AHEAD bytes later: Intel's processors do not go as far by themselves. */
#include "avx2.h"
#include "panels.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, STEP = VECTORS * LANES, HALVES = PANEL_ROWS / LANES, LINE_BYTES = 64, AHEAD = 16 * PANEL_BYTES };

/* A vector for every eight rows. */
typedef struct {
    __m256 of[HALVES];
} rows;

/* The upper bytes of eight columns of a panel. */
TARGET static inline __attribute__((always_inline)) void look_up(const uint8_t *w, __m256i table, cursor *at, size_t column,
                                                                 __m256i high[2][HALVES]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int half = 0; half < HALVES; half++) {
        __m256i index = _mm256_loadu_si256((const __m256i *)(w + 128 + 32 * half));
        high[0][half] = _mm256_shuffle_epi8(table, _mm256_and_si256(index, nibble));
        high[1][half] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(index, 4), nibble));
    }
    if (has_exceptions(at, column)) { /* in a copy, so that registers have them otherwise */
        __m256i all[2][HALVES] = {{high[0][0], high[0][1]}, {high[1][0], high[1][1]}};
        correct(at, column, all);
        for (int i = 0; i < 2 * HALVES; i++)
            high[i / HALVES][i % HALVES] = all[i / HALVES][i % HALVES];
    }
}

/* Four columns of eight rows, as float32. */
TARGET static inline void widen(const uint8_t *w, __m256i high, __m256 weights[4]) {
    const __m256i even = _mm256_set1_epi32(0x00ff00ff), second = _mm256_set1_epi32(-0x10000);
    __m256i low = _mm256_loadu_si256((const __m256i *)w);
    __m256i pairs[2] = {_mm256_or_si256(_mm256_and_si256(low, even), _mm256_slli_epi16(high, 8)),
                        _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(even, high))};
    for (int k = 0; k < 4; k++)
        weights[k] = _mm256_castsi256_ps(k % 2 ? _mm256_and_si256(pairs[k / 2], second) : _mm256_slli_epi32(pairs[k / 2], 16));
}

/* Adds the products of eight columns of a panel to the sums of each. They are the first or the second ones of sixteen, which x
 * begins with, as pack_bf16 lays it out. */
TARGET static inline __attribute__((always_inline)) void add_eight(const uint8_t *w, __m256i table, cursor *at, const float *x,
                                                                   size_t column, size_t second, rows *sums) {
    __m256i high[2][HALVES];
    look_up(w, table, at, column, high);
#pragma GCC unroll 2
    for (size_t four = 0; four < 2; four++) {
        const float *here = x + second * LANES / 2 + 2 * four;
        __m256 values[4], weights[4];
        for (size_t k = 0; k < 4; k++)
            values[k] = _mm256_broadcast_ss(here + k % 2 * LANES + k / 2);
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++) {
            widen(w + 64 * four + 32 * half, high[four][half], weights);
            for (size_t k = 0; k < 4; k++) {
                __m256 *sum = &sums[4 * four + k].of[half];
                *sum = _mm256_fmadd_ps(weights[k], values[k], *sum);
            }
        }
    }
}

TARGET static inline __attribute__((always_inline)) void add_sixteen(const uint8_t *w, __m256i table, cursor *at, const float *x,
                                                                     size_t column, rows *first, rows *second) {
    add_eight(w, table, at, x, column, 0, first);
    add_eight(w + PANEL_BYTES, table, at, x, column + PANEL_INPUTS, 1, second);
}

/* Adds vectors `half` apart, until the first has the sum of `count`, `apart` from each other. */
TARGET static inline void fold(rows *sums, size_t count, size_t apart) {
    for (size_t half = count / 2; half > 0; half /= 2)
        for (size_t k = 0; k < half; k++)
            for (int h = 0; h < HALVES; h++)
                sums[k * apart].of[h] = _mm256_add_ps(sums[k * apart].of[h], sums[(k + half) * apart].of[h]);
}

/* All outputs of a panel. */
TARGET static void dot_panel(const lossless *w, size_t panel, size_t width, const float *x, float *out) {
    const uint8_t *from = w->panels + panel * width / PANEL_INPUTS * PANEL_BYTES;
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)w->table));
    cursor at = exceptions_of(w, panel);
    rows sums[STEP], rest[PANEL_INPUTS] = {0}, last[PANEL_INPUTS] = {0};
    memset(sums, 0, sizeof sums);
    size_t i = 0;
    for (; i + STEP <= width; i += STEP)
        for (size_t k = 0; k < STEP; k += 2 * PANEL_INPUTS, from += 2 * PANEL_BYTES) {
            for (int line = 0; line < 2 * PANEL_BYTES; line += LINE_BYTES)
                _mm_prefetch((const char *)from + AHEAD + line, _MM_HINT_T0);
            add_sixteen(from, table, &at, x + i + k, i + k, sums + k, sums + k + PANEL_INPUTS);
        }
    for (size_t lane = 0; lane < LANES; lane++)
        fold(sums + lane, VECTORS, LANES);
    fold(sums, LANES, 1);
    for (; i + 2 * PANEL_INPUTS <= width; i += 2 * PANEL_INPUTS, from += 2 * PANEL_BYTES)
        add_sixteen(from, table, &at, x + i, i, rest, rest);
    fold(rest, LANES, 1);
    if (i < width)
        add_eight(from, table, &at, x + i, i, 0, last);
    for (int half = 0; half < HALVES; half++) {
        __m256 total = _mm256_add_ps(sums[0].of[half], rest[0].of[half]);
        for (size_t k = 0; k < PANEL_INPUTS; k++)
            total = _mm256_add_ps(total, last[k].of[half]);
        _mm256_storeu_ps(out + LANES * half, total);
    }
}

TARGET void dot_lossless_avx2(const lossless *w, size_t width, size_t first, size_t count, const void *packed, float *out) {
    for (size_t r = first, end = first + count; r < end;) {
        size_t inside = r % PANEL_ROWS, some = smaller(end - r, PANEL_ROWS - inside);
        float panel[PANEL_ROWS];
        dot_panel(w, r / PANEL_ROWS, width, packed, panel);
        memcpy(out + r - first, panel + inside, some * sizeof *out);
        r += some;
    }
}

#endif
