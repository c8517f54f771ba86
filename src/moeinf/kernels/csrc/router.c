/* A router's choice, with torch's results to the last bit. */
#include "library.h"

#include <math.h>

enum { MOST_LANES = 16 };

/* exp as torch's vectors compute it: SLEEF's (Shibata and Petrogalli, 2020), good to 1 unit in the last place. e^x is 2^q e^s
 * for a small s, whose series has coefficients that were fitted. */
AVX2_TARGET static void exponentials(float *x, size_t count) {
    for (size_t i = 0; i < count; i++) {
        float q = rintf(x[i] * 0x1.715476p+0f);
        float s = fmaf(q, -1.428606765330187045e-06f, fmaf(q, -0.693145751953125f, x[i]));
        float y = fmaf(0.000198527617612853646278381f, s, 0.00139304355252534151077271f);
        y = fmaf(y, s, 0.00833336077630519866943359f);
        y = fmaf(y, s, 0.0416664853692054748535156f);
        y = fmaf(y, s, 0.166666671633720397949219f);
        y = fmaf(y, s, 0.5f);
        y = 1 + fmaf(s * s, y, s);
        int32_t power = (int32_t)(q < -200 ? -200 : q), half = power >> 1; /* in two steps: 2^power may be no normal number */
        uint32_t bits[2] = {(uint32_t)(half + 127) << 23, (uint32_t)(power - half + 127) << 23};
        float scales[2];
        memcpy(scales, bits, sizeof scales);
        x[i] = x[i] < -104 ? 0 : y * scales[0] * scales[1];
    }
}

/* torch adds up vectors of `lanes` numbers, and halves what comes out until one is left; numbers that fill no vector in turn. */
static float sum_lanes(const float *x, size_t count, size_t lanes) {
    float sums[MOST_LANES] = {0};
    if (count < lanes) {
        for (size_t i = 0; i < count; i++)
            sums[0] += x[i];
        return sums[0];
    }
    for (size_t i = 0; i < count; i++)
        sums[i % lanes] += x[i];
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
}

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

static void softmax(float *x, size_t count, size_t lanes) {
    float most = x[largest(x, count)];
    for (size_t i = 0; i < count; i++)
        x[i] -= most;
    exponentials(x, count);
    float share = 1 / sum_lanes(x, count, lanes);
    for (size_t i = 0; i < count; i++)
        x[i] *= share;
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
