#include "library.h"

/* One x, which all parts are multiplied with. A ticket is PAD outputs of a part. */
typedef struct {
    const kernels *kernels;
    const void *x; /* packed */
    size_t ends[MOST_TOGETHER]; /* of the parts' tickets */
    const moe_linear_layer *const *layers;
    void *const *outputs;
} product;

static void run_ticket(void *job, size_t ticket) {
    const product *product = job;
    size_t part = 0;
    while (ticket >= product->ends[part])
        part++;
    const moe_linear_layer *layer = product->layers[part];
    size_t inputs = (size_t)layer->inputs, first = (ticket - (part > 0 ? product->ends[part - 1] : 0)) * PAD;
    size_t count = smaller(PAD, (size_t)layer->outputs - first);
    const uint16_t *w = (const uint16_t *)layer->weight + first * inputs, *bias = layer->bias;
    uint16_t *output = (uint16_t *)product->outputs[part] + first;
    float sums[PAD];
    if (layer->order.chain != 0) {
        int kind = layer->uppers == NULL ? MOE_PLAIN : MOE_LOSSLESS;
        const matrix whole = {kind, layer->weight, layer->uppers, (size_t)layer->outputs, inputs, 0};
        product->kernels->dot_chains(&whole, first, count, layer->order.chain, product->x, sums);
    } else if (layer->uppers != NULL) {
        lossless packed = make_lossless(layer->weight, layer->uppers, (size_t)layer->outputs, inputs);
        product->kernels->dot_lossless(&packed, inputs, first, count, product->x, sums);
    } else
        product->kernels->dot_bf16(w, inputs, count, product->x, sums);
    for (size_t i = 0; i < count; i++)
        output[i] = to_bf16(bias == NULL ? sums[i] : sums[i] + from_bf16(bias[first + i]));
}

int multiply_one(moe_pool *pool, size_t count, const moe_linear_layer *const *layers, const void *x,
                 void *const *outputs) {
    const kernels *kernels = pool->kernels;
    size_t inputs = (size_t)layers[0]->inputs, packed = kernels->pairs.bytes, tickets = 0;
    for (size_t i = 0; i < count; i++)
        if (!has_chains(kernels, layers[i]->order.chain))
            return -2;
    if (!reserve(pool, padded(inputs) / PAD * packed))
        return -1;
    for (size_t i = 0; i < inputs; i += PAD) {
        float values[PAD];
        size_t left = smaller(PAD, inputs - i);
        for (size_t k = 0; k < left; k++)
            values[k] = from_bf16(((const uint16_t *)x)[i + k]);
        kernels->pairs.pack(values, left, (char *)pool->scratch + i / PAD * packed);
    }
    product product = {.kernels = kernels, .x = pool->scratch, .layers = layers, .outputs = outputs};
    for (size_t part = 0; part < count; part++)
        product.ends[part] = tickets += ceil_div((size_t)layers[part]->outputs, PAD);
    pool_run(pool->threads, run_ticket, &product, tickets);
    return 0;
}
