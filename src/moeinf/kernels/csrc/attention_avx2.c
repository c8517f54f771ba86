/* Attention's loops with AVX2, in the order that attention.c says. */
#include "attention.h"
#include "avx2.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, MOST_VECTORS = 2 };

/* 2^x by a polynomial on the bits of a float, after Malossi et al. (2015): good to 20 units in the last place. */
TARGET static inline __m256 exponential(__m256 x) {
    __m256 is_zero = _mm256_cmp_ps(x, _mm256_set1_ps(-0x1.5d58a0p+6f), _CMP_LT_OS);
    __m256 power = _mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f));
    __m256 rest = _mm256_sub_ps(power, _mm256_floor_ps(power));
    __m256 y = _mm256_fmadd_ps(rest, _mm256_set1_ps(-0.079204240219773236f), _mm256_set1_ps(-0.22433836478672356f));
    y = _mm256_fmadd_ps(rest, y, _mm256_set1_ps(0.30354260500649682f));
    y = _mm256_fmadd_ps(rest, y, _mm256_set1_ps(0.00010703434948458272f));
    __m256 bits = _mm256_fmadd_ps(_mm256_set1_ps(0x1p23f), _mm256_sub_ps(power, y), _mm256_set1_ps(127 * 0x1p23f));
    return _mm256_andnot_ps(is_zero, _mm256_castsi256_ps(_mm256_cvttps_epi32(bits)));
}

/* Scores of AT_A_TIME keys for each of `heads` queries [heads, size], written behind each other from `place` on in the
 * heads' blocks. */
TARGET static inline __attribute__((always_inline)) void score_some(const uint16_t *const *keys, size_t size,
                                                                    size_t heads, const float *queries,
                                                                    const head *each, size_t place) {
    __m256 sums[MOST_HEADS][2]; /* of two keys each */
#pragma GCC unroll 4
    for (size_t h = 0; h < heads; h++)
        sums[h][0] = sums[h][1] = _mm256_setzero_ps();
    for (size_t i = 0; i < size; i += LANES) {
        __m256 k0 = widen_avx2(keys[0] + i), k1 = widen_avx2(keys[1] + i), k2 = widen_avx2(keys[2] + i), k3 = widen_avx2(keys[3] + i);
        __m256 first[2] = {_mm256_permute2f128_ps(k0, k1, 0x20), _mm256_permute2f128_ps(k2, k3, 0x20)};
        __m256 second[2] = {_mm256_permute2f128_ps(k0, k1, 0x31), _mm256_permute2f128_ps(k2, k3, 0x31)};
#pragma GCC unroll 4
        for (size_t h = 0; h < heads; h++) {
            const float *query = queries + h * size + i;
            __m256 q0 = _mm256_broadcast_ps((const __m128 *)query), q1 = _mm256_broadcast_ps((const __m128 *)(query + 4));
            for (int k = 0; k < 2; k++)
                sums[h][k] = _mm256_fmadd_ps(second[k], q1, _mm256_fmadd_ps(first[k], q0, sums[h][k]));
        }
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < heads; h++)
        for (int k = 0; k < 2; k++) {
            __m256 pairs = _mm256_add_ps(sums[h][k], _mm256_permute_ps(sums[h][k], 0x4e));
            __m256 scores = _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0xb1));
            each[h].chances[place + (size_t)(2 * k)] = _mm256_cvtss_f32(scores);
            each[h].chances[place + (size_t)(2 * k) + 1] = _mm_cvtss_f32(_mm256_extractf128_ps(scores, 1));
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
    __m256 largest = _mm256_set1_ps(most), even = _mm256_setzero_ps(), odd = even;
    size_t t = 0;
    for (; t + LANES <= count; t += LANES) {
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(scale));
        __m256 is_odd = _mm256_cmp_ps(scaled, scaled, _CMP_UNORD_Q);
        largest = _mm256_or_ps(_mm256_max_ps(scaled, largest), is_odd); /* of a NaN and a number, a NaN */
        _mm256_storeu_ps(scores + t, scaled);
    }
    float lanes[LANES];
    _mm256_storeu_ps(lanes, largest);
    for (size_t i = 0; i < LANES; i++)
        most = lanes[i] <= most || most != most ? most : lanes[i];
    for (; t < count; t++) {
        scores[t] *= scale;
        most = scores[t] > most ? scores[t] : most;
    }
    if (most == -INFINITY) { /* nothing to attend to */
        memset(scores, 0, count * sizeof *scores);
        return;
    }
    for (t = 0; t + LANES <= count; t += LANES) {
        __m256 chances = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(most)));
        __m256 *sums = t / LANES % 2 == 0 ? &even : &odd;
        *sums = _mm256_add_ps(*sums, chances);
        _mm256_storeu_ps(scores + t, chances);
    }
    float sum = fold_avx2(_mm256_add_ps(even, odd));
    end_block(head, most, sum, t, count, size);
}

/* Adds the values of a block, weighed, to the totals of `heads` heads; vectors from `begin` on, `vectors` of them. */
TARGET static inline __attribute__((always_inline)) void weigh_some(const head *each, size_t heads, size_t begin,
                                                                    size_t vectors, const uint16_t *values, size_t apart,
                                                                    size_t count) {
    __m256 totals[MOST_HEADS][MOST_VECTORS];
#pragma GCC unroll 4
    for (size_t h = 0; h < heads; h++)
        for (size_t v = 0; v < vectors; v++)
            totals[h][v] = _mm256_loadu_ps(each[h].total + begin + v * LANES);
    size_t t = 0;
    for (; t + AT_A_TIME <= count; t += AT_A_TIME)
        for (size_t v = 0; v < vectors; v++) {
            const uint16_t *value = values + t * apart + begin + v * LANES;
            __m256 v0 = widen_avx2(value), v1 = widen_avx2(value + apart), v2 = widen_avx2(value + 2 * apart);
            __m256 v3 = widen_avx2(value + 3 * apart);
#pragma GCC unroll 4
            for (size_t h = 0; h < heads; h++) {
                const float *chances = each[h].chances + t;
                __m256 even = _mm256_mul_ps(v0, _mm256_set1_ps(chances[0]));
                __m256 odd = _mm256_mul_ps(v1, _mm256_set1_ps(chances[1]));
                even = _mm256_fmadd_ps(v2, _mm256_set1_ps(chances[2]), even);
                odd = _mm256_fmadd_ps(v3, _mm256_set1_ps(chances[3]), odd);
                totals[h][v] = _mm256_add_ps(totals[h][v], _mm256_add_ps(even, odd));
            }
        }
    for (size_t h = 0; h < heads; h++)
        for (size_t v = 0; v < vectors; v++) {
            for (size_t left = count; left > t; left--) {
                __m256 value = widen_avx2(values + (left - 1) * apart + begin + v * LANES);
                totals[h][v] = _mm256_fmadd_ps(value, _mm256_set1_ps(each[h].chances[left - 1]), totals[h][v]);
            }
            _mm256_storeu_ps(each[h].total + begin + v * LANES, totals[h][v]);
        }
}

TARGET static void weigh(const head *each, size_t heads, const uint16_t *values, size_t apart, size_t size, size_t count) {
    for (size_t i = 0; i < size; i += MOST_VECTORS * LANES) {
        size_t h = 0;
        for (; h + MOST_HEADS <= heads; h += MOST_HEADS)
            weigh_some(each + h, MOST_HEADS, i, MOST_VECTORS, values, apart, count);
        for (; h < heads; h++)
            weigh_some(each + h, 1, i, MOST_VECTORS, values, apart, count);
    }
}

const attention_loops attention_avx2 = {score, take_in, weigh};

#endif
