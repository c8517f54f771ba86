/* Weights of 8 and 4 bits times x, in whole numbers (whole_numbers.h), where a 64-bit ARM adds up products of bytes
 * (FEAT_DotProd). Bytes of both sides may have a sign, and weights are taken as they are; those of 4 bits are looked up. */
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

/* `per_byte` weights share a byte, 1 or 2. */
static inline void pack(const float *values, size_t count, chunk *chunks, size_t per_byte) {
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
        chunks->factor = scale.factor;
    }
}

void pack_neon8(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 1);
}

void pack_neon4(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 2);
}

/* The factors of GROUP weights, without the unit of those of 4 bits: these have one for each half of them. */
TARGET static inline float32x4_t load_factors(const uint8_t *scales, size_t bytes) {
    uint16_t two;
    memcpy(&two, scales, sizeof two);
    if (bytes == GROUP)
        return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(two)));
    int8x8_t both = vreinterpret_s8_u16(vdup_n_u16(two));
    int16x8_t wide = vmovl_s8(vzip1_s8(both, both));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

/* Adds GROUP weights, which take so many bytes, to the sums. */
TARGET static inline float32x4_t add_group(const uint8_t *w, const uint8_t *scales, size_t bytes, const chunk *x,
                                           float32x4_t sums) {
    int8x16_t first, second;
    if (bytes == GROUP) {
        first = vreinterpretq_s8_u8(vld1q_u8(w));
        second = vreinterpretq_s8_u8(vld1q_u8(w + LANES));
    } else {
        int8x16_t numbers = vld1q_s8(INT4_BYTES);
        first = vqtbl1q_s8(numbers, vandq_u8(vld1q_u8(w), vdupq_n_u8(15)));
        second = vqtbl1q_s8(numbers, vshrq_n_u8(vld1q_u8(w), 4));
    }
    int32x4_t high = vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(x->high));
    int32x4_t low = vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(x->low));
    high = vdotq_s32(high, second, vld1q_s8(x->high + LANES));
    low = vdotq_s32(low, second, vld1q_s8(x->low + LANES));
    float32x4_t product = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
    return vfmaq_f32(sums, product, vmulq_n_f32(load_factors(scales, bytes), x->factor));
}

/* Bytes of a row's scales. */
static inline size_t scale_bytes_of(size_t width, size_t group, size_t bytes) {
    return bytes == GROUP ? (width + group - 1) / group * sizeof(uint16_t) : int4_factor_bytes(width);
}

/* `together` rows, which share what is read of x. It is a constant, as are `group` and `bytes`, those of GROUP weights. */
TARGET static inline void dot_rows(const uint8_t *w, const uint8_t *scales, size_t width, size_t group, size_t together,
                                   const chunk *x, float *out, size_t bytes) {
    const size_t begin = bytes == GROUP ? 0 : UNIT_BYTES, each = bytes == GROUP ? sizeof(uint16_t) : sizeof(int8_t);
    size_t row_bytes = (width * bytes + GROUP - 1) / GROUP, row_scales = scale_bytes_of(width, group, bytes), at = 0;
    float32x4_t sums[TOGETHER];
    for (size_t r = 0; r < together; r++)
        sums[r] = vdupq_n_f32(0);
    for (; (at + 1) * GROUP <= width; at++)
        for (size_t r = 0; r < together; r++)
            sums[r] = add_group(w + r * row_bytes + at * bytes, scales + r * row_scales + begin + at * GROUP / group * each,
                                bytes, x + at, sums[r]);
    for (size_t r = 0; r < together; r++) {
        const uint8_t *mine = scales + r * row_scales;
        if (at * GROUP < width) {
            uint8_t last[GROUP] = {0}, last_scales[2] = {0};
            size_t done = begin + at * GROUP / group * each;
            memcpy(last, w + r * row_bytes + at * bytes, row_bytes - at * bytes);
            memcpy(last_scales, mine + done, row_scales - done);
            sums[r] = add_group(last, last_scales, bytes, x + at, sums[r]);
        }
        out[r] = vaddvq_f32(sums[r]) * (bytes == GROUP ? 1 : unit_of(mine));
    }
}

TARGET static inline void dot(const uint8_t *w, const uint8_t *scales, size_t width, size_t group, size_t rows,
                              const chunk *x, float *out, size_t bytes) {
    size_t row_bytes = (width * bytes + GROUP - 1) / GROUP, row_scales = scale_bytes_of(width, group, bytes), r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, TOGETHER, x, out + r, bytes);
    for (; r < rows; r++)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, 1, x, out + r, bytes);
}

TARGET void dot_neon8(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, (const uint8_t *)scales, width, 32, rows, packed, out, GROUP);
    else
        dot(w, (const uint8_t *)scales, width, 64, rows, packed, out, GROUP);
}

TARGET void dot_neon4(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    dot(w, scales, width, INT4_GROUP, rows, packed, out, GROUP / 2);
}

#endif
