#include "layer.h"

#include <math.h>

/* The formulas are torch's. */
static float activated(int activation, float x) {
    switch (activation) {
    case MOE_SILU:
        return x / (1 + expf(-x));
    case MOE_GELU:
        return x * 0.5f * (1 + erff(x * 0.70710678f));
    case MOE_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * (x * x * x))));
    default:
        return x < 0 ? 0 : x * x; /* and NaN for NaN */
    }
}

float gated(const moe_layer *layer, float gate, float up) {
    if (layer->gate == MOE_NONE)
        return activated(layer->activation, up);
    if (layer->gate != MOE_PRODUCT) {
        gate = gate > layer->limit ? layer->limit : gate;
        up = between(up, layer->limit);
    }
    if (layer->gate == MOE_SIGMOID)
        return (up + 1) * (gate * (1 / (1 + expf(-(gate * layer->alpha)))));
    return activated(layer->activation, gate) * up;
}

void moe_activate(const moe_layer *layer, const float *projected, float *inner) {
    const float *ups = projected + (has_gates_first(layer) ? layer->inner : 0);
    gate_all(layer, projected, ups, (size_t)layer->inner, inner);
}
