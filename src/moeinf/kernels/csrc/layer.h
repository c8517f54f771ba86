/* What lies between an expert's projections and behind them, for one token and for many. Inline, so that callers which aim at
 * an instruction set have it in that. */
#ifndef LAYER_H
#define LAYER_H

#include "library.h"

static inline bool has_gates_first(const moe_layer *layer) {
    return layer->gate != MOE_NONE && !layer->is_interleaved;
}

/* Rounds `count` outputs of a projection, from `first` on, and adds the bias that lies so far from the expert's start, if
 * it is not -1; torch rounds a product before it adds the bias. */
static inline void add_bias(const moe_layer *layer, int64_t bias, const char *expert, size_t first, size_t count,
                            float *out) {
    if (layer->dtype == MOE_BF16)
        for (size_t i = 0; i < count; i++)
            out[i] = from_bf16(to_bf16(out[i]));
    if (bias >= 0)
        for (size_t i = 0; i < count; i++)
            out[i] = rounded(out[i] + load(expert + bias, first + i, layer->dtype), layer->dtype);
}

/* One value between the projections, in float32. */
float gated(const moe_layer *layer, float gate, float up);

static inline float between(float x, float limit) {
    return x < -limit ? -limit : x > limit ? limit : x;
}

static inline float looked_up(const moe_layer *layer, float value) {
    return from_bf16(layer->values[to_bf16(value)]);
}

/* `count` values from as many ups, their gates between them, or apart from them in `gates`, or nowhere. */
static inline void gate_all(const moe_layer *layer, const float *gates, const float *ups, size_t count, float *out) {
    const float *gate = layer->is_interleaved ? ups : gates;
    size_t step = layer->is_interleaved ? 2 : 1;
    const float *up = layer->is_interleaved ? ups + 1 : ups;
    if (layer->dtype == MOE_F32) {
        for (size_t i = 0; i < count; i++)
            out[i] = gated(layer, gate[step * i], up[step * i]);
        return;
    }
    if (layer->gate == MOE_NONE) {
        for (size_t i = 0; i < count; i++)
            out[i] = looked_up(layer, ups[i]);
        return;
    }
    for (size_t i = 0; i < count; i++)
        out[i] = looked_up(layer, gate[step * i]);
    for (size_t i = 0; i < count; i++) {
        float factor = up[step * i];
        if (layer->gate != MOE_PRODUCT)
            factor = between(factor, layer->limit);
        if (layer->gate == MOE_SIGMOID)
            factor = from_bf16(to_bf16(factor + 1));
        out[i] = from_bf16(to_bf16(out[i] * factor));
    }
}

#endif
