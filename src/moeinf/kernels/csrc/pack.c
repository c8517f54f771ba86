#include "kernels.h"
#include "moe.h"

#include <stdbool.h>

enum { UPPERS = 256, TABLE = 16, NONE = TABLE };

/* The most frequent upper bytes, of equally many the smaller ones first; returns how many weights have others. */
static size_t choose_table(const uint16_t *w, size_t count, uint8_t *table) {
    size_t counts[2][UPPERS] = {{0}}; /* neighbours are often alike, and one would wait for the other */
    for (size_t i = 0; i + 1 < count; i += 2) {
        counts[0][w[i] >> 8]++;
        counts[1][w[i + 1] >> 8]++;
    }
    for (size_t k = 0; k < UPPERS; k++)
        counts[0][k] += counts[1][k];
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

/* A panel of eight columns; returns the end of its exceptions. */
static uint32_t *pack_panel(const uint16_t *w, size_t width, size_t column, const uint8_t *index, uint8_t *panel,
                            uint32_t *exceptions) {
    uint32_t *end = exceptions;
    for (size_t r = 0; r < PANEL_ROWS; r++, w += width) {
        uint8_t codes[PANEL_INPUTS];
        for (size_t c = 0; c < PANEL_INPUTS; c++) {
            codes[c] = index[w[c] >> 8];
            panel[c / 4 * 64 + 4 * r + PANEL_ORDER[c % 4]] = (uint8_t)w[c];
            if (codes[c] == NONE) {
                insert((uint32_t)((column + c) << 12 | r << 8 | w[c] >> 8), exceptions, end++);
                codes[c] = 0;
            }
        }
        for (size_t c = 0; c < 4; c++)
            panel[128 + 4 * r + PANEL_ORDER[c]] = (uint8_t)(codes[c] | codes[c + 4] << 4);
    }
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
