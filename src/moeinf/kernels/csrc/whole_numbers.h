/* What dot_vnni.c and dot_neon.c share: x as whole numbers of 16 bits with a factor for each GROUP of them, finer than the
 * bfloat16 that it comes from. Each is cut into 256 high + low, so that two products of bytes take the place of one of 16
 * bits. */
#ifndef WHOLE_NUMBERS_H
#define WHOLE_NUMBERS_H

#include "kernels.h"

#include <math.h>

enum { GROUP = 32, LARGEST = 127 * 256 };

/* What makes whole numbers of a group, and what they are times: NaN if any value is not finite. */
typedef struct {
    float inverse, factor;
} group_scale;

static inline group_scale find_scale(const float *values, size_t count) {
    float largest = 0, odd = 0; /* odd: 0, or NaN if any value is not finite */
    for (size_t i = 0; i < count; i++) {
        float size = fabsf(values[i]);
        largest = size > largest ? size : largest;
        odd += 0 * values[i];
    }
    return (group_scale){largest > 0 && odd == 0 ? LARGEST / largest : 0, largest / LARGEST + odd};
}

typedef struct {
    int32_t whole;
    int8_t high, low;
} whole_number;

static inline whole_number to_whole(float value, group_scale scale) {
    int32_t whole = (int32_t)lrintf(value * scale.inverse), high = (whole + 128) >> 8;
    return (whole_number){whole, (int8_t)high, (int8_t)(whole - 256 * high)};
}

#endif
