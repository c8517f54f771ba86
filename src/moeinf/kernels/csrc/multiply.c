#include "library.h"

/* Some of the x of one call of moe_linear. They lie in tiles, which the first tickets pack; every other ticket is BLOCK_OUTPUTS. */
typedef struct {
    const moe_pool *pool;
    const moe_linear_layer *layer;
    size_t all_rows, rows, tiles, tile, tile_bytes;
    const uint16_t *x;
    uint16_t *output;
    char *packed;
    atomic_int unpacked;
} block;

static void pack(block *block, size_t number) {
    size_t inputs = (size_t)block->layer->inputs, first = number * block->tile;
    size_t rows = first < block->rows ? smaller(block->tile, block->rows - first) : 0;
    const uint16_t *x[TILE_ROWS];
    for (size_t r = 0; r < rows; r++)
        x[r] = block->x + (first + r) * inputs;
    block->pool->kernels->tiles.pack(x, inputs, rows, block->tile, block->packed + number * block->tile_bytes);
    pool_done(block->pool->threads, &block->unpacked);
}

static inline __attribute__((always_inline)) void multiply(const block *block, size_t first) {
    const moe_linear_layer *layer = block->layer;
    size_t inputs = (size_t)layer->inputs, outputs = (size_t)layer->outputs;
    size_t count = smaller(BLOCK_OUTPUTS, outputs - first);
    const uint16_t *bias = layer->bias;
    float sums[BLOCK_ROWS * BLOCK_OUTPUTS];
    int kind = layer->uppers == NULL ? MOE_PLAIN : MOE_LOSSLESS;
    matrix w = {.kind = kind, .numbers = layer->weight, .scales = layer->uppers, .rows = outputs, .width = inputs};
    const kernels *kernels = block->pool->kernels;
    moe_order order = layer->order.chain != 0 ? layer->order : own_order(&kernels->tiles, block->all_rows, inputs);
    kernels->tiles.multiply(&w, first, count, &order, block->packed, block->tile, block->tiles, sums);
    for (size_t r = 0; r < block->rows; r++) {
        float *sum = sums + r * BLOCK_OUTPUTS;
        uint16_t *output = block->output + r * outputs + first;
        for (size_t i = 0; bias != NULL && i < count; i++)
            sum[i] += from_bf16(bias[first + i]);
        for (size_t i = 0; i < count; i++)
            output[i] = to_bf16(sum[i]);
    }
}

WIDE_TARGET static void multiply_wide(const block *block, size_t first) {
    multiply(block, first);
}

AVX2_TARGET static void multiply_narrow(const block *block, size_t first) {
    multiply(block, first);
}

static void run_ticket(void *job, size_t ticket) {
    block *block = job;
    if (ticket < block->tiles) {
        pack(block, ticket);
    } else {
        pool_wait(block->pool->threads, &block->unpacked);
        (block->pool->kernels->is_wide ? multiply_wide : multiply_narrow)(block, (ticket - block->tiles) * BLOCK_OUTPUTS);
    }
}

int moe_linear(moe_pool *pool, const moe_linear_layer *layer, int64_t count, const void *x, void *output) {
    size_t inputs = (size_t)layer->inputs, outputs = (size_t)layer->outputs;
    if (count == 1)
        return multiply_one(pool, 1, &layer, x, &output);
    if (pool->kernels->tiles.multiply == NULL)
        return -2;
    for (size_t done = 0, rows; done < (size_t)count; done += rows) {
        rows = smaller(BLOCK_ROWS, (size_t)count - done);
        size_t tiles = ceil_div(rows, TILE_ROWS), tile = ceil_div(rows, 2 * tiles) * 2;
        size_t tile_bytes = tile * pool->kernels->tiles.bytes(inputs);
        if (!reserve(pool, tiles * tile_bytes))
            return -1;
        block block = {
            .pool = pool,
            .layer = layer,
            .all_rows = (size_t)count,
            .rows = rows,
            .tiles = tiles,
            .tile = tile,
            .tile_bytes = tile_bytes,
            .x = (const uint16_t *)x + done * inputs,
            .output = (uint16_t *)output + done * outputs,
            .packed = pool->scratch,
        };
        atomic_init(&block.unpacked, (int)tiles);
        pool_run(pool->threads, run_ticket, &block, tiles + ceil_div(outputs, BLOCK_OUTPUTS));
    }
    return 0;
}
