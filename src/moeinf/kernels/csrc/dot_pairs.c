/* Products of bfloat16 in the very order in which torch adds them up.
 *
 * Where a processor has AVX-512 BF16, torch leaves such products to oneDNN (brgemm), and its result was found to be this:
 * inputs are cut into chains of 512; a chain adds one pair after the other, of a pair the second product first; chains
 * are added in order. With the same order sums are the same to the last bit, and so is the model's output.
 *
 * The order asks for one output per lane, while weights lie one output per row: 16 rows of 16 pairs are transposed in
 * registers. That takes three quarters of the time that 16 loads from memory take, so the next rows have to be fetched
 * meanwhile, in the order in which they lie: the processor cannot guess it from 16 rows read side by side. */
#include "pairs.h"

#ifdef HAS_DOT_PAIRS

#define TARGET __attribute__((target("avx512f,avx512bf16")))

enum { WIDE = 4096 }; /* rows of more inputs are fetched part by part: 16 whole ones would crowd the cache */

void pack_pairs(const float *values, size_t count, void *packed) {
    for (size_t i = 0; i < PAD; i++)
        ((uint16_t *)packed)[i] = i < count ? to_bf16(values[i]) : 0;
}

float dot_chain(const uint16_t *w, size_t count, const uint16_t *x) {
    float chain = 0;
    for (size_t i = 0; i < count; i += 2) {
        if (i + 1 < count)
            chain += from_bf16(w[i + 1]) * from_bf16(x[i + 1]);
        chain += from_bf16(w[i]) * from_bf16(x[i]);
    }
    return chain;
}

static float dot_row(const uint16_t *w, size_t width, const uint16_t *x) {
    float total = 0;
    for (size_t start = 0; start < width; start += CHAIN)
        total += dot_chain(w + start, width - start < CHAIN ? width - start : CHAIN, x + start);
    return total;
}

/* The inputs after the last whole step, with zeros behind them. */
TARGET static inline __m512 add_rest(const char *w, size_t stride, size_t bytes, const uint16_t *x, __m512 chain) {
    char rest[ROWS][LINE_BYTES] = {{0}};
    for (size_t r = 0; r < ROWS; r++)
        memcpy(rest[r], w + r * stride, bytes);
    return add_step(rest[0], LINE_BYTES, x, chain);
}

TARGET static void dot_rows(const uint16_t *w, size_t width, const uint16_t *x, float *out) {
    const char *rows = (const char *)w;
    size_t stride = width * sizeof *w;
    __m512 total = _mm512_setzero_ps();
    for (size_t start = 0; start < width; start += CHAIN) {
        size_t end = start + CHAIN < width ? start + CHAIN : width, i = start;
        /* A step fetches as much as it reads: of the next 16 rows as they lie, or of the next chain, row after row. */
        const char *next = rows + ROWS * stride + start / STEP * ROWS * LINE_BYTES;
        size_t apart = ROWS * LINE_BYTES;
        if (width > WIDE) {
            next = end < width ? rows + end * sizeof *w : rows + ROWS * stride;
            apart = stride;
        }
        __m512 chain = _mm512_setzero_ps();
        for (; i + STEP <= end; i += STEP, next += apart) {
            for (int line = 0; line < ROWS; line++)
                _mm_prefetch(next + line * LINE_BYTES, _MM_HINT_T1);
            chain = add_step(rows + i * sizeof *w, stride, x + i, chain);
        }
        if (i < end)
            chain = add_rest(rows + i * sizeof *w, stride, (end - i) * sizeof *w, x + i, chain);
        total = _mm512_add_ps(total, chain);
    }
    _mm512_storeu_ps(out, total);
}

void dot_pairs(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out) {
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        dot_rows(w + r * width, width, packed, out + r);
    if (r < rows && rows >= ROWS) { /* the last sixteen: alone, rows keep sums that the instruction makes 0 */
        dot_rows(w + (rows - ROWS) * width, width, packed, out + rows - ROWS);
        return;
    }
    for (; r < rows; r++)
        out[r] = dot_row(w + r * width, width, packed);
}

#endif
