/* Softmax as torch computes it on processors with AVX2 and more, to the last bit. */
#include "library.h"

#include <math.h>

enum { MOST_LANES = 16, MOST_SOFTENED = 1024 };

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
        int32_t power = (int32_t)(q > -200 ? q : -200), half = power >> 1; /* in two steps: 2^power may be no normal number */
        uint32_t bits[2] = {(uint32_t)(half + 127) << 23, (uint32_t)(power - half + 127) << 23};
        float scales[2];
        memcpy(scales, bits, sizeof scales);
        x[i] = x[i] < -104 ? 0 : y * scales[0] * scales[1];
    }
}

static float halve(float *sums, size_t lanes) {
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
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
    return halve(sums, lanes);
}

void softmax(float *x, size_t count, size_t lanes) {
    float most = x[0];
    for (size_t i = 1; i < count; i++)
        most = x[i] > most ? x[i] : most;
    for (size_t i = 0; i < count; i++)
        x[i] -= most;
    exponentials(x, count);
    float share = 1 / sum_lanes(x, count, lanes);
    for (size_t i = 0; i < count; i++)
        x[i] *= share;
}

static void hide(float *x, size_t begin, size_t end, float value) {
    for (size_t i = begin; i < end; i++)
        x[i] = value;
}

/* What fills no vector has the C library's exponential here, and is added in turn. */
void softmax_bf16(float *x, size_t count, size_t lanes, size_t begin, size_t end) {
    size_t whole = count / lanes * lanes, last = count - 1;
    size_t from = begin / lanes * lanes, to = smaller(whole, ceil_div(end, lanes) * lanes);
    float sink = x[last], most = sink, sums[MOST_LANES] = {0};
    for (size_t i = begin; i < end; i++)
        most = x[i] > most ? x[i] : most;
    hide(x, 0, begin, -INFINITY);
    hide(x, end, last, -INFINITY);
    if (last < whole) { /* its vector may have nothing else */
        sink -= most;
        exponentials(&sink, 1);
    } else
        sink = expf(sink - most);
    x[last] = -INFINITY;
    for (size_t i = from; i < to; i++)
        x[i] -= most;
    if (from < to)
        exponentials(x + from, to - from);
    hide(x, 0, smaller(from, whole), 0);
    hide(x, larger(from, to), whole, 0);
    for (size_t i = whole; i < count; i++)
        x[i] = expf(x[i] - most);
    x[last] = sink;
    for (size_t i = from; i < to; i++)
        sums[i % lanes] += x[i];
    if (last < whole && last >= to)
        sums[last % lanes] += x[last];
    float sum = halve(sums, lanes);
    for (size_t i = whole; i < count; i++)
        sum += x[i];
    float share = 1 / sum;
    for (size_t i = begin; i < end; i++)
        x[i] = rounded(x[i] * share, MOE_BF16);
    x[last] = rounded(x[last] * share, MOE_BF16);
}

int moe_soften(int dtype, int64_t rows, int64_t count, int32_t lanes, void *x) {
    if (dtype == MOE_F32) {
        for (int64_t i = 0; i < rows; i++)
            softmax((float *)x + i * count, (size_t)count, (size_t)lanes);
        return 0;
    }
    if (count > MOST_SOFTENED)
        return -2;
    for (uint16_t *row = x; rows > 0; rows--, row += count) {
        float values[MOST_SOFTENED];
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bf16(row[i]);
        softmax_bf16(values, (size_t)count, (size_t)lanes, 0, (size_t)count - 1);
        for (int64_t i = 0; i < count; i++)
            row[i] = to_bf16(values[i]);
    }
    return 0;
}
