#include "library.h"

/* One call of moe_expand. A ticket is PAD rows. */
typedef struct {
    const kernels *kernels;
    const uint8_t *weights, *scales;
    size_t rows, width;
    bool is_transposed;
    uint16_t *output;
} expansion;

static void run_ticket(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, count = smaller(PAD, all->rows - first), at = first * all->width;
    const uint8_t *weights = all->weights + at / 2, *scales = all->scales + at / FP4_GROUP;
    if (all->is_transposed)
        all->kernels->turn_mxfp4(weights, scales, all->width, count, all->rows, all->output + first);
    else
        all->kernels->expand_mxfp4(weights, scales, all->width, count, all->output + at);
}

void moe_expand(moe_pool *pool, const void *weights, const void *scales, int64_t rows, int64_t width,
                int is_transposed, void *output) {
    expansion all = {pool->kernels, weights, scales, (size_t)rows, (size_t)width, is_transposed, output};
    pool_run(pool->threads, run_ticket, &all, ceil_div((size_t)rows, PAD));
}
