/* What attention's loops share: one set of them per instruction set. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "library.h"

enum { BLOCK = 512, AT_A_TIME = 4, MOST_HEADS = 4 /* whose totals are in registers together */ };

/* One head over the blocks so far. */
typedef struct {
    float most, sum;
    float *chances; /* of the block */
    float *total;   /* [size] */
} head;

/* score: scores of `count` keys, `apart` numbers from each other, for all heads that share them, queries being [heads, size].
 * Past `count` there is room in the block. take_in: the scores of a block become chances, rounded, and the head's maximum and
 * sum take them in; what earlier blocks gave shrinks as the maximum grows. weigh: adds the values of a block, weighed, to the
 * totals of all heads that share them. */
typedef struct {
    void (*score)(const head *each, size_t heads, const float *queries, const uint16_t *keys, size_t apart, size_t size,
                  size_t count);
    void (*take_in)(head *head, float scale, size_t count, size_t size);
    void (*weigh)(const head *each, size_t heads, const uint16_t *values, size_t apart, size_t size, size_t count);
} attention_loops;

#if defined(__x86_64__)
extern const attention_loops attention_avx2;
#endif
#ifdef HAS_DOT_PAIRS
extern const attention_loops attention_avx512;
#endif

#endif
