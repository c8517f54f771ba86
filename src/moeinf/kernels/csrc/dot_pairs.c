/* Products of bfloat16 in the very order in which torch adds them up.
 *
 * Where a processor has AVX-512 BF16, torch leaves such products to oneDNN (brgemm), and its result was found to be this:
 * inputs are cut into chains of 512; a chain adds one pair after the other, of a pair the second product first; chains
 * are added in order. With the same order sums are the same to the last bit, and so is the model's output.
 *
 * The order asks for one output per lane, while weights lie one output per row: 16 rows of 16 pairs are transposed in
 * registers. Meanwhile the next weights have to be fetched, and how is a matter of who made the processor
 * (docs/experiments.md): AMD's fetch best in the order in which rows lie, which they cannot guess from 16 rows read side by
 * side; Intel's keep as many rows apart themselves, if they are asked for a little ahead of where each is read. */
#include "pairs.h"

#ifdef HAS_DOT_PAIRS

#define TARGET __attribute__((target("avx512f,avx512bf16")))

enum {
    WIDE = 4096,  /* rows of more inputs are fetched part by part: 16 whole ones would crowd the cache */
    AHEAD = 256,  /* bytes, where each row is fetched by itself */
};

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

/* Where to begin to fetch at input `i` of a chain that begins at `start`, as 16 lines, `apart` bytes from each other: of the
 * next 16 rows as they lie, or of the next chain, row after row. */
static const char *next_lines(const char *rows, size_t width, size_t start, size_t i, size_t *apart) {
    size_t stride = width * sizeof(uint16_t), step = (i - start) / STEP;
    *apart = LINE_BYTES;
    if (width <= WIDE)
        return rows + ROWS * stride + i / STEP * ROWS * LINE_BYTES;
    return (width - start > CHAIN ? rows + (start + CHAIN) * sizeof(uint16_t) : rows + ROWS * stride) + step * stride;
}

/* The same where each row is fetched by itself, and behind its end the one that will be read in its place. */
static const char *next_beside(const char *rows, size_t width, size_t i, size_t *apart) {
    size_t stride = width * sizeof(uint16_t), at = i * sizeof(uint16_t) + AHEAD;
    *apart = stride;
    return rows + at + (at < stride ? 0 : (ROWS - 1) * stride);
}

TARGET static inline void dot_rows(const uint16_t *w, size_t width, bool is_beside, const uint16_t *x, float *out) {
    const char *rows = (const char *)w;
    size_t stride = width * sizeof *w;
    __m512 total = _mm512_setzero_ps();
    for (size_t start = 0; start < width; start += CHAIN) {
        size_t end = start + CHAIN < width ? start + CHAIN : width, i = start;
        __m512 chain = _mm512_setzero_ps();
        for (; i + STEP <= end; i += STEP) { /* a step fetches as much as it reads */
            size_t apart;
            const char *next = is_beside ? next_beside(rows, width, i, &apart) : next_lines(rows, width, start, i, &apart);
            for (int line = 0; line < ROWS; line++)
                _mm_prefetch(next + line * apart, _MM_HINT_T1);
            __m512i pairs[16];
            (is_beside ? transpose_parts : transpose)(rows + i * sizeof *w, stride, pairs);
            chain = add_pairs(pairs, x + i, chain);
        }
        if (i < end)
            chain = add_rest(rows + i * sizeof *w, stride, (end - i) * sizeof *w, x + i, chain);
        total = _mm512_add_ps(total, chain);
    }
    _mm512_storeu_ps(out, total);
}

TARGET static void dot_rows_in_line(const uint16_t *w, size_t width, const uint16_t *x, float *out) {
    dot_rows(w, width, false, x, out);
}

TARGET static void dot_rows_beside(const uint16_t *w, size_t width, const uint16_t *x, float *out) {
    dot_rows(w, width, true, x, out);
}

void dot_pairs(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out) {
    void (*dot_sixteen)(const uint16_t *, size_t, const uint16_t *, float *) =
        is_intel() ? dot_rows_beside : dot_rows_in_line;
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        dot_sixteen(w + r * width, width, packed, out + r);
    if (r < rows && rows >= ROWS) { /* the last sixteen: alone, rows keep sums that the instruction makes 0 */
        dot_sixteen(w + (rows - ROWS) * width, width, packed, out + rows - ROWS);
        return;
    }
    for (; r < rows; r++)
        out[r] = dot_row(w + r * width, width, packed);
}

#endif
