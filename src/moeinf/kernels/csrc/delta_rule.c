#include "library.h"

/* torch computes the gated delta rule step by step, each of which reads and writes the whole state. Here a head's is read twice
 * and written twice, the second time in the processor's caches. Sums over keys are sums of rows (row_sum.h). Products are rounded
 * before they are added, so nothing here may be made one rounding of two. */
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "row_sum.h"

#include <math.h>

typedef struct {
    const moe_delta_rule_layer *layer;
    const uint16_t *query, *key, *value, *beta;
    const float *decay, *state;
    float *next;
    uint16_t *output;
    float *scratch; /* per head */
    size_t numbers; /* of it */
} delta_rule;

/* x / sqrt(sum(x²) + epsilon) */
static void normalise(const moe_delta_rule_layer *layer, const uint16_t *x, float *normed, float *squares) {
    size_t size = (size_t)layer->keys;
    for (size_t i = 0; i < size; i++) {
        normed[i] = from_bf16(x[i]);
        squares[i] = normed[i] * normed[i];
    }
    float scale = 1 / sqrtf(sum_like_torch(squares, size) + layer->epsilon);
    for (size_t i = 0; i < size; i++)
        normed[i] *= scale;
}

/* next = state · decay, and what a key finds in it, weighed. */
static void forget(const float *restrict state, float decay, float key, size_t values, float *restrict next, float *restrict sums) {
    for (size_t v = 0; v < values; v++) {
        float value = state[v] * decay;
        next[v] = value;
        sums[v] += value * key;
    }
}

/* next + key · delta, and what a query finds in it, weighed. */
static void correct(const float *restrict delta, float key, float query, size_t values, float *restrict next, float *restrict sums) {
    for (size_t v = 0; v < values; v++) {
        float value = next[v] + key * delta[v];
        next[v] = value;
        sums[v] += value * query;
    }
}

static void run_ticket(void *job, size_t head) {
    const delta_rule *rule = job;
    const moe_delta_rule_layer *layer = rule->layer;
    size_t keys = (size_t)layer->keys, values = (size_t)layer->values;
    size_t shared = head / (size_t)(layer->heads / layer->key_heads);
    float *query = rule->scratch + head * rule->numbers, *key = query + padded(keys), *squares = key + padded(keys);
    float *delta = squares + padded(keys), *levels = delta + padded(values);
    const float *state = rule->state + head * keys * values;
    float *next = rule->next + head * keys * values;
    normalise(layer, rule->query + shared * keys, query, squares);
    normalise(layer, rule->key + shared * keys, key, squares);
    for (size_t k = 0; k < keys; k++)
        query[k] /= layer->root;

    row_sum sum = begin_rows(levels, keys, values);
    for (size_t k = 0; k < keys; k++) {
        forget(state + k * values, rule->decay[head], key[k], values, next + k * values, levels);
        end_row(&sum);
    }
    const float *found = end_rows(&sum);
    for (size_t v = 0; v < values; v++)
        delta[v] = (from_bf16(rule->value[head * values + v]) - found[v]) * from_bf16(rule->beta[head]);

    sum = begin_rows(levels, keys, values);
    for (size_t k = 0; k < keys; k++) {
        correct(delta, key[k], query[k], values, next + k * values, levels);
        end_row(&sum);
    }
    found = end_rows(&sum);
    for (size_t v = 0; v < values; v++)
        rule->output[head * values + v] = to_bf16(found[v]);
}

int moe_delta_rule(moe_pool *pool, const moe_delta_rule_layer *layer, const void *query, const void *key, const void *value,
                   const float *decay, const void *beta, const float *state, float *next, void *output) {
    size_t keys = (size_t)layer->keys, values = (size_t)layer->values, heads = (size_t)layer->heads;
    size_t numbers = 3 * padded(keys) + padded(values) + padded(LEVELS * values);
    if (!reserve(pool, heads * numbers * sizeof(float)))
        return -1;
    delta_rule rule = {layer, query, key, value, beta, decay, state, next, output, pool->scratch, numbers};
    pool_run(pool->threads, run_ticket, &rule, heads);
    return 0;
}
