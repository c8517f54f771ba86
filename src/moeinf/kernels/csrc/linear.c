#include "library.h"

/* One x. A ticket is PAD outputs. */
typedef struct {
    const kernels *kernels;
    const moe_linear_layer *layer;
    const void *x; /* packed */
    void *output;
} product;

static void run_ticket(void *job, size_t ticket) {
    const product *product = job;
    const moe_linear_layer *layer = product->layer;
    size_t inputs = (size_t)layer->inputs, first = ticket * PAD;
    size_t count = smaller(PAD, (size_t)layer->outputs - first);
    const uint16_t *w = (const uint16_t *)layer->weight + first * inputs, *bias = layer->bias;
    uint16_t *output = (uint16_t *)product->output + first;
    float sums[PAD];
    if (layer->uppers != NULL) {
        lossless packed = make_lossless(layer->weight, layer->uppers, (size_t)layer->outputs, inputs);
        product->kernels->dot_lossless(&packed, inputs, first, count, product->x, sums);
    } else
        product->kernels->dot_bf16(w, inputs, count, product->x, sums);
    for (size_t i = 0; i < count; i++)
        output[i] = to_bf16(bias == NULL ? sums[i] : sums[i] + from_bf16(bias[first + i]));
}

int multiply_one(moe_pool *pool, const moe_linear_layer *layer, const void *x, void *output) {
    const kernels *kernels = pool->kernels;
    size_t inputs = (size_t)layer->inputs, packed = kernels->pairs.bytes;
    if (!reserve(pool, padded(inputs) / PAD * packed))
        return -1;
    for (size_t i = 0; i < inputs; i += PAD) {
        float values[PAD];
        size_t count = smaller(PAD, inputs - i);
        for (size_t k = 0; k < count; k++)
            values[k] = from_bf16(((const uint16_t *)x)[i + k]);
        kernels->pairs.pack(values, count, (char *)pool->scratch + i / PAD * packed);
    }
    product product = {kernels, layer, pool->scratch, output};
    pool_run(pool->threads, run_ticket, &product, ceil_div((size_t)layer->outputs, PAD));
    return 0;
}
