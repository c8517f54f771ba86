/* Products of bfloat16 for many x at once, in the very order in which torch adds them up.
 *
 * Where a processor has AVX-512 BF16, oneDNN's result for two x and more was found to be that of dot_pairs.c, whatever
 * their number and that of threads, but that chains are twice as long where there are more than 1024 inputs.
 *
 * A panel of 16 outputs and 512 inputs is transposed once, into memory that the nearest cache holds, and multiplied by
 * every x: TILE_ROWS of them at a time, whose sums stay in registers. Lossless weights lie as panels do, and are unpacked
 * into one (dot_lossless.c). */
#include "pairs.h"

#ifdef HAS_DOT_PAIRS

#define TARGET PAIRS_TARGET

enum { DEPTH = 512, LONG_CHAIN = 1024, PANEL = DEPTH / 2, SMALL_TILE = 12 };

/* Lays `rows` x out as words of two numbers, the words of all rows for the first two inputs first. `tile` is how many
 * rows there is room for; those behind the last are 0. */
TARGET void pack_tile(const uint16_t *x, size_t width, size_t rows, size_t tile, uint32_t *packed) {
    size_t words = width / 2;
    for (size_t r = 0; r < tile; r++) {
        if (r >= rows) {
            for (size_t i = 0; i < (width + 1) / 2; i++)
                packed[i * tile + r] = 0;
            continue;
        }
        const uint16_t *row = x + r * width;
        for (size_t i = 0; i < words; i++)
            memcpy(packed + i * tile + r, row + 2 * i, sizeof *packed);
        if (width % 2)
            packed[words * tile + r] = row[width - 1];
    }
}

/* Writes a panel: words[i] of the inputs 2 i and 2 i + 1, an output in each lane. As much as is read is fetched from
 * `next` on, where the next panel is. */
TARGET static void write_panel(const char *w, size_t stride, size_t rows, size_t inputs, const char *next,
                               __m512i *words) {
    size_t i = 0, apart = inputs == DEPTH ? stride : LINE_BYTES, between = inputs == DEPTH ? LINE_BYTES : stride;
    for (; i + STEP <= inputs && rows == ROWS; i += STEP, next += apart) {
        for (size_t line = 0; line < ROWS; line++)
            _mm_prefetch(next + line * between, _MM_HINT_T1);
        transpose(w + i * sizeof(uint16_t), stride, words + i / 2);
    }
    for (; i < inputs; i += STEP) { /* what fills no step, with zeros around */
        char rest[ROWS][LINE_BYTES] = {{0}};
        size_t bytes = (inputs - i < STEP ? inputs - i : STEP) * sizeof(uint16_t);
        for (size_t r = 0; r < rows; r++)
            memcpy(rest[r], w + r * stride + i * sizeof(uint16_t), bytes);
        transpose(rest[0], LINE_BYTES, words + i / 2);
    }
}

/* Adds the products of `panels` panels, which lie one after the other, and `tile` x to their chains. Small tiles take two
 * panels: there have to be some sums at a time that do not wait for each other. */
TARGET static inline __attribute__((always_inline)) void add_panels(const __m512i *words, size_t panels, size_t count,
                                                                    const uint32_t *x, size_t tile, int begins,
                                                                    float *chains) {
    __m512 sums[2][TILE_ROWS];
#pragma GCC unroll 24
    for (size_t r = 0; r < tile; r++)
        for (size_t p = 0; p < panels; p++)
            sums[p][r] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(chains + r * BLOCK_OUTPUTS + p * ROWS);
    for (size_t i = 0; i < count; i++, x += tile)
#pragma GCC unroll 24
        for (size_t r = 0; r < tile; r++) {
            __m512bh two = (__m512bh)_mm512_set1_epi32((int)x[r]);
            for (size_t p = 0; p < panels; p++)
                sums[p][r] = _mm512_dpbf16_ps(sums[p][r], (__m512bh)words[p * PANEL + i], two);
        }
#pragma GCC unroll 24
    for (size_t r = 0; r < tile; r++)
        for (size_t p = 0; p < panels; p++)
            _mm512_storeu_ps(chains + r * BLOCK_OUTPUTS + p * ROWS, sums[p][r]);
}

#define CASE(tile)                                                                                                     \
    case tile:                                                                                                         \
        add_panels(words, tile <= SMALL_TILE ? 2 : 1, count, x, tile, begins, chains);                                 \
        break;

TARGET static void add_tile(const __m512i *words, size_t count, const uint32_t *x, size_t tile, int begins,
                            float *chains) {
    switch (tile) {
        CASE(2) CASE(4) CASE(6) CASE(8) CASE(10) CASE(12) CASE(14) CASE(16) CASE(18) CASE(20) CASE(22) CASE(24)
    }
}

TARGET void multiply_tiles(const uint16_t *w, const lossless *packed_w, size_t first_row, size_t width, size_t outputs,
                           const uint32_t *x, size_t tile, size_t tiles, float *sums) {
    size_t stride = width * sizeof *w, long_chain = width > LONG_CHAIN ? LONG_CHAIN : CHAIN;
    size_t tile_words = (width + 1) / 2 * tile, panels = tile <= SMALL_TILE ? 2 : 1;
    float chains[BLOCK_ROWS * BLOCK_OUTPUTS];
    __m512i words[2 * PANEL];
    for (size_t start = 0; start < width; start += DEPTH) {
        size_t inputs = width - start < DEPTH ? width - start : DEPTH, end = start + inputs;
        for (size_t first = 0; first < outputs; first += panels * ROWS) {
            for (size_t p = 0; p < panels; p++) {
                size_t row = first + p * ROWS, left = row < outputs ? outputs - row : 0;
                if (packed_w != NULL && left > 0) {
                    write_lossless(packed_w, (first_row + row) / ROWS, width, start, inputs, words + p * PANEL);
                    continue;
                }
                const char *panel = (const char *)(w + row * width + start);
                const char *next = left > ROWS ? panel + ROWS * stride : (const char *)(w + end);
                write_panel(panel, stride, left < ROWS ? left : ROWS, inputs, next, words + p * PANEL);
            }
            for (size_t t = 0; t < tiles; t++)
                add_tile(words, (inputs + 1) / 2, x + t * tile_words + start / 2 * tile, tile, start % long_chain == 0,
                         chains + t * tile * BLOCK_OUTPUTS + first);
        }
        if (end == width || end % long_chain == 0)
            for (size_t r = 0; r < tiles * tile; r++)
                for (size_t i = r * BLOCK_OUTPUTS; i < r * BLOCK_OUTPUTS + outputs; i++)
                    sums[i] = start < long_chain ? chains[i] : sums[i] + chains[i];
    }
}

#endif
