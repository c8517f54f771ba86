/* A router's choice, with torch's results to the last bit. */
#include "library.h"

#include <math.h>

static bool is_finite(const float *x, size_t count) {
    float sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += x[i] * 0; /* NaN for what is not finite */
    return sum == 0;
}

static size_t largest(const float *x, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

int moe_route(const moe_router *router, const void *logits, float *scores, int64_t *chosen, float *weights) {
    size_t count = (size_t)router->count, k = (size_t)router->top_k, lanes = (size_t)router->lanes;
    for (size_t i = 0; i < count; i++)
        scores[i] = from_bf16(((const uint16_t *)logits)[i]);
    if (!is_finite(scores, count))
        return MOE_TIED;
    if (router->shares != MOE_OF_CHOSEN)
        softmax(scores, count, lanes);
    for (size_t i = 0; i < k; i++) {
        size_t best = largest(scores, count);
        chosen[i] = (int64_t)best;
        weights[i] = scores[best];
        scores[best] = -INFINITY;
    }
    if (scores[largest(scores, count)] == weights[k - 1])
        return MOE_TIED;
    if (router->shares == MOE_OF_CHOSEN)
        softmax(weights, k, lanes);
    float total = router->shares == MOE_NORMALISED ? sum_like_torch(weights, k) : 1;
    for (size_t i = 0; i < k; i++)
        weights[i] = rounded(weights[i] / total, router->dtype);
    return 0;
}
