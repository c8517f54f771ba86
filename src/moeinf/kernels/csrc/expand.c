#include "library.h"

enum { TILE = 64 }; /* columns that are laid out anew together */

/* One call of moe_expand. A ticket is PAD rows. */
typedef struct {
    const kernels *kernels;
    const uint8_t *weights, *scales;
    size_t rows, width;
    bool is_transposed;
    uint16_t *output;
} expansion;

/* `count` rows from `first` on, columns of TILE at a time. */
static void expand_across(const expansion *all, size_t first, size_t count) {
    uint16_t tile[PAD][TILE];
    for (size_t column = 0; column < all->width; column += TILE) {
        size_t columns = smaller(TILE, all->width - column);
        for (size_t r = 0; r < count; r++) {
            size_t at = (first + r) * all->width + column;
            all->kernels->expand_mxfp4(all->weights + at / 2, all->scales + at / FP4_GROUP, columns, 1, tile[r]);
        }
        for (size_t c = 0; c < columns; c++)
            for (size_t r = 0; r < count; r++)
                all->output[(column + c) * all->rows + first + r] = tile[r][c];
    }
}

static void run_ticket(void *job, size_t ticket) {
    const expansion *all = job;
    size_t first = ticket * PAD, count = smaller(PAD, all->rows - first), at = first * all->width;
    if (all->is_transposed)
        expand_across(all, first, count);
    else
        all->kernels->expand_mxfp4(all->weights + at / 2, all->scales + at / FP4_GROUP, all->width, count,
                                   all->output + at);
}

void moe_expand(moe_pool *pool, const void *weights, const void *scales, int64_t rows, int64_t width,
                int is_transposed, void *output) {
    expansion all = {pool->kernels, weights, scales, (size_t)rows, (size_t)width, is_transposed, output};
    pool_run(pool->threads, run_ticket, &all, ceil_div((size_t)rows, PAD));
}
