/* Sums of rows as torch adds them up (ATen/native/cpu/SumKernel.cpp, found again by trying): LEVELS sums, of which the first is
 * emptied into the next every 16 rows or more, and that one into the next, so that no sum takes in too many small numbers. */
#ifndef ROW_SUM_H
#define ROW_SUM_H

#include <stddef.h>
#include <string.h>

enum { LEVELS = 4 };

typedef struct {
    float *levels; /* [LEVELS, width] */
    size_t width, row, step;
    int power;
} row_sum;

static inline void add_to(float *sums, const float *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        sums[i] += values[i];
}

static inline row_sum begin_rows(float *levels, size_t rows, size_t width) {
    int log2 = 0;
    while ((size_t)1 << log2 < rows)
        log2++;
    int power = log2 / LEVELS > 4 ? log2 / LEVELS : 4;
    memset(levels, 0, LEVELS * width * sizeof *levels);
    return (row_sum){.levels = levels, .width = width, .step = (size_t)1 << power, .power = power};
}

/* A row has been added to the first sum. */
static inline void end_row(row_sum *sum) {
    if ((++sum->row & (sum->step - 1)) != 0)
        return;
    for (int level = 1; level < LEVELS; level++) {
        float *filled = sum->levels + (size_t)(level - 1) * sum->width;
        add_to(filled + sum->width, filled, sum->width);
        memset(filled, 0, sum->width * sizeof *filled);
        if ((sum->row & ((sum->step - 1) << (level * sum->power))) != 0)
            break;
    }
}

/* The sum [width]. */
static inline float *end_rows(row_sum *sum) {
    for (size_t level = 1; level < LEVELS; level++)
        add_to(sum->levels, sum->levels + level * sum->width, sum->width);
    return sum->levels;
}

#endif
