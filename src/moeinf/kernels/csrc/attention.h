/* What attention's loops share: one set of them per instruction set. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "library.h"

#include <math.h>

enum { BLOCK = 512, AT_A_TIME = 4, MOST_HEADS = 4 /* whose totals are in registers together */ };

/* One head over the blocks so far. */
typedef struct {
    float most, sum;
    float *chances; /* of the block */
    float *total;   /* [size] */
} head;

/* The end of take_in, which found the maximum and, from the chances before `from`, that sum. */
static inline void end_block(head *head, float most, float sum, size_t from, size_t count, size_t size) {
    float *scores = head->chances;
    for (size_t t = from; t < count; t++) {
        scores[t] = (float)exp(scores[t] - most);
        sum += scores[t];
    }
    for (size_t t = 0; t < count; t++)
        scores[t] = rounded(scores[t], MOE_BF16);
    float shrink = (float)exp(head->most - most);
    head->sum = fmaf(shrink, head->sum, sum);
    head->most = most;
    for (size_t i = 0; i < size; i++)
        head->total[i] *= shrink;
}

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

/* moe_attend where values are of another width than keys. */
int attend_widely(moe_pool *pool, const moe_attention *what, void *output);
#endif
#ifdef HAS_DOT_PAIRS
extern const attention_loops attention_avx512;
#endif

#endif
