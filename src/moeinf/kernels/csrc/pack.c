#include "kernels.h"
#include "moe.h"

#include <stdbool.h>

enum { UPPERS = 256, TABLE = 16, NONE = TABLE, CODES = 0x0f0f0f0f };

/* The most frequent upper bytes, of equally many the smaller ones first; returns how many weights have others. */
static size_t choose_table(const uint16_t *w, size_t count, uint8_t *table) {
    size_t counts[4][UPPERS] = {{0}}; /* neighbours are often alike, and one would wait for the other */
    for (size_t i = 0; i + 3 < count; i += 4)
        for (size_t k = 0; k < 4; k++)
            counts[k][w[i + k] >> 8]++;
    for (size_t k = 0; k < UPPERS; k++)
        counts[0][k] += counts[1][k] + counts[2][k] + counts[3][k];
    bool is_taken[UPPERS] = {false};
    for (size_t place = 0; place < TABLE; place++) {
        size_t best = UPPERS;
        for (size_t k = 0; k < UPPERS; k++)
            if (!is_taken[k] && (best == UPPERS || counts[0][k] > counts[0][best]))
                best = k;
        is_taken[best] = true;
        table[place] = (uint8_t)best;
        count -= counts[0][best];
    }
    return count;
}

/* Puts an exception behind those of smaller columns and rows, which are few. */
static void insert(uint32_t exception, uint32_t *begin, uint32_t *end) {
    for (; end > begin && end[-1] > exception; end--)
        end[0] = end[-1];
    *end = exception;
}

/* Four bytes, in the lower halves of words of 16 bits or alone, as they lie in a panel, PANEL_ORDER. */
static uint32_t word_of(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
    return (b0 & 255) | (b2 & 255) << 8 | (b1 & 255) << 16 | b3 << 24;
}

static uint32_t look_up(const uint8_t *index, const uint16_t *w) {
    return word_of(index[w[0] >> 8], index[w[1] >> 8], index[w[2] >> 8], index[w[3] >> 8]);
}

/* A row of a panel; returns the end of its exceptions. */
static uint32_t *pack_row(const uint16_t *w, size_t column, size_t r, const uint8_t *index, uint8_t *panel,
                          uint32_t *exceptions, uint32_t *end) {
    uint32_t lowers[] = {word_of(w[0], w[1], w[2], w[3]), word_of(w[4], w[5], w[6], w[7])};
    uint32_t low = look_up(index, w), high = look_up(index, w + 4), codes = (low & CODES) | (high & CODES) << 4;
    memcpy(panel + 4 * r, lowers, sizeof *lowers);
    memcpy(panel + 64 + 4 * r, lowers + 1, sizeof *lowers);
    memcpy(panel + 128 + 4 * r, &codes, sizeof codes);
    for (size_t c = 0; (low | high) & ~CODES && c < PANEL_INPUTS; c++)
        if (index[w[c] >> 8] == NONE)
            insert((uint32_t)((column + c) << 12 | r << 8 | w[c] >> 8), exceptions, end++);
    return end;
}

/* A panel of eight columns; returns the end of its exceptions. */
static uint32_t *pack_panel(const uint16_t *w, size_t width, size_t column, const uint8_t *index, uint8_t *panel,
                            uint32_t *exceptions) {
    uint32_t *end = exceptions;
    for (size_t r = 0; r < PANEL_ROWS; r++)
        end = pack_row(w + r * width, column, r, index, panel, exceptions, end);
    return end;
}

int64_t moe_pack_lossless(const void *weights, int64_t rows, int64_t width, void *panels, void *uppers) {
    const uint16_t *w = weights;
    size_t all = (size_t)(rows * width), columns = (size_t)width, count = (size_t)rows / PANEL_ROWS;
    uint8_t *table = uppers, *panel = panels, index[UPPERS];
    size_t others = choose_table(w, all, table), room = all / EXCEPTION_SHARE;
    if (others > room)
        return (int64_t)others;
    memset(index, NONE, sizeof index);
    for (size_t k = 0; k < TABLE; k++)
        index[table[k]] = (uint8_t)k;
    uint32_t *begins = (uint32_t *)uppers + TABLE_WORDS, *exceptions = begins + count + 1, *end = exceptions;
    for (size_t p = 0; p < count; p++, w += PANEL_ROWS * columns) {
        begins[p] = (uint32_t)(end - exceptions);
        for (size_t column = 0; column < columns; column += PANEL_INPUTS, panel += PANEL_BYTES)
            end = pack_panel(w + column, columns, column, index, panel, end);
    }
    begins[count] = (uint32_t)others;
    memset(end, 0, (room - others) * sizeof *end);
    return (int64_t)others;
}
