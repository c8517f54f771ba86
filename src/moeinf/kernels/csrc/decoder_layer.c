#include "library.h"

enum { MOST_CHOSEN = 64 };

/* Rounded like two operations of torch's. */
static void add(size_t width, const uint16_t *state, float scale, const uint16_t *added, uint16_t *sum) {
    for (size_t i = 0; i < width; i++)
        sum[i] = to_bf16(from_bf16(state[i]) + from_bf16(to_bf16(from_bf16(added[i]) * scale)));
}

/* The places of what was chosen, in ascending order of expert. */
static void sort_places(const int64_t *chosen, int count, int32_t *places) {
    for (int32_t i = 0; i < count; i++) {
        int32_t at = i;
        for (; at > 0 && chosen[places[at - 1]] > chosen[i]; at--)
            places[at] = places[at - 1];
        places[at] = i;
    }
}

static int attend(moe_pool *pool, const moe_decoder_layer *layer, const void *attended, const void *x) {
    if (attended != NULL)
        return multiply_one(pool, 1, &layer->attention->output, attended, &(void *){layer->state});
    int failed = moe_norm(pool, layer->norm, 1, x, layer->normed);
    return failed ? failed
                  : moe_self_attend(pool, layer->attention, layer->what, layer->normed, layer->cosines, layer->sines,
                                    layer->between, layer->state);
}

static int decode(moe_pool *pool, const moe_decoder_layer *layer, const void *attended, void *x) {
    size_t width = (size_t)layer->experts->hidden;
    int count = layer->router->top_k;
    const void *experts[MOST_CHOSEN];
    int32_t places[MOST_CHOSEN];
    int failed = attend(pool, layer, attended, x);
    if (failed)
        return failed;
    add(width, x, layer->scale, layer->state, layer->state);
    if ((failed = moe_norm(pool, layer->second_norm, 1, layer->state, layer->normed)) ||
        (failed = moe_linear(pool, layer->gate, 1, layer->normed, layer->logits)) ||
        (failed = moe_route(layer->router, layer->logits, layer->scores, layer->chosen, layer->weights)))
        return failed;
    sort_places(layer->chosen, count, places);
    for (int i = 0; i < count; i++) {
        int32_t slot = layer->slots[layer->chosen[places[i]]];
        if (slot < 0)
            return MOE_AWAY;
        experts[i] = (const char *)layer->memory + slot * layer->slot_bytes;
    }
    failed = moe_experts(pool, layer->experts, count, experts, places, layer->normed, layer->weights, layer->row_dtype,
                         layer->rows);
    if (failed)
        return failed;
    moe_sum(layer->experts, count, places, layer->rows, layer->sum_dtype, layer->normed);
    add(width, layer->state, layer->scale, layer->normed, x);
    return 0;
}

int moe_decode(moe_pool *pool, const moe_decoder_layer *const *layers, int count, const void *attended, void *x,
               int32_t *done) {
    int found = 0;
    for (*done = 0; *done < count; ++*done)
        if ((found = decode(pool, layers[*done], attended, x)))
            break;
    return found;
}
