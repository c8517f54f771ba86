/* Weights of 8 and 4 bits times x, in whole numbers (whole_numbers.h), where the processor multiplies and adds bytes
 * (AVX-512 VNNI). The instruction wants one side without a sign: to weights half their range is added, and what that adds to
 * the sum is taken off beforehand. Those of 4 bits are looked up so. */
#include "whole_numbers.h"

#ifdef HAS_DOT_PAIRS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,f16c")))

enum {
    LANES = 16,
    VECTOR_BYTES = 64,
    TOGETHER = 2,
    HALF = 128,
    AHEAD_BYTES = 4096, /* fetched so far ahead: the processor does not guess it while x takes more reads than weights do */
};

/* x for one vector of weights: of each word's weights the even ones are in [0] and the odd ones in [1] when two weights share a
 * byte, else all are in [0]. */
typedef struct {
    int8_t high[2][4 * LANES], low[2][4 * LANES];
    int32_t begin[LANES];
    float factors[LANES];
} chunk;
_Static_assert(sizeof(chunk) == VNNI_BYTES, "kernels.h tells others how large a chunk is");

/* `per` weights to a word, 4 or 8. */
static inline void pack(const float *values, size_t count, chunk *chunks, size_t per) {
    memset(chunks, 0, PAD / (per * LANES) * sizeof *chunks);
    for (size_t first = 0; first < count; first += GROUP) {
        size_t end = first + GROUP < count ? first + GROUP : count;
        group_scale scale = find_scale(values + first, end - first);
        for (size_t i = first; i < end; i++) {
            chunk *to = chunks + i / (per * LANES);
            whole_number x = to_whole(values[i], scale);
            size_t lane = i / per % LANES, k = i % per;
            size_t side = per == 8 ? k % 2 : 0, byte = 4 * lane + (per == 8 ? k / 2 : k);
            to->high[side][byte] = x.high;
            to->low[side][byte] = x.low;
            to->begin[lane] -= HALF * x.whole;
            to->factors[lane] = scale.factor;
        }
    }
}

void pack_vnni8(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 4);
}

void pack_vnni4(const float *values, size_t count, void *packed) {
    pack(values, count, packed, 8);
}

/* The factors of one vector of weights, without the unit of those of 4 bits. */
TARGET static inline __m512 load_factors(const uint8_t *scales, size_t group, size_t per) {
    if (per == 8) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)scales);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpacklo_epi8(bytes, bytes)));
    }
    uint16_t halves[2];
    memcpy(halves, scales, group == 32 ? 4 : 2);
    __m512 low = _mm512_set1_ps(_cvtsh_ss(halves[0]));
    return group == 32 ? _mm512_mask_broadcastss_ps(low, 0xff00, _mm_set_ss(_cvtsh_ss(halves[1]))) : low;
}

/* Adds one vector of weights to the sums. */
TARGET static inline __m512 add_chunk(__m512i w, const uint8_t *scales, size_t group, const chunk *x, size_t per,
                                      __m512 sums) {
    __m512i high = _mm512_setzero_si512(), low = _mm512_loadu_si512(x->begin);
    if (per == 4) {
        w = _mm512_xor_si512(w, _mm512_set1_epi8((char)HALF));
        high = _mm512_dpbusd_epi32(high, w, _mm512_loadu_si512(x->high[0]));
        low = _mm512_dpbusd_epi32(low, w, _mm512_loadu_si512(x->low[0]));
    } else {
        const __m512i nibble = _mm512_set1_epi8(0x0f);
        const __m512i numbers = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)INT4_BYTES)),
                                                 _mm512_set1_epi8((char)HALF));
        __m512i even = _mm512_shuffle_epi8(numbers, _mm512_and_si512(w, nibble));
        __m512i odd = _mm512_shuffle_epi8(numbers, _mm512_and_si512(_mm512_srli_epi32(w, 4), nibble));
        high = _mm512_dpbusd_epi32(high, even, _mm512_loadu_si512(x->high[0]));
        low = _mm512_dpbusd_epi32(low, even, _mm512_loadu_si512(x->low[0]));
        high = _mm512_dpbusd_epi32(high, odd, _mm512_loadu_si512(x->high[1]));
        low = _mm512_dpbusd_epi32(low, odd, _mm512_loadu_si512(x->low[1]));
    }
    __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    __m512 factors = _mm512_mul_ps(load_factors(scales, group, per), _mm512_loadu_ps(x->factors));
    return _mm512_fmadd_ps(product, factors, sums);
}

/* Bytes of a row, and of its scales. */
static inline size_t row_bytes_of(size_t width, size_t per) {
    return (width * 4 + per - 1) / per;
}

static inline size_t scale_bytes_of(size_t width, size_t group, size_t per) {
    return per == 8 ? int4_factor_bytes(width) : (width + group - 1) / group * sizeof(uint16_t);
}

/* `together` rows, which share what is read of x, each so many rows from the one before; the first is a constant, as `per` and
 * `group` are. */
TARGET static inline void dot_rows(const uint8_t *w, const uint8_t *scales, size_t width, size_t group,
                                   size_t together, size_t apart, const chunk *x, float *out, size_t per) {
    const size_t step = per * LANES, begin = per == 8 ? UNIT_BYTES : 0;
    const size_t each = step / group * (per == 8 ? sizeof(int8_t) : sizeof(uint16_t)); /* bytes of scales of a step */
    size_t row_bytes = row_bytes_of(width, per), row_scales = scale_bytes_of(width, group, per), at = 0;
    __m512 sums[TOGETHER];
    for (size_t r = 0; r < together; r++)
        sums[r] = _mm512_setzero_ps();
    for (; (at + 1) * step <= width; at++)
        for (size_t r = 0; r < together; r++) {
            const uint8_t *from = w + r * apart * row_bytes + at * VECTOR_BYTES;
            _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
            sums[r] = add_chunk(_mm512_loadu_si512(from), scales + r * apart * row_scales + begin + at * each, group, x + at,
                                per, sums[r]);
        }
    for (size_t r = 0; r < together; r++) {
        const uint8_t *mine = scales + r * apart * row_scales;
        if (at * step < width) {
            uint8_t last[VECTOR_BYTES] = {0}, last_scales[8] = {0};
            memcpy(last, w + r * apart * row_bytes + at * VECTOR_BYTES, row_bytes - at * VECTOR_BYTES);
            memcpy(last_scales, mine + begin + at * each, row_scales - begin - at * each);
            sums[r] = add_chunk(_mm512_loadu_si512(last), last_scales, group, x + at, per, sums[r]);
        }
        out[r * apart] = _mm512_reduce_add_ps(sums[r]) * (per == 8 ? unit_of(mine) : 1);
    }
}

/* Rows that are computed together lie in two parts, far enough apart for the processor to see two streams. */
TARGET static inline void dot(const uint8_t *w, const uint8_t *scales, size_t width, size_t group, size_t rows,
                              const chunk *x, float *out, size_t per) {
    size_t row_bytes = row_bytes_of(width, per), row_scales = scale_bytes_of(width, group, per), part = rows / TOGETHER;
    for (size_t r = 0; r < part; r++)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, TOGETHER, part, x, out + r, per);
    for (size_t r = part * TOGETHER; r < rows; r++)
        dot_rows(w + r * row_bytes, scales + r * row_scales, width, group, 1, 1, x, out + r, per);
}

TARGET void dot_vnni8(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                      const void *packed, float *out) {
    if (group == 32)
        dot(w, (const uint8_t *)scales, width, 32, rows, packed, out, 4);
    else
        dot(w, (const uint8_t *)scales, width, 64, rows, packed, out, 4);
}

TARGET void dot_vnni4(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    dot(w, scales, width, INT4_GROUP, rows, packed, out, 8);
}

#endif
