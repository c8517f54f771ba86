/* Experts of many tokens: every task is some rows of one expert, whose hidden states are gathered into tiles (tiles.c), and
 * whose outputs are weighted on the way out. */
#include "layer.h"

/* Tasks are computed so many at a time, or as many as take so many bytes of scratch memory. */
enum { MOST_TASKS = 64, ENOUGH = 8 << 20 };

/* Some rows of an expert, BLOCK_ROWS at most, which lie in tiles: what goes into it, and what is between its projections. */
typedef struct {
    const moe_layer *layer;
    const char *expert;
    moe_order orders[2]; /* up and down */
    size_t first, rows; /* among the call's rows; how many */
    size_t tile, tiles;
    char *x, *inner;
    atomic_int unpacked, up_left;
} task;

/* One call of moe_prompt. A ticket is a task's rows to pack, or BLOCK_OUTPUTS outputs of a task's up or down projection. */
typedef struct {
    const moe_pool *pool;
    const moe_layer *layer;
    const int64_t *tokens;
    const float *weights;
    const uint16_t *hidden;
    int row_dtype, sum_dtype;
    void *rows;
    task *tasks;
    size_t count, ups, downs; /* tasks at a time; up and down tickets of each */
} call;

static void pack(const call *call, task *task) {
    const tiling *tiles = &call->pool->kernels->tiles;
    size_t width = (size_t)call->layer->hidden;
    for (size_t t = 0; t < task->tiles; t++) {
        const uint16_t *x[TILE_ROWS];
        size_t first = t * task->tile, rows = first < task->rows ? smaller(task->tile, task->rows - first) : 0;
        for (size_t r = 0; r < rows; r++)
            x[r] = call->hidden + (size_t)call->tokens[task->first + first + r] * width;
        tiles->pack(x, width, rows, task->tile, task->x + first * tiles->bytes(width));
    }
    pool_done(call->pool->threads, &task->unpacked);
}

/* `count` outputs of one projection, from `first` on: sums[x * BLOCK_OUTPUTS + output]. */
static void multiply(const call *call, const task *task, bool is_up, size_t first, size_t count, float *sums) {
    const moe_layer *layer = call->layer;
    const kernels *kernels = call->pool->kernels;
    size_t hidden = (size_t)layer->hidden, inner = (size_t)layer->inner, ups = layer->gate == MOE_NONE ? inner : 2 * inner;
    int64_t block = is_up ? layer->up_block : layer->down_block;
    matrix w = {
        .kind = layer->weights,
        .numbers = task->expert + (is_up ? layer->up : layer->down),
        .scales = task->expert + (is_up ? layer->up_scales : layer->down_scales),
        .rows = is_up ? ups : hidden,
        .width = is_up ? hidden : inner,
        .group = (size_t)(layer->weights == MOE_FP8 ? block : layer->group),
    };
    kernels->tiles.multiply(&w, first, count, &task->orders[is_up ? 0 : 1], is_up ? task->x : task->inner, task->tile,
                            task->tiles, sums);
}

static inline __attribute__((always_inline)) void up(const call *call, task *task, size_t ticket) {
    enum { HALF = BLOCK_OUTPUTS };
    const tiling *tiles = &call->pool->kernels->tiles;
    const moe_layer *layer = task->layer;
    size_t inner = (size_t)layer->inner, first = ticket * HALF, count = smaller(HALF, inner - first);
    float sums[2][BLOCK_ROWS * BLOCK_OUTPUTS];
    size_t firsts[2] = {first, inner + first}, counts[2] = {count, count};
    bool is_interleaved = layer->gate != MOE_NONE && layer->is_interleaved;
    if (is_interleaved) {
        firsts[0] = 2 * first;
        firsts[1] = 2 * first + HALF;
        counts[0] = smaller(HALF, 2 * count);
        counts[1] = 2 * count - counts[0];
    }
    for (int half = 0; half < (layer->gate == MOE_NONE ? 1 : 2); half++) {
        if (counts[half] == 0)
            continue;
        multiply(call, task, true, firsts[half], counts[half], sums[half]);
        for (size_t r = 0; r < task->rows; r++)
            add_bias(layer, layer->up_bias, task->expert, firsts[half], counts[half], sums[half] + r * BLOCK_OUTPUTS);
    }
    for (size_t r = 0; r < task->tiles * task->tile; r++) {
        float both[2 * HALF], values[HALF] = {0};
        const float *gates = sums[0] + r * BLOCK_OUTPUTS, *ups = sums[has_gates_first(layer) ? 1 : 0] + r * BLOCK_OUTPUTS;
        if (is_interleaved) {
            memcpy(both, gates, sizeof both / 2);
            memcpy(both + HALF, sums[1] + r * BLOCK_OUTPUTS, sizeof both / 2);
            ups = both;
        }
        if (r < task->rows)
            gate_all(layer, gates, ups, count, values);
        tiles->put(values, first, count, inner, task->tile, r % task->tile,
                   task->inner + r / task->tile * task->tile * tiles->bytes(inner));
    }
    pool_done(call->pool->threads, &task->up_left);
}

static inline __attribute__((always_inline)) void down(const call *call, const task *task, size_t ticket) {
    const moe_layer *layer = call->layer;
    size_t hidden = (size_t)layer->hidden, first = ticket * BLOCK_OUTPUTS, count = smaller(BLOCK_OUTPUTS, hidden - first);
    float sums[BLOCK_ROWS * BLOCK_OUTPUTS];
    multiply(call, task, false, first, count, sums);
    for (size_t r = 0; r < task->rows; r++) {
        float *out = sums + r * BLOCK_OUTPUTS, weight = call->weights[task->first + r];
        size_t at = (task->first + r) * hidden + first;
        add_bias(layer, layer->down_bias, task->expert, first, count, out);
        for (size_t i = 0; i < count; i++)
            out[i] = rounded(out[i] * weight, call->row_dtype);
        if (call->sum_dtype == MOE_BF16)
            for (size_t i = 0; i < count; i++)
                ((uint16_t *)call->rows)[at + i] = to_bf16(out[i]);
        else
            memcpy((float *)call->rows + at, out, count * sizeof *out);
    }
}

WIDE_TARGET static void up_wide(const call *call, task *task, size_t ticket) {
    up(call, task, ticket);
}

AVX2_TARGET static void up_narrow(const call *call, task *task, size_t ticket) {
    up(call, task, ticket);
}

WIDE_TARGET static void down_wide(const call *call, const task *task, size_t ticket) {
    down(call, task, ticket);
}

AVX2_TARGET static void down_narrow(const call *call, const task *task, size_t ticket) {
    down(call, task, ticket);
}

/* All packing comes first, then all ups: what a ticket needs was drawn long before it. */
static void run_ticket(void *job, size_t ticket) {
    const call *call = job;
    bool is_wide = call->pool->kernels->is_wide;
    if (ticket < call->count) {
        pack(call, call->tasks + ticket);
        return;
    }
    ticket -= call->count;
    if (ticket < call->count * call->ups) {
        task *task = call->tasks + ticket / call->ups;
        pool_wait(call->pool->threads, &task->unpacked);
        (is_wide ? up_wide : up_narrow)(call, task, ticket % call->ups);
        return;
    }
    ticket -= call->count * call->ups;
    task *task = call->tasks + ticket / call->downs;
    pool_wait(call->pool->threads, &task->up_left);
    (is_wide ? down_wide : down_narrow)(call, task, ticket % call->downs);
}

int moe_prompt(moe_pool *pool, const moe_layer *layer, int count, const void *const *experts, const int64_t *begins,
               const int64_t *ends, const moe_order *orders, const int64_t *tokens, const float *weights,
               const void *hidden, int row_dtype, int sum_dtype, void *rows) {
    const tiling *tiling = &pool->kernels->tiles;
    if (tiling->multiply == NULL || layer->dtype != MOE_BF16 || layer->is_transposed)
        return -2;
    size_t width = (size_t)layer->hidden, inner = (size_t)layer->inner;
    size_t x_bytes = tiling->bytes(width), row_bytes = x_bytes + tiling->bytes(inner);
    size_t room = larger(ENOUGH, BLOCK_ROWS * row_bytes);
    if (!reserve(pool, room))
        return -1;
    moe_layer several = *layer;
    several.values = layer->values_of_several;
    task tasks[MOST_TASKS];
    call call = {
        .pool = pool,
        .layer = layer,
        .tokens = tokens,
        .weights = weights,
        .hidden = hidden,
        .row_dtype = row_dtype,
        .sum_dtype = sum_dtype,
        .rows = rows,
        .tasks = tasks,
        .ups = ceil_div(inner, BLOCK_OUTPUTS),
        .downs = ceil_div(width, BLOCK_OUTPUTS),
    };
    for (int64_t i = 0, begin = 0; i < count;) {
        size_t used = 0;
        for (call.count = 0; i < count && call.count < MOST_TASKS; call.count++) {
            size_t left = (size_t)(ends[i] - begins[i] - begin), some = smaller(BLOCK_ROWS, left);
            size_t tiles = ceil_div(some, TILE_ROWS), tile = ceil_div(some, 2 * tiles) * 2;
            size_t bytes = tiles * tile * row_bytes;
            if (used + bytes > room)
                break;
            task *task = tasks + call.count;
            task->layer = ends[i] - begins[i] > 1 ? &several : layer;
            task->expert = experts[i];
            task->first = (size_t)(begins[i] + begin);
            task->rows = some;
            for (int way = 0; way < 2; way++) {
                moe_order own = own_order(tiling, (size_t)(ends[i] - begins[i]), way == 0 ? width : inner);
                task->orders[way] = orders != NULL && orders[2 * i + way].chain != 0 ? orders[2 * i + way] : own;
            }
            task->tile = tile;
            task->tiles = tiles;
            task->x = (char *)pool->scratch + used;
            task->inner = task->x + tiles * tile * x_bytes;
            atomic_init(&task->unpacked, 1);
            atomic_init(&task->up_left, (int)call.ups);
            used += bytes;
            begin = left > some ? begin + (int64_t)some : 0;
            i += left == some;
        }
        pool_run(pool->threads, run_ticket, &call, call.count * (1 + call.ups + call.downs));
    }
    return 0;
}

/* One call of moe_add. A ticket is so many numbers of every row. */
enum { ADDED = 256 };
typedef struct {
    int dtype;
    size_t width, count;
    const int64_t *tokens;
    const void *rows;
    void *total;
} adding;

static inline __attribute__((always_inline)) void add(const adding *all, size_t ticket) {
    size_t first = ticket * ADDED, count = smaller(ADDED, all->width - first);
    for (size_t k = 0; k < all->count; k++) {
        size_t to = (size_t)all->tokens[k] * all->width + first, from = k * all->width + first;
        if (all->dtype == MOE_BF16) {
            uint16_t *restrict sum = (uint16_t *)all->total + to;
            const uint16_t *row = (const uint16_t *)all->rows + from;
            for (size_t i = 0; i < count; i++)
                sum[i] = to_bf16(from_bf16(sum[i]) + from_bf16(row[i]));
        } else
            for (size_t i = 0; i < count; i++)
                ((float *)all->total)[to + i] += ((const float *)all->rows)[from + i];
    }
}

WIDE_TARGET static void add_wide(void *job, size_t ticket) {
    add(job, ticket);
}

AVX2_TARGET static void add_narrow(void *job, size_t ticket) {
    add(job, ticket);
}

void moe_add(moe_pool *pool, int dtype, int64_t width, int64_t count, const int64_t *tokens, const void *rows,
             void *total) {
    adding all = {dtype, (size_t)width, (size_t)count, tokens, rows, total};
    pool_run(pool->threads, pool->kernels->is_wide ? add_wide : add_narrow, &all, ceil_div(all.width, ADDED));
}
