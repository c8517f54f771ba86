/* Products for many x at once, in the very order in which torch adds them up: that of dot_pairs.c, but for the length of
 * chains (order_tiles).
 *
 * A panel of 16 outputs and 512 inputs is transposed once, into memory that the nearest cache holds, and multiplied by
 * every x: TILE_ROWS of them at a time, whose sums stay in registers. Lossless weights lie as panels do, and are unpacked
 * into one (dot_lossless.c); other packed ones are expanded to bfloat16 row by row on the way. */
#include "moe.h"
#include "pairs.h"

#include <stdbool.h>

#ifdef HAS_DOT_PAIRS

#define TARGET __attribute__((target("avx512f,avx512bw,avx512bf16,f16c")))

enum { PANEL = DEPTH / 2, SMALL_TILE = 12, GROUPS = DEPTH / INT4_GROUP };

size_t word_bytes(size_t width) {
    return (width + 1) / 2 * sizeof(uint32_t);
}

/* Words of two numbers, the words of all rows for the first two inputs first. */
TARGET void pack_words(const uint16_t *const *x, size_t width, size_t rows, size_t tile, void *packed) {
    size_t words = width / 2;
    uint32_t *to = packed;
    for (size_t r = 0; r < tile; r++) {
        if (r >= rows) {
            for (size_t i = 0; i < (width + 1) / 2; i++)
                to[i * tile + r] = 0;
            continue;
        }
        const uint16_t *row = x[r];
        for (size_t i = 0; i < words; i++)
            memcpy(to + i * tile + r, row + 2 * i, sizeof *to);
        if (width % 2)
            to[words * tile + r] = row[width - 1];
    }
}

TARGET void put_words(const float *values, size_t first, size_t count, size_t width, size_t tile, size_t row, void *packed) {
    uint32_t *to = (uint32_t *)packed + first / 2 * tile + row;
    (void)width;
    for (size_t i = 0; i < count; i += 2, to += tile)
        *to = to_bf16(values[i]) | (uint32_t)to_bf16(i + 1 < count ? values[i + 1] : 0) << 16;
}

/* Writes a panel: words[i] of the inputs 2 i and 2 i + 1, an output in each lane. */
TARGET static void write_panel(const char *w, size_t stride, size_t rows, size_t inputs, __m512i *words) {
    size_t i = 0;
    for (; i + STEP <= inputs && rows == ROWS; i += STEP)
        transpose(w + i * sizeof(uint16_t), stride, words + i / 2);
    for (; i < inputs; i += STEP) { /* what fills no step, with zeros around */
        char rest[ROWS][LINE_BYTES] = {{0}};
        size_t bytes = (inputs - i < STEP ? inputs - i : STEP) * sizeof(uint16_t);
        for (size_t r = 0; r < rows; r++)
            memcpy(rest[r], w + r * stride + i * sizeof(uint16_t), bytes);
        transpose(rest[0], LINE_BYTES, words + i / 2);
    }
}

static inline bool has_factors(const matrix *w) {
    return w->kind == MOE_INT8 || w->kind == MOE_INT4;
}

/* Numbers of 4 bits as bfloat16, which has them exactly: two of each row, in the lowest byte of each word. */
TARGET static inline __m512i two_of_four_bits(__m512i words) {
    const __m512i numbers = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(INT4_VALUES)));
    const __m512i lower = _mm512_set1_epi32(0xffff), nibbles = _mm512_set1_epi32(0xf000f);
    __m512i two = _mm512_ternarylogic_epi32(lower, words, _mm512_slli_epi32(words, 12), 0xca);
    return _mm512_permutexvar_epi16(_mm512_and_si512(two, nibbles), numbers);
}

/* The same for those of 8 bits, in the lower half of each word: float32 has no more of them than bfloat16 holds. */
TARGET static inline __m512i two_of_eight_bits(__m512i words) {
    __m512 first = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24));
    __m512 second = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 24));
    __m512i upper = _mm512_and_si512(_mm512_castps_si512(second), _mm512_set1_epi32((int)0xffff0000));
    return _mm512_or_si512(upper, _mm512_srli_epi32(_mm512_castps_si512(first), 16));
}

/* 64 bytes of each of `rows` rows, of which `bytes` are there, the rest being 0: words as `transpose` has them. */
TARGET static void turn(const char *from, size_t stride, size_t rows, size_t bytes, __m512i words[16]) {
    if (rows == ROWS && bytes >= LINE_BYTES) {
        transpose(from, stride, words);
        return;
    }
    char rest[ROWS][LINE_BYTES] = {{0}};
    for (size_t r = 0; r < rows; r++)
        memcpy(rest[r], from + r * stride, bytes < LINE_BYTES ? bytes : LINE_BYTES);
    transpose(rest[0], LINE_BYTES, words);
}

/* Writes the factors of a panel of whole numbers of 8 bits, those of a group in each vector. */
TARGET static void write_halves(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs, __m512 *factors) {
    size_t groups = (w->width + w->group - 1) / w->group, count = (inputs + w->group - 1) / w->group;
    const uint16_t *scales = (const uint16_t *)w->scales + row * groups + start / w->group;
    __m512i turned[16];
    turn((const char *)scales, groups * sizeof *scales, rows, count * sizeof *scales, turned);
    for (size_t g = 0; g < count; g++) {
        __m512i halves = g % 2 == 0 ? turned[g / 2] : _mm512_srli_epi32(turned[g / 2], 16);
        factors[g] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves));
    }
}

/* The same for numbers of 4 bits. */
TARGET static void write_bytes(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs, __m512 *factors) {
    size_t stride = int4_factor_bytes(w->width), count = (inputs + INT4_GROUP - 1) / INT4_GROUP;
    const uint8_t *scales = (const uint8_t *)w->scales + row * stride;
    float units[ROWS] = {0};
    for (size_t r = 0; r < rows; r++)
        units[r] = unit_of(scales + r * stride);
    __m512i turned[16];
    turn((const char *)scales + UNIT_BYTES + start / INT4_GROUP, stride, rows, count, turned);
    for (size_t g = 0; g < count; g++) {
        __m512i bytes = _mm512_srai_epi32(_mm512_slli_epi32(turned[g / 4], 24 - 8 * (unsigned)(g % 4)), 24);
        factors[g] = _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_loadu_ps(units));
    }
}

/* Writes a panel of whole numbers, and its factors, those of a group in each. */
TARGET static void write_ints(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs, __m512i *words,
                              __m512 *factors) {
    bool is_int8 = w->kind == MOE_INT8;
    size_t per = is_int8 ? 4 : 8, stride = (w->width * 4 + per - 1) / per, bytes = (inputs * 4 + per - 1) / per;
    const char *numbers = (const char *)w->numbers + row * stride + start * 4 / per;
    __m512i turned[16];
    for (size_t i = 0; i < bytes; i += LINE_BYTES) {
        turn(numbers + i, stride, rows, bytes - i, turned);
        for (size_t k = 0; k < 16; k++, words += per / 2)
            if (is_int8) {
                words[0] = two_of_eight_bits(turned[k]);
                words[1] = two_of_eight_bits(_mm512_srli_epi32(turned[k], 16));
            } else {
                words[0] = two_of_four_bits(turned[k]);
                words[1] = two_of_four_bits(_mm512_srli_epi32(turned[k], 8));
                words[2] = two_of_four_bits(_mm512_srli_epi32(turned[k], 16));
                words[3] = two_of_four_bits(_mm512_srli_epi32(turned[k], 24));
            }
    }
    if (is_int8)
        write_halves(w, row, rows, start, inputs, factors);
    else
        write_bytes(w, row, rows, start, inputs, factors);
}

/* Writes the panel of a lossless weight's rows from `row` on, which may be in two of its own. */
TARGET static void write_rows(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs, __m512i *words) {
    lossless packed = make_lossless(w->numbers, w->scales, w->rows, w->width);
    size_t inside = row % ROWS;
    write_lossless(&packed, row / ROWS, w->width, start, inputs, words);
    if (inside == 0)
        return;
    __m512i other[PANEL];
    const __m512i *behind = rows > ROWS - inside ? other : words;
    if (behind == other)
        write_lossless(&packed, row / ROWS + 1, w->width, start, inputs, other);
    const __m512i lanes = _mm512_add_epi32(_mm512_set1_epi32((int)inside),
                                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (size_t i = 0; i < inputs / 2; i++)
        words[i] = _mm512_permutex2var_epi32(words[i], lanes, behind[i]);
}

/* Writes the panel of some rows from `row` on, of any weight; `factors` are of use to whole numbers alone. */
TARGET static void write_any(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs,
                             __m512i *words, __m512 *factors) {
    size_t width = w->width;
    if (w->kind == MOE_PLAIN) {
        const uint16_t *numbers = w->numbers;
        write_panel((const char *)(numbers + row * width + start), width * sizeof *numbers, rows, inputs, words);
    } else if (w->kind == MOE_LOSSLESS) {
        write_rows(w, row, rows, start, inputs, words);
    } else if (has_factors(w)) {
        write_ints(w, row, rows, start, inputs, words, factors);
    } else {
        uint16_t expanded[ROWS][DEPTH];
        for (size_t r = 0; r < rows; r++)
            expand_part(w, row + r, start, inputs, expanded[r]);
        write_panel((const char *)expanded, sizeof expanded[0], rows, inputs, words);
    }
}

/* What memory is asked for while panels are multiplied: so many lines, in `streams` that are `stride` bytes apart, a power
 * of two. */
typedef struct {
    const char *from;
    size_t stride, streams, shift, lines;
} ahead;

static inline __attribute__((always_inline)) void fetch(const ahead *next, size_t i) {
    if (i < next->lines)
        _mm_prefetch(next->from + (i & (next->streams - 1)) * next->stride + (i >> next->shift) * LINE_BYTES, _MM_HINT_T1);
}

/* Adds the products of `panels` panels, which lie one after the other, and `tile` x to their chains. Small tiles take two
 * panels: there have to be some sums at a time that do not wait for each other. With `factors`, those of `group` words each
 * are added up by themselves, and multiplied. */
TARGET static inline __attribute__((always_inline)) void add_panels(const __m512i *words, const __m512 *factors,
                                                                    size_t group, size_t panels, size_t count,
                                                                    const uint32_t *x, size_t tile, int begins,
                                                                    const ahead *next, float *chains) {
    for (size_t begin = 0, end; begin < count; begin = end, begins = 0) {
        __m512 sums[2][TILE_ROWS];
        end = factors != NULL && begin + group < count ? begin + group : count;
#pragma GCC unroll 24
        for (size_t r = 0; r < tile; r++)
            for (size_t p = 0; p < panels; p++)
                sums[p][r] = factors != NULL || begins ? _mm512_setzero_ps()
                                                       : _mm512_loadu_ps(chains + r * BLOCK_OUTPUTS + p * ROWS);
        for (size_t i = begin; i < end; i++, x += tile) {
            for (size_t p = 0; p < panels; p++)
                fetch(next, panels * i + p);
#pragma GCC unroll 24
            for (size_t r = 0; r < tile; r++) {
                __m512bh two = (__m512bh)_mm512_set1_epi32((int)x[r]);
                for (size_t p = 0; p < panels; p++)
                    sums[p][r] = _mm512_dpbf16_ps(sums[p][r], (__m512bh)words[p * PANEL + i], two);
            }
        }
#pragma GCC unroll 24
        for (size_t r = 0; r < tile; r++)
            for (size_t p = 0; p < panels; p++) {
                float *chain = chains + r * BLOCK_OUTPUTS + p * ROWS;
                if (factors != NULL) {
                    __m512 before = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(chain);
                    sums[p][r] = _mm512_fmadd_ps(sums[p][r], factors[p * GROUPS + begin / group], before);
                }
                _mm512_storeu_ps(chain, sums[p][r]);
            }
    }
}

#define CASE(tile)                                                                                                     \
    case tile:                                                                                                         \
        if (factors == NULL)                                                                                           \
            add_panels(words, NULL, 0, tile <= SMALL_TILE ? 2 : 1, count, x, tile, begins, next, chains);              \
        else                                                                                                           \
            add_panels(words, factors, group, tile <= SMALL_TILE ? 2 : 1, count, x, tile, begins, next, chains);       \
        break;

TARGET static void add_tile(const __m512i *words, const __m512 *factors, size_t group, size_t count, const uint32_t *x,
                            size_t tile, int begins, const ahead *next, float *chains) {
    switch (tile) {
        CASE(2) CASE(4) CASE(6) CASE(8) CASE(10) CASE(12) CASE(14) CASE(16) CASE(18) CASE(20) CASE(22) CASE(24)
    }
}

/* The next panels, `panels` or fewer: one or two of the rows from `row` on, before `end`. */
static ahead look_ahead(const matrix *w, size_t row, size_t end, size_t start, size_t panels) {
    static const size_t BITS[] = {[MOE_PLAIN] = 16, [MOE_INT8] = 8, [MOE_INT4] = 4, [MOE_MXFP4] = 4, [MOE_FP8] = 8};
    ahead next = {0};
    if (start >= w->width || row + ROWS > end)
        return next;
    panels = row + panels * ROWS > end ? 1 : panels;
    size_t inputs = w->width - start < DEPTH ? w->width - start : DEPTH, bytes;
    if (w->kind == MOE_LOSSLESS) {
        bytes = inputs / PANEL_INPUTS * PANEL_BYTES;
        next.stride = w->width / PANEL_INPUTS * PANEL_BYTES;
        next.streams = panels;
        next.from = (const char *)w->numbers + row / ROWS * next.stride + start / PANEL_INPUTS * PANEL_BYTES;
    } else {
        bytes = inputs * BITS[w->kind] / 8;
        next.stride = (w->width * BITS[w->kind] + 7) / 8;
        next.streams = panels * ROWS;
        next.from = (const char *)w->numbers + row * next.stride + start * BITS[w->kind] / 8;
    }
    next.shift = (size_t)__builtin_ctzll(next.streams);
    next.lines = bytes / LINE_BYTES * next.streams;
    return next;
}

/* Found where oneDNN has AVX-512 BF16. */
moe_order order_tiles(size_t x, size_t width) {
    enum { LONG_CHAIN = 1024 };
    return (moe_order){x > 1 && width > LONG_CHAIN ? LONG_CHAIN : CHAIN, INT64_MAX, 2};
}

/* All chains have one share here. */
TARGET void multiply_tiles(const matrix *w, size_t first_row, size_t outputs, const moe_order *order, const void *packed,
                           size_t tile, size_t tiles, float *sums) {
    const uint32_t *x = packed;
    size_t width = w->width, tile_words = (width + 1) / 2 * tile, panels = tile <= SMALL_TILE ? 2 : 1;
    size_t chain = has_factors(w) ? SIZE_MAX : (size_t)order->chain;
    float chains[BLOCK_ROWS * BLOCK_OUTPUTS];
    __m512i words[2 * PANEL];
    __m512 factors[2 * GROUPS];
    for (size_t start = 0; start < width; start += DEPTH) {
        size_t inputs = width - start < DEPTH ? width - start : DEPTH, end = start + inputs;
        for (size_t first = 0; first < outputs; first += panels * ROWS) {
            for (size_t p = 0; p < panels && first + p * ROWS < outputs; p++) {
                size_t row = first + p * ROWS, left = outputs - row;
                write_any(w, first_row + row, left < ROWS ? left : ROWS, start, inputs, words + p * PANEL,
                          factors + p * GROUPS);
            }
            size_t behind = first + panels * ROWS, end_row = first_row + outputs;
            ahead next = behind < outputs ? look_ahead(w, first_row + behind, end_row, start, panels)
                                          : look_ahead(w, first_row, end_row, end, panels);
            /* A second panel that is not there gives sums that nobody reads. */
            for (size_t t = 0; t < tiles; t++, next.lines = 0)
                add_tile(words, has_factors(w) ? factors : NULL, (w->kind == MOE_INT4 ? INT4_GROUP : w->group) / 2, (inputs + 1) / 2,
                         x + t * tile_words + start / 2 * tile, tile, start % chain == 0, &next,
                         chains + t * tile * BLOCK_OUTPUTS + first);
        }
        if (end == width || end % chain == 0)
            for (size_t r = 0; r < tiles * tile; r++)
                for (size_t i = r * BLOCK_OUTPUTS; i < r * BLOCK_OUTPUTS + outputs; i++)
                    sums[i] = start < chain ? chains[i] : sums[i] + chains[i];
    }
}

#endif
