#include "library.h"

int moe_mlp(moe_pool *pool, const moe_mlp_layer *layer, const void *x, void *output) {
    size_t size = (size_t)layer->gate->outputs;
    uint16_t *gates = layer->inner, *ups = gates + size;
    const moe_linear_layer *projections[] = {layer->gate, layer->up};
    void *projected[] = {gates, ups}, *outputs[] = {output};
    int failed = multiply_one(pool, 2, projections, x, projected);
    if (failed)
        return failed;
    for (size_t i = 0; i < size; i++)
        gates[i] = to_bf16(from_bf16(layer->values[gates[i]]) * from_bf16(ups[i]));
    return multiply_one(pool, 1, &layer->down, gates, outputs);
}
