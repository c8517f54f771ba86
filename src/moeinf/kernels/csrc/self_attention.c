#include "library.h"

/* The norm of all heads of x, in place. */
static int normalise(moe_pool *pool, const moe_norm_layer *norm, int64_t numbers, void *x) {
    return norm == NULL ? 0 : moe_norm(pool, norm, (int)(numbers / norm->size), x, x);
}

int moe_self_attend(moe_pool *pool, const moe_self_attention *layer, const moe_attention *what, const void *x,
                    const void *cosines, const void *sines, void *between, void *output) {
    int64_t queries = what->heads * what->size, keys = what->kv_heads * what->size;
    size_t size = (size_t)what->size, last = (size_t)what->tokens - 1;
    uint16_t *query = between, *attended = query + queries, *key = attended + queries, *value = key + keys;
    const moe_linear_layer *projections[] = {layer->query, layer->key, layer->value};
    void *projected[] = {query, key, value};
    if (multiply_one(pool, 3, projections, x, projected) || normalise(pool, layer->query_norm, queries, query) ||
        normalise(pool, layer->key_norm, keys, key))
        return -1;
    for (int64_t h = 0; h < what->heads; h++)
        moe_rotate(1, layer->turned, query + (size_t)h * size, cosines, sines, query + (size_t)h * size);
    for (size_t h = 0; h < (size_t)what->kv_heads; h++) {
        moe_rotate(1, layer->turned, key + h * size, cosines, sines, key + h * size);
        memcpy((uint16_t *)what->keys + h * (size_t)what->key_head + last * (size_t)what->key_token, key + h * size,
               size * sizeof *key);
        memcpy((uint16_t *)what->values + h * (size_t)what->value_head + last * (size_t)what->value_token,
               value + h * size, size * sizeof *value);
    }
    if (output == NULL)
        return 0;
    moe_attention attention = *what;
    attention.query = query;
    int failed = moe_attend(pool, &attention, attended);
    if (failed)
        return failed;
    void *outputs[] = {output};
    return multiply_one(pool, 1, &layer->output, attended, outputs);
}
