/* Attention's loops with AVX-512, in the order that attention.c says. */
#include "attention.h"

#ifdef HAS_DOT_PAIRS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,fma")))

enum { WAYS = 4, LANES = 16, MOST_VECTORS = 2 };

/* 2^x by a polynomial on the bits of a float, after Malossi et al. (2015): good to 20 units in the last place. */
TARGET static inline __m512 exponential(__m512 x) {
    __mmask16 is_zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-0x1.5d58a0p+6f), _CMP_LT_OS);
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f));
    __m512 rest = _mm512_sub_ps(power, _mm512_roundscale_ps(power, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    __m512 y = _mm512_fmadd_ps(rest, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
    y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.30354260500649682f));
    y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.00010703434948458272f));
    __m512 bits = _mm512_fmadd_ps(_mm512_set1_ps(0x1p23f), _mm512_sub_ps(power, y), _mm512_set1_ps(127 * 0x1p23f));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_cvttps_epi32(bits), is_zero, _mm512_setzero_si512()));
}

TARGET static inline __m512 widen(const uint16_t *values) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Scores of AT_A_TIME keys for each of `heads` queries [heads, size], written behind each other from `place` on in the
 * heads' blocks. */
TARGET static inline __attribute__((always_inline)) void score_some(const uint16_t *const *keys, size_t size,
                                                                    size_t heads, const float *queries,
                                                                    const head *each, size_t place) {
    __m512 sums[MOST_HEADS];
    for (size_t h = 0; h < heads; h++)
        sums[h] = _mm512_setzero_ps();
    for (size_t i = 0; i < size; i += LANES) {
        __m512 k0 = widen(keys[0] + i), k1 = widen(keys[1] + i), k2 = widen(keys[2] + i), k3 = widen(keys[3] + i);
        /* Quarter q of part p: four inputs from 4 p of key q. */
        __m512 low01 = _mm512_shuffle_f32x4(k0, k1, 0x44), high01 = _mm512_shuffle_f32x4(k0, k1, 0xee);
        __m512 low23 = _mm512_shuffle_f32x4(k2, k3, 0x44), high23 = _mm512_shuffle_f32x4(k2, k3, 0xee);
        __m512 parts[WAYS] = {_mm512_shuffle_f32x4(low01, low23, 0x88), _mm512_shuffle_f32x4(low01, low23, 0xdd),
                              _mm512_shuffle_f32x4(high01, high23, 0x88), _mm512_shuffle_f32x4(high01, high23, 0xdd)};
        for (size_t h = 0; h < heads; h++)
            for (int p = 0; p < WAYS; p++) {
                __m128 query = _mm_loadu_ps(queries + h * size + i + (size_t)(4 * p));
                sums[h] = _mm512_fmadd_ps(parts[p], _mm512_broadcast_f32x4(query), sums[h]);
            }
    }
    for (size_t h = 0; h < heads; h++) {
        __m512 pairs = _mm512_add_ps(sums[h], _mm512_permute_ps(sums[h], 0x4e));
        __m512 scores = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
        _mm_storeu_ps(each[h].chances + place, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, scores)));
    }
}

TARGET static void score(const head *each, size_t heads, const float *queries, const uint16_t *keys, size_t apart,
                         size_t size, size_t count) {
    for (size_t t = 0; t < count; t += AT_A_TIME) {
        const uint16_t *four[AT_A_TIME];
        for (size_t n = 0; n < AT_A_TIME; n++)
            four[n] = keys + smaller(t + n, count - 1) * apart;
        size_t h = 0;
        for (; h + MOST_HEADS <= heads; h += MOST_HEADS)
            score_some(four, size, MOST_HEADS, queries + h * size, each + h, t);
        for (; h < heads; h++)
            score_some(four, size, 1, queries + h * size, each + h, t);
    }
}

TARGET static void take_in(head *head, float scale, size_t count, size_t size) {
    float *scores = head->chances, most = head->most;
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps(), largest = _mm512_set1_ps(most);
    size_t t = 0;
    for (; t + LANES <= count; t += LANES) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(scale));
        __mmask16 odd = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
        largest = _mm512_mask_mov_ps(_mm512_max_ps(scaled, largest), odd, scaled); /* of a NaN and a number, the NaN */
        _mm512_storeu_ps(scores + t, scaled);
    }
    most = _mm512_cmp_ps_mask(largest, largest, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(largest);
    for (; t < count; t++) {
        scores[t] *= scale;
        most = scores[t] > most ? scores[t] : most;
    }
    if (most == -INFINITY) { /* nothing to attend to */
        memset(scores, 0, count * sizeof *scores);
        return;
    }
    t = 0;
    for (; t + LANES <= count; t += LANES) {
        __m512 chances = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(most)));
        __m512 *sums = t / LANES % 2 == 0 ? &even : &odd;
        *sums = _mm512_add_ps(*sums, chances);
        _mm512_storeu_ps(scores + t, chances);
    }
    __m512 sums = _mm512_add_ps(even, odd);
    sums = _mm512_add_ps(sums, _mm512_shuffle_f32x4(sums, sums, 0x4e));
    sums = _mm512_add_ps(sums, _mm512_shuffle_f32x4(sums, sums, 0xb1));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
    float sum = _mm512_cvtss_f32(sums);
    end_block(head, most, sum, t, count, size);
}

/* Adds the values of a block, weighed, to the totals of `heads` heads; vectors from `begin` on, `vectors` of them. */
TARGET static inline __attribute__((always_inline)) void weigh_some(const head *each, size_t heads, size_t begin,
                                                                    size_t vectors, const uint16_t *values, size_t apart,
                                                                    size_t count) {
    __m512 totals[MOST_HEADS][MOST_VECTORS];
    for (size_t h = 0; h < heads; h++)
        for (size_t v = 0; v < vectors; v++)
            totals[h][v] = _mm512_loadu_ps(each[h].total + begin + v * LANES);
    size_t t = 0;
    for (; t + AT_A_TIME <= count; t += AT_A_TIME)
        for (size_t v = 0; v < vectors; v++) {
            const uint16_t *value = values + t * apart + begin + v * LANES;
            __m512 v0 = widen(value), v1 = widen(value + apart), v2 = widen(value + 2 * apart);
            __m512 v3 = widen(value + 3 * apart);
            for (size_t h = 0; h < heads; h++) {
                const float *chances = each[h].chances + t;
                __m512 even = _mm512_mul_ps(v0, _mm512_set1_ps(chances[0]));
                __m512 odd = _mm512_mul_ps(v1, _mm512_set1_ps(chances[1]));
                even = _mm512_fmadd_ps(v2, _mm512_set1_ps(chances[2]), even);
                odd = _mm512_fmadd_ps(v3, _mm512_set1_ps(chances[3]), odd);
                totals[h][v] = _mm512_add_ps(totals[h][v], _mm512_add_ps(even, odd));
            }
        }
    for (size_t h = 0; h < heads; h++)
        for (size_t v = 0; v < vectors; v++) {
            for (size_t left = count; left > t; left--) {
                __m512 value = widen(values + (left - 1) * apart + begin + v * LANES);
                totals[h][v] = _mm512_fmadd_ps(value, _mm512_set1_ps(each[h].chances[left - 1]), totals[h][v]);
            }
            _mm512_storeu_ps(each[h].total + begin + v * LANES, totals[h][v]);
        }
}

TARGET static void weigh(const head *each, size_t heads, const uint16_t *values, size_t apart, size_t size,
                         size_t count) {
    size_t i = 0;
    for (; i + MOST_VECTORS * LANES <= size; i += MOST_VECTORS * LANES) {
        size_t h = 0;
        for (; h + MOST_HEADS <= heads; h += MOST_HEADS)
            weigh_some(each + h, MOST_HEADS, i, MOST_VECTORS, values, apart, count);
        for (; h < heads; h++)
            weigh_some(each + h, 1, i, MOST_VECTORS, values, apart, count);
    }
    if (i < size)
        for (size_t h = 0; h < heads; h++)
            weigh_some(each + h, 1, i, 1, values, apart, count);
}

const attention_loops attention_avx512 = {score, take_in, weigh};

#endif
