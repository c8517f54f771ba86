/* The loops that read weights, one set of them per instruction set. */
#ifndef KERNELS_H
#define KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* bfloat16 is the upper half of a float32. Rounds to the nearest, halves to even, as torch does. */
static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* `dot_*`: out[r] = sum of w[r * width + i] x[i] for r < rows, i < width. x is as `pack` makes it.
 * `columns_*`: out[c] = sum of w[i * stride + c] x[i] for c < columns, i < width. x is plain. columns <= COLUMNS.
 * Sums are kept in float32. */
enum { COLUMNS = 256, PAD = 32 };

typedef struct {
    const char *name;
    int lanes; /* float32 in a vector */
    void (*dot_bf16)(const uint16_t *w, size_t width, size_t rows, const float *x, float *out);
    void (*dot_f32)(const float *w, size_t width, size_t rows, const float *x, float *out);
    void (*columns_bf16)(const uint16_t *w, size_t stride, size_t width, size_t columns, const float *x, float *out);
    void (*columns_f32)(const float *w, size_t stride, size_t width, size_t columns, const float *x, float *out);
    uint64_t (*read)(const void *memory, size_t bytes);
} kernels;

/* The set of that number, the portable one being 0; NULL when the processor has no such set. */
const kernels *find_kernels(int number);

#endif
