/* Lossless weights times bfloat16: dot_pairs.c's sums, to the last bit, and tiles.c's.
 *
 * A panel has 16 rows because a vector has 16 lanes, and four columns of a row in a word because two shifts then leave two
 * pairs. So weights are read in the order in which they lie, and nothing is transposed: three loads and ten
 * operations make four vectors of pairs. AMD's processors fetch such a stream by themselves, sooner than if they are told to;
 * Intel's are told AHEAD, and add up several panels side by side, since a sum of one would wait for the sum before it
 * (docs/experiments.md). */
#include "pairs.h"
#include "panels.h"

#ifdef HAS_DOT_PAIRS

#include <stdbool.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

enum {
    TOGETHER = 4, /* panels */
    AHEAD = 4 * PANEL_BYTES,
};

TARGET static inline __m512i load_table(const lossless *w) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)w->table));
}

/* The pairs of eight columns of a panel; 0xca chooses by the bits of its first operand. */
TARGET static inline void expand_eight(const uint8_t *w, __m512i table, cursor *at, size_t column, __m512i pairs[4]) {
    const __m512i nibble = _mm512_set1_epi8(15), even = _mm512_set1_epi32(0x00ff00ff);
    __m512i index = _mm512_loadu_si512(w + 128), high[2];
    high[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(index, nibble));
    high[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(index, 4), nibble));
    if (has_exceptions(at, column))
        correct(at, column, high);
    for (int half = 0; half < 2; half++) {
        __m512i low = _mm512_loadu_si512(w + 64 * half);
        pairs[2 * half] = _mm512_ternarylogic_epi32(even, low, _mm512_slli_epi16(high[half], 8), 0xca);
        pairs[2 * half + 1] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(low, 8), high[half], 0xca);
    }
}

static inline void fetch(const uint8_t *panel) {
    for (int line = 0; line < PANEL_BYTES; line += LINE_BYTES)
        _mm_prefetch((const char *)panel + line, _MM_HINT_T0);
}

/* All outputs of so many panels that follow each other, in chains of so many inputs. Fetches ahead if they are several. */
TARGET static inline __attribute__((always_inline)) void dot_some(const lossless *w, size_t panel, size_t count, size_t width,
                                                                  size_t chain, const uint16_t *x, float *out) {
    size_t panel_bytes = width / PANEL_INPUTS * PANEL_BYTES;
    const uint8_t *from = w->panels + panel * panel_bytes;
    __m512i table = load_table(w);
    cursor at[TOGETHER];
    __m512 totals[TOGETHER], sums[TOGETHER];
    for (size_t p = 0; p < count; p++) {
        at[p] = exceptions_of(w, panel + p);
        totals[p] = _mm512_setzero_ps();
    }
    for (size_t start = 0; start < width; start += chain) {
        size_t end = width - start < chain ? width : start + chain;
        for (size_t p = 0; p < count; p++)
            sums[p] = _mm512_setzero_ps();
        for (size_t i = start; i < end; i += PANEL_INPUTS, from += PANEL_BYTES) {
            __m512i pairs[TOGETHER][4];
            for (size_t p = 0; p < count; p++) {
                if (count > 1)
                    fetch(from + p * panel_bytes + AHEAD);
                expand_eight(from + p * panel_bytes, table, &at[p], i, pairs[p]);
            }
            for (int k = 0; k < 4; k++)
                for (size_t p = 0; p < count; p++)
                    sums[p] = add_pair(pairs[p][k], x + i + 2 * k, sums[p]);
        }
        for (size_t p = 0; p < count; p++)
            totals[p] = _mm512_add_ps(totals[p], sums[p]);
    }
    for (size_t p = 0; p < count; p++)
        _mm512_storeu_ps(out + p * PANEL_ROWS, totals[p]);
}

TARGET static void dot_panel(const lossless *w, size_t panel, size_t width, size_t chain, const uint16_t *x, float *out) {
    dot_some(w, panel, 1, width, chain, x, out);
}

TARGET static void dot_panels(const lossless *w, size_t panel, size_t width, size_t chain, const uint16_t *x, float *out) {
    dot_some(w, panel, TOGETHER, width, chain, x, out);
}

#ifdef HAS_DOT_AMX
/* The same in the order of amx.c, by what AMX's instruction consists of: the even and the odd inputs of a step are added up
 * apart, each from 0 on, one product at a time. A tile would have to wait until the words are in memory. What the instruction
 * takes for 0, numbers too small to be normal, are 0 as long as SMALL_IS_0 is set in MXCSR. */
enum { SMALL_IS_0 = 0x8040, FAR_AHEAD = 16 * PANEL_BYTES };

TARGET static inline void add_word(__m512i pairs, const float *x, __m512 *even, __m512 *odd) {
    __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
    *even = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0]), *even);
    *odd = _mm512_fmadd_ps(second, _mm512_set1_ps(x[1]), *odd);
}

/* `count` inputs as float32, and what is behind them up to a whole vector. */
TARGET static inline void widen(const uint16_t *x, size_t count, float *wide) {
    for (size_t i = 0; i < count; i += 16) {
        __m512i some = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + i)));
        _mm512_storeu_ps(wide + i, _mm512_castsi512_ps(_mm512_slli_epi32(some, 16)));
    }
}

TARGET static __attribute__((noinline)) void dot_panel_amx(const lossless *w, size_t panel, size_t width, size_t chain,
                                                            const uint16_t *x, float *out) {
    const uint8_t *from = w->panels + panel * width / PANEL_INPUTS * PANEL_BYTES;
    __m512i table = load_table(w);
    cursor at = exceptions_of(w, panel);
    size_t left = chain;
    __m512 total = _mm512_setzero_ps(), sum = total;
    for (size_t start = 0; start < width; start += DEPTH) {
        size_t end = width - start < DEPTH ? width : start + DEPTH;
        float wide[DEPTH];
        widen(x + start, end - start, wide);
        for (size_t i = start; i < end;) {
            size_t last = end - i < STEP ? end : i + STEP;
            __m512 even = _mm512_setzero_ps(), odd = even;
            for (; i < last; i += PANEL_INPUTS, from += PANEL_BYTES) {
                __m512i pairs[4];
                fetch(from + FAR_AHEAD);
                expand_eight(from, table, &at, i, pairs);
                for (int k = 0; k < 4; k++)
                    add_word(pairs[k], wide + i - start + 2 * k, &even, &odd);
            }
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            if ((left -= STEP) == 0) {
                total = _mm512_add_ps(total, sum);
                sum = _mm512_setzero_ps();
                left = chain;
            }
        }
    }
    _mm512_storeu_ps(out, _mm512_add_ps(total, sum));
}
#endif

typedef void panel_dot(const lossless *w, size_t panel, size_t width, size_t chain, const uint16_t *x, float *out);

/* By `some`, TOGETHER panels at once, and by `one` what is left; by that alone if `some` is NULL. */
static void dot_all(panel_dot *some, panel_dot *one, const lossless *w, size_t width, size_t first, size_t rows, size_t chain,
                    const void *packed, float *out) {
    for (size_t r = first, end = first + rows; r < end;) {
        size_t inside = r % PANEL_ROWS, count = end - r < PANEL_ROWS - inside ? end - r : PANEL_ROWS - inside;
        if (some != NULL && inside == 0 && end - r >= TOGETHER * PANEL_ROWS) {
            count = TOGETHER * PANEL_ROWS;
            some(w, r / PANEL_ROWS, width, chain, packed, out + r - first);
        } else {
            float panel[PANEL_ROWS];
            one(w, r / PANEL_ROWS, width, chain, packed, panel);
            memcpy(out + r - first, panel + inside, count * sizeof *out);
        }
        r += count;
    }
}

void dot_lossless(const lossless *w, size_t width, size_t first, size_t rows, const void *packed, float *out) {
    dot_all(is_intel() ? dot_panels : NULL, dot_panel, w, width, first, rows, CHAIN, packed, out);
}

#ifdef HAS_DOT_AMX
void dot_lossless_chains(const lossless *w, size_t width, size_t first, size_t rows, size_t chain, const void *packed,
                         float *out) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | SMALL_IS_0);
    dot_all(NULL, dot_panel_amx, w, width, first, rows, chain, packed, out);
    _mm_setcsr(before);
}

void dot_lossless_amx(const lossless *w, size_t width, size_t first, size_t rows, const void *packed, float *out) {
    dot_lossless_chains(w, width, first, rows, ONE_CHAIN, packed, out);
}
#endif

TARGET void write_lossless(const lossless *w, size_t panel, size_t width, size_t start, size_t inputs, void *words) {
    const uint8_t *from = w->panels + (panel * width + start) / PANEL_INPUTS * PANEL_BYTES;
    __m512i table = load_table(w);
    cursor at = exceptions_of(w, panel);
    skip_to(&at, start);
    for (size_t i = 0; i < inputs; i += PANEL_INPUTS, from += PANEL_BYTES)
        expand_eight(from, table, &at, start + i, (__m512i *)words + i / 2);
}

/* 32 columns of a panel, row after row: of each four rows the first comes from four vectors, and so on. */
TARGET static inline void put_rows(const __m512i *pairs, uint16_t *out, size_t stride) {
    __m512i quads[4][4];
    for (int g = 0; g < 4; g++, pairs += 4) {
        /* quads[k][g] has, in 128-bit lane l, eight columns of row 4 l + k. */
        __m512i low01 = _mm512_unpacklo_epi32(pairs[0], pairs[1]), high01 = _mm512_unpackhi_epi32(pairs[0], pairs[1]);
        __m512i low23 = _mm512_unpacklo_epi32(pairs[2], pairs[3]), high23 = _mm512_unpackhi_epi32(pairs[2], pairs[3]);
        quads[0][g] = _mm512_unpacklo_epi64(low01, low23);
        quads[1][g] = _mm512_unpackhi_epi64(low01, low23);
        quads[2][g] = _mm512_unpacklo_epi64(high01, high23);
        quads[3][g] = _mm512_unpackhi_epi64(high01, high23);
    }
    for (size_t k = 0; k < 4; k++) {
        const __m512i *q = quads[k];
        __m512i low0 = _mm512_shuffle_i32x4(q[0], q[1], 0x44), low1 = _mm512_shuffle_i32x4(q[2], q[3], 0x44);
        __m512i high0 = _mm512_shuffle_i32x4(q[0], q[1], 0xee), high1 = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
        _mm512_storeu_si512(out + k * stride, _mm512_shuffle_i32x4(low0, low1, 0x88));
        _mm512_storeu_si512(out + (k + 4) * stride, _mm512_shuffle_i32x4(low0, low1, 0xdd));
        _mm512_storeu_si512(out + (k + 8) * stride, _mm512_shuffle_i32x4(high0, high1, 0x88));
        _mm512_storeu_si512(out + (k + 12) * stride, _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
}

/* Columns of one panel. */
TARGET static void put_panel(const lossless *w, size_t panel, size_t width, size_t start, size_t inputs, uint16_t *out,
                             size_t stride) {
    for (size_t i = 0; i < inputs; i += STEP) {
        __m512i pairs[16] = {0};
        size_t count = inputs - i < STEP ? inputs - i : STEP;
        write_lossless(w, panel, width, start + i, count, pairs);
        if (count == STEP) {
            put_rows(pairs, out + i, stride);
            continue;
        }
        uint16_t last[PANEL_ROWS][STEP];
        put_rows(pairs, last[0], STEP);
        for (size_t k = 0; k < PANEL_ROWS; k++)
            memcpy(out + k * stride + i, last[k], count * sizeof *out);
    }
}

/* Whole panels. */
void expand_lossless(const lossless *w, size_t width, size_t first, size_t rows, uint16_t *out) {
    for (size_t r = first; r < first + rows; r += PANEL_ROWS, out += PANEL_ROWS * width)
        put_panel(w, r / PANEL_ROWS, width, 0, width, out, width);
}

void put_lossless(const lossless *w, size_t row, size_t rows, size_t width, size_t start, size_t inputs, uint16_t *out,
                  size_t stride) {
    for (size_t end = row + rows; row < end;) {
        uint16_t panel[PANEL_ROWS][DEPTH];
        size_t inside = row % PANEL_ROWS, count = end - row < PANEL_ROWS - inside ? end - row : PANEL_ROWS - inside;
        bool is_whole = count == PANEL_ROWS;
        put_panel(w, row / PANEL_ROWS, width, start, inputs, is_whole ? out : panel[0], is_whole ? stride : DEPTH);
        for (size_t k = 0; k < count && !is_whole; k++)
            memcpy(out + k * stride, panel[inside + k], inputs * sizeof *out);
        out += count * stride;
        row += count;
    }
}

#endif
