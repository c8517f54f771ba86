/* What the library's calls share: the pool behind them, and small arithmetic. */
#ifndef LIBRARY_H
#define LIBRARY_H

#include "kernels.h"
#include "pool.h"

#include <stdbool.h>

struct moe_pool {
    pool *threads;
    const kernels *kernels;
    void *scratch;
    size_t scratch_bytes;
};

/* Makes the scratch memory at least that large; what was in it is lost. */
bool reserve(moe_pool *pool, size_t bytes);

/* moe_linear for one x, of `count` layers that it is the input of. */
enum { MOST_TOGETHER = 3 };
int multiply_one(moe_pool *pool, size_t count, const moe_linear_layer *const *layers, const void *x,
                 void *const *outputs);

/* The sum of a row in float32, in the order that norm.c says. */
float sum_like_torch(const float *values, size_t size);

/* Of `count` numbers in float32, in place. Exponentials are added up in vectors of `lanes`, 8 or 16. */
void softmax(float *x, size_t count, size_t lanes);

/* The same as of bfloat16, to which what comes out is rounded. Numbers before `begin`, and from `end` on, are hidden, the last one
 * apart: they count as -INFINITY, and become 0. */
void softmax_bf16(float *x, size_t count, size_t lanes, size_t begin, size_t end);

/* Whether it has products of one x in this order (moe_order). */
static inline bool has_chains(const kernels *kernels, int64_t chain) {
    return chain == 0 || (kernels->dot_chains != NULL && kernels->takes_turns == (chain == MOE_IN_TURN));
}

static inline float rounded(float value, int dtype) {
    return dtype == MOE_BF16 ? from_bf16(to_bf16(value)) : value;
}

static inline float load(const void *from, size_t i, int dtype) {
    return dtype == MOE_BF16 ? from_bf16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

#endif
