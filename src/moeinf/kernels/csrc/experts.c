#include "layer.h"

#include <stdbool.h>

/* A ticket is so much of one expert, little enough that a thread which loses its core holds up little.
 * Of weights that are [out, in], PAD outputs, which are then laid out together as the next kernel wants them.
 * Of weights that are [in, out], a chain of inputs and some RUN outputs, because memory is read best in long runs; the last
 * ticket to end adds up the chains. */
enum { RUN = 3072 };

/* One of an expert's two projections. */
typedef struct {
    int64_t weight, scales, bias; /* as in moe_layer */
    size_t inputs, outputs;
    size_t block;
    int64_t chain; /* these two as in moe_layer */
    size_t tickets; /* per expert */
    size_t chains;  /* these three where weights are [in, out] */
    size_t run;
    float *parts; /* per expert and chain, `outputs` sums */
} projection;

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
    projection up, down;
    packing packing; /* of x and inner */
    char *x;           /* the hidden state, packed */
    char *inner;       /* per expert, packed: what is between the projections */
    size_t inner_size; /* bytes of one expert's */
    atomic_int *up_left, *down_left; /* per expert: tickets that are not done, and the adding up */
} step;

static packing choose_packing(const moe_layer *layer, const kernels *kernels) {
    if (layer->weights == MOE_INT8)
        return kernels->bytes;
    if (layer->weights == MOE_INT4)
        return kernels->nibbles;
    if (layer->weights >= MOE_MXFP4 || (layer->dtype == MOE_BF16 && !layer->is_transposed))
        return kernels->pairs;
    return (packing){pack_plain, PAD * sizeof(float)};
}

/* Outputs `first` to `first + count` of a projection whose weights are [out, in]. */
static void dot(const step *step, const projection *projection, const char *expert, const void *x, size_t first,
                size_t count, float *out) {
    const kernels *kernels = step->pool->kernels;
    const moe_layer *layer = step->layer;
    const char *w = expert + projection->weight;
    size_t inputs = projection->inputs, group = (size_t)layer->group;
    if (projection->chain != 0) {
        const matrix matrix = {layer->weights, w, expert + projection->scales, projection->outputs, inputs, projection->block};
        kernels->dot_chains(&matrix, first, count, projection->chain, x, out);
    } else if (layer->weights == MOE_MXFP4) {
        const uint8_t *scales = (const uint8_t *)expert + projection->scales + first * (inputs / FP4_GROUP);
        kernels->dot_mxfp4((const uint8_t *)w + first * inputs / 2, scales, inputs, count, x, out);
    } else if (layer->weights == MOE_FP8) {
        fp8_blocks blocks = {(const float *)(expert + projection->scales), projection->block};
        kernels->dot_fp8((const uint8_t *)w, &blocks, inputs, first, count, x, out);
    } else if (layer->weights == MOE_LOSSLESS) {
        lossless packed = make_lossless(w, expert + projection->scales, projection->outputs, inputs);
        kernels->dot_lossless(&packed, inputs, first, count, x, out);
    } else if (layer->weights == MOE_INT8) {
        const uint16_t *scales = (const uint16_t *)(expert + projection->scales) + first * ceil_div(inputs, group);
        kernels->dot_int8((const uint8_t *)w + first * inputs, scales, inputs, group, count, x, out);
    } else if (layer->weights == MOE_INT4) {
        const uint8_t *scales = (const uint8_t *)expert + projection->scales + first * int4_factor_bytes(inputs);
        kernels->dot_int4((const uint8_t *)w + first * ceil_div(inputs, 2), scales, inputs, count, x, out);
    } else if (layer->dtype == MOE_BF16)
        kernels->dot_bf16((const uint16_t *)w + first * inputs, inputs, count, x, out);
    else
        kernels->dot_f32((const float *)w + first * inputs, inputs, count, x, out);
}

/* One chain of inputs for one run of outputs of a projection whose weights are [in, out]. */
static void add_part(const step *step, const projection *projection, size_t number, size_t ticket, const float *x) {
    const kernels *kernels = step->pool->kernels;
    const void *w = (const char *)step->experts[number] + projection->weight;
    size_t outputs = projection->outputs, chain = ticket % projection->chains;
    size_t output = ticket / projection->chains * projection->run, run = smaller(projection->run, outputs - output);
    float *part = projection->parts + (number * projection->chains + chain) * outputs + output;
    if (step->layer->dtype == MOE_BF16)
        kernels->columns_bf16((const uint16_t *)w + output, outputs, run, projection->inputs, chain, x, part);
    else
        kernels->columns_f32((const float *)w + output, outputs, run, projection->inputs, chain, x, part);
}

/* The chains of an expert added up, in the first of them. */
static float *whole(const projection *projection, size_t number) {
    size_t outputs = projection->outputs;
    float *sums = projection->parts + number * projection->chains * outputs;
    for (size_t chain = 1; chain < projection->chains; chain++)
        for (size_t i = 0; i < outputs; i++)
            sums[i] += sums[chain * outputs + i];
    return sums;
}

/* Whether this was the last ticket, and the adding up is left. */
static bool is_last(atomic_int *left) {
    return atomic_fetch_sub_explicit(left, 1, memory_order_acq_rel) == 2;
}

static void up_rows(const step *step, size_t number, size_t ticket) {
    const moe_layer *layer = step->layer;
    const projection *up = &step->up;
    const char *expert = step->experts[number];
    size_t inner = (size_t)layer->inner, first = ticket * PAD, count = smaller(PAD, inner - first);
    size_t each = layer->is_interleaved ? 2 : 1;
    float gates[PAD] = {0}, ups[2 * PAD], values[PAD];
    if (has_gates_first(layer)) {
        dot(step, up, expert, step->x, first, count, gates);
        add_bias(layer, up->bias, expert, first, count, gates);
        first += inner;
    }
    dot(step, up, expert, step->x, each * first, each * count, ups);
    add_bias(layer, up->bias, expert, each * first, each * count, ups);
    gate_all(layer, gates, ups, count, values);
    step->packing.pack(values, count, step->inner + number * step->inner_size + ticket * step->packing.bytes);
    pool_done(step->pool->threads, &step->up_left[number]);
}

static void up_columns(const step *step, size_t number, size_t ticket) {
    const moe_layer *layer = step->layer;
    const projection *up = &step->up;
    add_part(step, up, number, ticket, (const float *)step->x);
    if (is_last(&step->up_left[number])) {
        float *sums = whole(up, number);
        add_bias(layer, up->bias, step->experts[number], 0, up->outputs, sums);
        gate_all(layer, sums, sums + (has_gates_first(layer) ? layer->inner : 0), (size_t)layer->inner,
                 (float *)(step->inner + number * step->inner_size));
        pool_done(step->pool->threads, &step->up_left[number]);
    }
}

/* Finished outputs of the down projection become part of the expert's row. */
static void finish(const step *step, size_t number, size_t first, size_t count, float *out) {
    int32_t place = step->places[number];
    float *row = step->rows + (size_t)place * step->down.outputs + first;
    add_bias(step->layer, step->down.bias, step->experts[number], first, count, out);
    for (size_t i = 0; i < count; i++)
        row[i] = rounded(out[i] * step->weights[place], step->row_dtype);
}

static void down_rows(const step *step, size_t number, size_t ticket) {
    size_t first = ticket * PAD, count = smaller(PAD, step->down.outputs - first);
    float out[PAD];
    dot(step, &step->down, step->experts[number], step->inner + number * step->inner_size, first, count, out);
    finish(step, number, first, count, out);
}

static void down_columns(const step *step, size_t number, size_t ticket) {
    add_part(step, &step->down, number, ticket, (const float *)(step->inner + number * step->inner_size));
    if (is_last(&step->down_left[number]))
        finish(step, number, 0, step->down.outputs, whole(&step->down, number));
}

/* The up tickets of all experts come first: when a down ticket is drawn, little or nothing of what it needs is left. */
static void run_ticket(void *job, size_t ticket) {
    const step *step = job;
    bool is_transposed = step->layer->is_transposed;
    size_t ups = step->count * step->up.tickets;
    if (ticket < ups) {
        (is_transposed ? up_columns : up_rows)(step, ticket / step->up.tickets, ticket % step->up.tickets);
    } else {
        size_t number = (ticket - ups) / step->down.tickets;
        pool_wait(step->pool->threads, &step->up_left[number]);
        (is_transposed ? down_columns : down_rows)(step, number, (ticket - ups) % step->down.tickets);
    }
}

/* The next `bytes` of the scratch memory, to a cache line; counts alone while there is none. */
static void *take(char *scratch, size_t *used, size_t bytes) {
    void *taken = scratch == NULL ? NULL : scratch + *used;
    *used += ceil_div(bytes, 64) * 64;
    return taken;
}

/* `pads_of`: the outputs that PAD counts; a gate and its up are in the same ticket. */
static projection make_projection(const kernels *kernels, const moe_layer *layer, int64_t weight, int64_t scales, int64_t bias, size_t inputs,
                                  size_t outputs, size_t pads_of) {
    projection made = {.weight = weight, .scales = scales, .bias = bias, .inputs = inputs, .outputs = outputs};
    made.tickets = ceil_div(pads_of, PAD);
    if (layer->is_transposed) {
        made.chains = layer->dtype == MOE_BF16 && kernels->takes_turns ? TURNS : ceil_div(inputs, CHAIN);
        made.run = padded(ceil_div(outputs, ceil_div(outputs, RUN)));
        made.tickets = made.chains * ceil_div(outputs, made.run);
    }
    return made;
}

/* Lays the step's arrays out in `scratch`, and returns how many bytes they take. */
static size_t lay_out(step *step, char *scratch) {
    size_t used = 0, n = step->count;
    projection *up = &step->up, *down = &step->down;
    step->x = take(scratch, &used, padded(up->inputs) / PAD * step->packing.bytes);
    step->inner = take(scratch, &used, n * step->inner_size);
    step->up_left = take(scratch, &used, n * sizeof(atomic_int));
    step->down_left = take(scratch, &used, n * sizeof(atomic_int));
    up->parts = take(scratch, &used, n * up->chains * up->outputs * sizeof(float));
    down->parts = take(scratch, &used, n * down->chains * down->outputs * sizeof(float));
    return used;
}

static void begin(step *step, const void *hidden) {
    const moe_layer *layer = step->layer;
    size_t size = step->up.inputs;
    int extra = layer->is_transposed ? 1 : 0; /* the adding up */
    for (size_t i = 0; i < size; i += PAD) {
        float values[PAD];
        size_t count = smaller(PAD, size - i);
        for (size_t k = 0; k < count; k++)
            values[k] = load(hidden, i + k, layer->dtype);
        step->packing.pack(values, count, step->x + i / PAD * step->packing.bytes);
    }
    for (size_t number = 0; number < step->count; number++) {
        atomic_init(&step->up_left[number], (int)step->up.tickets + extra);
        atomic_init(&step->down_left[number], (int)step->down.tickets + extra);
    }
}

int moe_experts(moe_pool *pool, const moe_layer *layer, int count, const void *const *experts, const int32_t *places,
                const void *hidden, const float *weights, int row_dtype, float *rows) {
    size_t width = (size_t)layer->hidden, inner = (size_t)layer->inner;
    size_t ups = layer->gate == MOE_NONE ? inner : 2 * inner;
    packing packing = choose_packing(layer, pool->kernels);
    step step = {
        .pool = pool,
        .layer = layer,
        .experts = experts,
        .places = places,
        .weights = weights,
        .row_dtype = row_dtype,
        .rows = rows,
        .count = (size_t)count,
        .up = make_projection(pool->kernels, layer, layer->up, layer->up_scales, layer->up_bias, width, ups, inner),
        .down = make_projection(pool->kernels, layer, layer->down, layer->down_scales, layer->down_bias, inner, width, width),
        .packing = packing,
        .inner_size = padded(inner) / PAD * packing.bytes,
    };
    step.up.block = (size_t)layer->up_block;
    step.down.block = (size_t)layer->down_block;
    step.up.chain = layer->up_chain;
    step.down.chain = layer->down_chain;
    if (!has_chains(pool->kernels, step.up.chain) || !has_chains(pool->kernels, step.down.chain))
        return -2;
    if (!reserve(pool, lay_out(&step, NULL)))
        return -1;
    lay_out(&step, pool->scratch);
    begin(&step, hidden);
    pool_run(pool->threads, run_ticket, &step, step.count * (step.up.tickets + step.down.tickets));
    return 0;
}

void moe_sum(const moe_layer *layer, int count, const int32_t *places, const float *rows, int sum_dtype,
             void *output) {
    size_t size = (size_t)layer->hidden;
    for (size_t first = 0; first < size; first += PAD) {
        size_t width = smaller(PAD, size - first);
        float sums[PAD] = {0};
        for (int k = 0; k < count; k++) {
            const float *row = rows + (size_t)places[k] * size + first;
            for (size_t i = 0; i < width; i++)
                sums[i] = rounded(sums[i] + row[i], sum_dtype);
        }
        for (size_t i = 0; i < width; i++) {
            if (layer->dtype == MOE_BF16)
                ((uint16_t *)output)[first + i] = to_bf16(sums[i]);
            else
                ((float *)output)[first + i] = sums[i];
        }
    }
}
