#include "library.h"

void moe_rotate(int count, int64_t size, const void *x, const void *cosines, const void *sines, void *output) {
    const uint16_t *in = x, *cosine = cosines, *sine = sines;
    uint16_t *out = output;
    size_t width = (size_t)size, half = width / 2;
    for (; count > 0; count--, in += width, out += width)
        for (size_t i = 0; i < half; i++) {
            size_t k = half + i;
            float first = from_bf16(in[i]), second = from_bf16(in[k]);
            float turned = rounded(-second * from_bf16(sine[i]), MOE_BF16);
            out[i] = to_bf16(rounded(first * from_bf16(cosine[i]), MOE_BF16) + turned);
            turned = rounded(first * from_bf16(sine[k]), MOE_BF16);
            out[k] = to_bf16(rounded(second * from_bf16(cosine[k]), MOE_BF16) + turned);
        }
}
