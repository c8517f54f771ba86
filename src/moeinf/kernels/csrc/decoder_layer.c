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

/* What attention makes of x, in `state`. */
static int attend(moe_pool *pool, const moe_decoder_layer *layer, const void *attended, const void *x) {
    if (attended != NULL && layer->attention != NULL)
        return multiply_one(pool, 1, &layer->attention->output, attended, &(void *){layer->state});
    if (attended != NULL) {
        memcpy(layer->state, attended, (size_t)layer->norm->size * sizeof(uint16_t));
        return 0;
    }
    int failed = moe_norm(pool, layer->norm, 1, x, layer->normed);
    return failed ? failed
                  : moe_self_attend(pool, layer->attention, layer->what, layer->normed, layer->cosines, layer->sines,
                                    layer->between, layer->state);
}

/* Everything before experts and MLP, the choice included where it is made here. */
static int begin(moe_pool *pool, const moe_decoder_layer *layer, const void *attended, const void *x) {
    int failed = attend(pool, layer, attended, x);
    if (failed)
        return failed;
    add((size_t)layer->norm->size, x, layer->scale, layer->state, layer->state);
    failed = moe_norm(pool, layer->second_norm, 1, layer->state, layer->normed);
    if (failed || layer->experts == NULL)
        return failed;
    if (layer->gate == NULL)
        return MOE_UNDECIDED;
    failed = moe_linear(pool, layer->gate, 1, layer->normed, layer->logits);
    if (failed)
        return failed;
    failed = moe_route(layer->router, layer->logits, layer->scores, layer->chosen, layer->weights);
    return failed ? failed : layer->asks_share ? MOE_UNDECIDED : 0;
}

/* What the chosen experts, whose `places` are in ascending order, make of the normed state, in its place. */
static int add_experts(moe_pool *pool, const moe_decoder_layer *layer, const void *const *experts, const int32_t *places) {
    int failed = moe_experts(pool, layer->experts, layer->top_k, experts, places, layer->normed, layer->weights,
                             layer->row_dtype, layer->rows);
    if (!failed)
        moe_sum(layer->experts, layer->top_k, places, layer->rows, layer->sum_dtype, layer->normed);
    return failed;
}

static void add_mlp(const moe_decoder_layer *layer) {
    uint16_t *sum = layer->normed, *added = layer->added;
    for (size_t i = 0; i < (size_t)layer->norm->size; i++)
        sum[i] = to_bf16(from_bf16(sum[i]) + from_bf16(to_bf16(from_bf16(added[i]) * layer->share)));
}

int moe_finish(moe_pool *pool, const moe_decoder_layer *layer, void *x) {
    const void *experts[MOST_CHOSEN];
    int32_t places[MOST_CHOSEN];
    int count = layer->experts == NULL ? 0 : layer->top_k, failed = 0;
    sort_places(layer->chosen, count, places);
    for (int i = 0; i < count; i++) {
        int32_t slot = layer->slots[layer->chosen[places[i]]];
        if (slot < 0)
            return MOE_AWAY;
        experts[i] = (const char *)layer->memory + slot * layer->slot_bytes;
    }
    if (layer->mlp != NULL)
        failed = moe_mlp(pool, layer->mlp, layer->normed, count > 0 ? layer->added : layer->normed);
    if (!failed && count > 0)
        failed = add_experts(pool, layer, experts, places);
    if (failed)
        return failed;
    if (layer->mlp != NULL && count > 0)
        add_mlp(layer);
    add((size_t)layer->norm->size, layer->state, layer->scale, layer->normed, x);
    return 0;
}

int moe_decode(moe_pool *pool, const moe_decoder_layer *const *layers, int count, int tells, const void *attended,
               void *x, int32_t *done) {
    int found = 0;
    for (*done = 0; found == 0 && *done < count; *done += found == 0, attended = NULL) {
        const moe_decoder_layer *layer = layers[*done];
        if (attended == NULL && (layer->attention == NULL || layer->asks_attended))
            return MOE_UNATTENDED;
        found = begin(pool, layer, attended, x);
        if (found == 0)
            found = tells && layer->experts != NULL ? MOE_AWAY : moe_finish(pool, layer, x);
    }
    return found;
}
