/* Weights of 8 and 4 bits times x, in whole numbers (whole_numbers.h), where a 64-bit ARM adds up products of bytes
 * (FEAT_DotProd). Bytes of both sides may have a sign, and weights are taken as they are; those of 4 bits are moved into the
 * upper half of a byte, where they are 16 times as much. */
#include "whole_numbers.h"

#ifdef HAS_DOT_NEON

#include <arm_neon.h>

#ifdef __clang__
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

enum { LANES = 16, TOGETHER = 4 };

/* x for a group of weights: what meets the first vector of them, or the lower halves of bytes, comes first. */
typedef struct {
    int8_t high[GROUP], low[GROUP];
    float factor;
} chunk;
_Static_assert(sizeof(chunk) == NEON_BYTES, "kernels.h tells others how large a chunk is");

/* `per_byte` weights share a byte, 1 or 2, and are multiplied when they are so many times what they stand for. */
static inline void pack(const float *values, size_t count, chunk *chunks, size_t per_byte, float times) {
    memset(chunks, 0, PAD / GROUP * sizeof *chunks);
    for (size_t first = 0; first < count; first += GROUP, chunks++) {
        size_t size = count - first < GROUP ? count - first : GROUP;
        group_scale scale = find_scale(values + first, size);
        for (size_t i = 0; i < size; i++) {
            whole_number x = to_whole(values[first + i], scale);
            size_t to = i % per_byte * LANES + i / per_byte;
            chunks->high[to] = x.high;
            chunks->low[to] = x.low;
        }
        chunks->factor = scale.factor / times;
    }
}

void pack_neon8(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 1, 1);
}

void pack_neon4(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 2, 16);
}

/* Adds a group of weights, which takes so many bytes, to the sums. */
TARGET static inline float32x4_t add_group(const uint8_t *w, const uint16_t *scale, size_t bytes, const chunk *x,
                                           float32x4_t sums) {
    int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(w)), second;
    if (bytes == GROUP) {
        second = vreinterpretq_s8_u8(vld1q_u8(w + LANES));
    } else {
        second = vandq_s8(first, vdupq_n_s8(-16));
        first = vshlq_n_s8(first, 4);
    }
    int32x4_t high = vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(x->high));
    int32x4_t low = vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(x->low));
    high = vdotq_s32(high, second, vld1q_s8(x->high + LANES));
    low = vdotq_s32(low, second, vld1q_s8(x->low + LANES));
    float32x4_t product = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
    float32x4_t factors = vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(scale)));
    return vfmaq_f32(sums, product, vmulq_n_f32(factors, x->factor));
}

/* `together` rows, which share what is read of x. It is a constant, as are `group` and `bytes`, those of GROUP weights. */
TARGET static inline void dot_rows(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t together,
                                   const chunk *x, float *out, size_t bytes) {
    size_t row_bytes = (width * bytes + GROUP - 1) / GROUP, row_scales = (width + group - 1) / group, at = 0;
    float32x4_t sums[TOGETHER];
    for (size_t r = 0; r < together; r++)
        sums[r] = vdupq_n_f32(0);
    for (; (at + 1) * GROUP <= width; at++)
        for (size_t r = 0; r < together; r++)
            sums[r] = add_group(w + r * row_bytes + at * bytes, scales + r * row_scales + at * GROUP / group, bytes, x + at,
                                sums[r]);
    for (size_t r = 0; r < together; r++) {
        if (at * GROUP < width) {
            uint8_t last[GROUP] = {0};
            memcpy(last, w + r * row_bytes + at * bytes, row_bytes - at * bytes);
            sums[r] = add_group(last, scales + (r + 1) * row_scales - 1, bytes, x + at, sums[r]);
        }
        out[r] = vaddvq_f32(sums[r]);
    }
}

TARGET static inline void dot(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                              const chunk *x, float *out, size_t bytes) {
    size_t row_bytes = (width * bytes + GROUP - 1) / GROUP, row_scales = (width + group - 1) / group, r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, TOGETHER, x, out + r, bytes);
    for (; r < rows; r++)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, 1, x, out + r, bytes);
}

TARGET void dot_neon8(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, scales, width, 32, rows, packed, out, GROUP);
    else
        dot(w, scales, width, 64, rows, packed, out, GROUP);
}

TARGET void dot_neon4(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, scales, width, 32, rows, packed, out, GROUP / 2);
    else
        dot(w, scales, width, 64, rows, packed, out, GROUP / 2);
}

#endif
