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
    uint16_t half = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return value == value ? half : 0x7fc0;
}

/* Kernels read x up to a multiple of PAD, where it is 0. */
enum { PAD = 32, AT_ONCE = 16 };

static inline size_t padded(size_t size) {
    return (size + PAD - 1) / PAD * PAD;
}

/* `dot_*`: out[r] = sum of w[r * width + i] x[i] for r < rows, i < width. dot_bf16 takes x as pack_bf16 makes it, `count`
 * values at a time, a multiple of PAD but for the last ones, x_bytes for each value.
 * `columns_*`: out[c] = sum of w[r * stride + c] x[r] for r < rows, c < columns.
 * Sums are kept in float32, and their order depends on nothing but the sizes. */
typedef struct {
    const char *name;
    size_t x_bytes;
    void (*pack_bf16)(const float *values, size_t count, void *packed);
    void (*dot_bf16)(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out);
    void (*dot_f32)(const float *w, size_t width, size_t rows, const float *x, float *out);
    void (*columns_bf16)(const uint16_t *w, size_t stride, size_t columns, size_t rows, const float *x, float *out);
    void (*columns_f32)(const float *w, size_t stride, size_t columns, size_t rows, const float *x, float *out);
    uint64_t (*read)(const void *memory, size_t bytes);
} kernels;

/* As above, where the processor multiplies pairs of bfloat16 (dot_pairs.c). */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_DOT_PAIRS
void pack_pairs(const float *values, size_t count, void *packed);
void dot_pairs(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out);
#endif

/* Sums of products are cut into chains of so many, as torch does it (dot_pairs.c). */
enum { CHAIN = 512 };

/* The set of that number, the portable one being 0; NULL when the processor has no such set. */
const kernels *find_kernels(int number);

#endif
