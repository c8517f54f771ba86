/* Exceptions of lossless weights (kernels.h), met in the order of their columns. */
#ifndef PANELS_H
#define PANELS_H

#include "kernels.h"

/* Where the exceptions of a panel are that come next. */
typedef struct {
    const uint32_t *next, *end;
} cursor;

static inline cursor exceptions_of(const lossless *w, size_t panel) {
    size_t begin, end = find_exceptions(w, panel, &begin);
    return (cursor){w->exceptions + begin, w->exceptions + end};
}

/* Goes on to the first one that is in `column` or behind it. */
static inline void skip_to(cursor *at, size_t column) {
    while (at->next < at->end && column_of(*at->next) < column)
        at->next++;
}

static inline bool has_exceptions(const cursor *at, size_t column) {
    return __builtin_expect(at->next < at->end && column_of(*at->next) < column + PANEL_INPUTS, 0);
}

/* Puts the upper bytes of the eight columns from `column` on that are exceptions into those that were looked up, which lie as
 * lower bytes do: [2, 16, 4]. */
static __attribute__((noinline, unused)) void correct(cursor *at, size_t column, void *high) {
    for (; has_exceptions(at, column); at->next++) {
        size_t inside = column_of(*at->next) - column;
        if (inside < PANEL_INPUTS) /* damaged files have others */
            ((uint8_t *)high)[inside / 4 * 64 + row_of(*at->next) * 4 + PANEL_ORDER[inside % 4]] = (uint8_t)*at->next;
    }
}

#endif
