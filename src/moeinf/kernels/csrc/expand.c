#include "library.h"

/* One call of moe_expand and its kind. A ticket is PAD rows. */
typedef struct {
    const kernels *kernels;
    const uint8_t *weights, *scales;
    fp8_blocks blocks; /* instead of `scales` */
    lossless packed;   /* instead of both */
    size_t rows, width;
    bool is_transposed;
    uint16_t *output;
} expansion;

static void expand_rows(void *job, size_t ticket) {
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
    expansion all = {
        .kernels = pool->kernels,
        .weights = weights,
        .scales = scales,
        .rows = (size_t)rows,
        .width = (size_t)width,
        .is_transposed = is_transposed,
        .output = output,
    };
    pool_run(pool->threads, expand_rows, &all, ceil_div(all.rows, PAD));
}

static void expand_blocks(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, count = smaller(PAD, all->rows - first);
    all->kernels->expand_fp8(all->weights, &all->blocks, all->width, first, count, all->output + first * all->width);
}

void moe_expand_fp8(moe_pool *pool, int64_t block, const void *weights, const void *scales, int64_t rows, int64_t width,
                    void *output) {
    expansion all = {
        .kernels = pool->kernels,
        .weights = weights,
        .blocks = {scales, (size_t)block},
        .rows = (size_t)rows,
        .width = (size_t)width,
        .output = output,
    };
    pool_run(pool->threads, expand_blocks, &all, ceil_div(all.rows, PAD));
}

static void expand_panels(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, count = smaller(PAD, all->rows - first);
    all->kernels->expand_lossless(&all->packed, all->width, first, count, all->output + first * all->width);
}

void moe_expand_lossless(moe_pool *pool, const void *panels, const void *uppers, int64_t rows, int64_t width,
                         int64_t first, int64_t count, void *output) {
    expansion all = {
        .kernels = pool->kernels,
        .packed = make_lossless(panels, uppers, (size_t)rows, (size_t)width),
        .rows = (size_t)count,
        .width = (size_t)width,
        .output = output,
    };
    all.packed.panels += (size_t)(first * width) / (PANEL_ROWS * PANEL_INPUTS) * PANEL_BYTES;
    all.packed.begins += (size_t)first / PANEL_ROWS;
    pool_run(pool->threads, expand_panels, &all, ceil_div(all.rows, PAD));
}
