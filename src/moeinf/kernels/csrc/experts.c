#include "moe.h"

#include "kernels.h"
#include "pool.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

/* A ticket is so much of one expert: UP values between the projections, or some outputs. Small enough that a thread
 * that loses its core holds up little; UP is a multiple of PAD, so that what a ticket makes is packed by itself. */
enum { UP = 2 * PAD, READ_BYTES = 1 << 20 };

struct moe_pool {
    pool *threads;
    const kernels *kernels;
    float *scratch;
    size_t scratch_floats;
};

/* One call of moe_experts. */
typedef struct {
    const moe_pool *pool;
    const moe_layer *layer;
    const void *const *experts;
    const int32_t *places;
    const float *weights;
    int row_dtype;
    float *rows;
    size_t count;
    size_t up_tickets, down_tickets, down_block; /* per expert */
    float *x;          /* the hidden state, packed */
    float *inner;      /* per expert, packed: what the down projection multiplies */
    size_t inner_size; /* of one expert, padded */
    atomic_int *left;  /* per expert: up tickets that are not done */
} step;

static size_t padded(int64_t size) {
    return ((size_t)size + PAD - 1) / PAD * PAD;
}

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

static float rounded(float value, int dtype) {
    return dtype == MOE_BF16 ? from_bf16(to_bf16(value)) : value;
}

static float load(const void *from, size_t i, int dtype) {
    return dtype == MOE_BF16 ? from_bf16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

/* Lays `size` values out as the kernels read them, and zeros behind them up to a multiple of PAD. */
static void pack(const moe_pool *pool, const moe_layer *layer, const float *values, size_t size, float *packed) {
    size_t lanes = (size_t)pool->kernels->lanes;
    bool in_pairs = layer->dtype == MOE_BF16 && !layer->is_transposed;
    for (size_t i = 0; i < padded((int64_t)size); i++) {
        size_t to = in_pairs ? i / (2 * lanes) * (2 * lanes) + i % 2 * lanes + i % (2 * lanes) / 2 : i;
        packed[to] = i < size ? values[i] : 0;
    }
}

/* Outputs `first` to `first + count` of one projection, biased and rounded as torch rounds. */
static void project(const step *step, const char *expert, int64_t weight, int64_t bias, size_t width, size_t outputs,
                    const float *x, size_t first, size_t count, float *out) {
    const moe_layer *layer = step->layer;
    const kernels *kernels = step->pool->kernels;
    bool is_bf16 = layer->dtype == MOE_BF16;
    const void *w = expert + weight;
    if (layer->is_transposed) {
        if (is_bf16)
            kernels->columns_bf16((const uint16_t *)w + first, outputs, width, count, x, out);
        else
            kernels->columns_f32((const float *)w + first, outputs, width, count, x, out);
    } else if (is_bf16)
        kernels->dot_bf16((const uint16_t *)w + first * width, width, count, x, out);
    else
        kernels->dot_f32((const float *)w + first * width, width, count, x, out);
    for (size_t i = 0; i < count; i++) {
        out[i] = rounded(out[i], layer->dtype);
        if (bias >= 0)
            out[i] = rounded(out[i] + load(expert + bias, first + i, layer->dtype), layer->dtype);
    }
}

/* The formulas are torch's, which computes them in float32 and rounds the result. */
static float activated(int activation, float x) {
    switch (activation) {
    case MOE_SILU:
        return x / (1 + expf(-x));
    case MOE_GELU:
        return x * 0.5f * (1 + erff(x * 0.70710678f));
    case MOE_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * (x * x * x))));
    default:
        return x > 0 ? x * x : 0;
    }
}

static float clamped(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

/* One value between the projections. `gate` is of no use where there is none. */
static float gated(const moe_layer *layer, float gate, float up) {
    int dtype = layer->dtype;
    if (layer->gate == MOE_NONE)
        return rounded(activated(layer->activation, up), dtype);
    if (layer->gate != MOE_PRODUCT) {
        gate = clamped(gate, -INFINITY, layer->limit);
        up = clamped(up, -layer->limit, layer->limit);
    }
    if (layer->gate == MOE_SIGMOID) {
        float share = rounded(1 / (1 + expf(-rounded(gate * layer->alpha, dtype))), dtype);
        return rounded(rounded(up + 1, dtype) * rounded(gate * share, dtype), dtype);
    }
    return rounded(rounded(activated(layer->activation, gate), dtype) * up, dtype);
}

/* Ups of `count` values from `projected`, their gates apart from them in `gates`, or between them, or nowhere. */
static void gate_all(const moe_layer *layer, const float *gates, const float *projected, size_t count, float *out) {
    for (size_t i = 0; i < count; i++)
        out[i] = layer->is_interleaved ? gated(layer, projected[2 * i], projected[2 * i + 1])
                                       : gated(layer, gates[i], projected[i]);
}

static void run_up(const step *step, size_t number, size_t ticket) {
    const moe_layer *layer = step->layer;
    const char *expert = step->experts[number];
    size_t hidden = (size_t)layer->hidden, inner = (size_t)layer->inner;
    size_t first = ticket * UP, count = smaller(UP, inner - first);
    float gates[UP] = {0}, ups[2 * UP], values[UP];
    if (layer->gate == MOE_NONE) {
        project(step, expert, layer->up, layer->up_bias, hidden, inner, step->x, first, count, ups);
    } else if (layer->is_interleaved) {
        project(step, expert, layer->up, layer->up_bias, hidden, 2 * inner, step->x, 2 * first, 2 * count, ups);
    } else {
        project(step, expert, layer->up, layer->up_bias, hidden, 2 * inner, step->x, first, count, gates);
        project(step, expert, layer->up, layer->up_bias, hidden, 2 * inner, step->x, inner + first, count, ups);
    }
    gate_all(layer, gates, ups, count, values);
    pack(step->pool, layer, values, count, step->inner + number * step->inner_size + first);
    pool_done(step->pool->threads, &step->left[number]);
}

static void run_down(const step *step, size_t number, size_t ticket) {
    const moe_layer *layer = step->layer;
    size_t hidden = (size_t)layer->hidden;
    size_t first = ticket * step->down_block, count = smaller(step->down_block, hidden - first);
    int32_t place = step->places[number];
    float *row = step->rows + (size_t)place * hidden + first;
    pool_wait(step->pool->threads, &step->left[number]);
    project(step, step->experts[number], layer->down, layer->down_bias, (size_t)layer->inner, hidden,
            step->inner + number * step->inner_size, first, count, row);
    for (size_t i = 0; i < count; i++)
        row[i] = rounded(row[i] * step->weights[place], step->row_dtype);
}

/* The up tickets of all experts come first: when a down ticket is drawn, little or nothing of what it needs is left. */
static void run_ticket(void *job, size_t ticket) {
    const step *step = job;
    size_t ups = step->count * step->up_tickets;
    if (ticket < ups)
        run_up(step, ticket / step->up_tickets, ticket % step->up_tickets);
    else
        run_down(step, (ticket - ups) / step->down_tickets, (ticket - ups) % step->down_tickets);
}

const char *moe_variant(int number) {
    const kernels *kernels = find_kernels(number);
    return kernels == NULL ? NULL : kernels->name;
}

moe_pool *moe_open(int threads, int variant) {
    moe_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->kernels = find_kernels(variant);
    pool->threads = pool_open(threads);
    if (pool->threads == NULL) {
        free(pool);
        return NULL;
    }
    return pool;
}

void moe_close(moe_pool *pool) {
    pool_close(pool->threads);
    free(pool->scratch);
    free(pool);
}

static bool reserve(moe_pool *pool, size_t floats) {
    if (floats <= pool->scratch_floats)
        return true;
    float *larger = aligned_alloc(64, ceil_div(floats * sizeof(float), 64) * 64);
    if (larger == NULL)
        return false;
    free(pool->scratch);
    pool->scratch = larger;
    pool->scratch_floats = floats;
    return true;
}

int moe_experts(moe_pool *pool, const moe_layer *layer, int count, const void *const *experts, const int32_t *places,
                const void *hidden, const float *weights, int row_dtype, float *rows) {
    size_t size = (size_t)layer->hidden, n = (size_t)count;
    size_t x_size = padded(layer->hidden), inner_size = padded(layer->inner);
    if (!reserve(pool, x_size + size + n * inner_size + n))
        return -1;
    float *plain = pool->scratch + x_size + n * inner_size;
    step step = {
        .pool = pool,
        .layer = layer,
        .experts = experts,
        .places = places,
        .weights = weights,
        .row_dtype = row_dtype,
        .rows = rows,
        .count = n,
        .up_tickets = ceil_div((size_t)layer->inner, UP),
        .down_block = layer->is_transposed ? COLUMNS : UP,
        .x = pool->scratch,
        .inner = pool->scratch + x_size,
        .inner_size = inner_size,
        .left = (atomic_int *)(plain + size),
    };
    step.down_tickets = ceil_div(size, step.down_block);
    for (size_t i = 0; i < size; i++)
        plain[i] = load(hidden, i, layer->dtype);
    pack(pool, layer, plain, size, step.x);
    for (size_t i = 0; i < n; i++)
        atomic_init(&step.left[i], (int)step.up_tickets);
    pool_run(pool->threads, run_ticket, &step, n * (step.up_tickets + step.down_tickets));
    return 0;
}

void moe_sum(const moe_layer *layer, int count, const int32_t *places, const float *rows, int sum_dtype,
             void *output) {
    for (int64_t i = 0; i < layer->hidden; i++) {
        float sum = 0;
        for (int k = 0; k < count; k++)
            sum = rounded(sum + rows[places[k] * layer->hidden + i], sum_dtype);
        if (layer->dtype == MOE_BF16)
            ((uint16_t *)output)[i] = to_bf16(sum);
        else
            ((float *)output)[i] = sum;
    }
}

void moe_activate(const moe_layer *layer, const float *projected, float *inner) {
    bool is_split = layer->gate != MOE_NONE && !layer->is_interleaved;
    gate_all(layer, projected, projected + (is_split ? layer->inner : 0), (size_t)layer->inner, inner);
}

typedef struct {
    const moe_pool *pool;
    const char *memory;
    size_t bytes;
    atomic_uint_least64_t sum;
} reading;

static void run_read(void *job, size_t ticket) {
    reading *reading = job;
    size_t first = ticket * READ_BYTES;
    uint64_t sum = reading->pool->kernels->read(reading->memory + first, smaller(READ_BYTES, reading->bytes - first));
    atomic_fetch_xor(&reading->sum, sum);
}

uint64_t moe_read(moe_pool *pool, const void *memory, size_t bytes) {
    reading reading = {.pool = pool, .memory = memory, .bytes = bytes};
    pool_run(pool->threads, run_read, &reading, ceil_div(bytes, READ_BYTES));
    return reading.sum;
}
