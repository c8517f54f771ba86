/* Attention of one token whose keys are of another width than its values. torch has no kernel for it on processors: it widens
 * everything to float32, multiplies queries and keys by the root of the scale each, and computes three steps (orders found by
 * trying, ATen/native/transformers/attention.cpp):
 *
 *   A score is four interleaved sums of products, (0 + 2) + (1 + 3), of which the first begins with the first four products in
 *   turn. MKL has these of four keys at a time. Of keys that are left over, the first and third have eight sums, each of the
 *   four being two, and all of them what fills no eight products at the end, in turn. Fewer than FEW products are one sum.
 *   The softmax is that of float32. A value's sum takes tokens in turn.
 *
 * Products are rounded before they are added, so nothing here may be compiled for processors that fuse both. */
#include "attention.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define ROUNDING_TARGET __attribute__((target("avx2,no-fma")))

enum { FEW = 400, LANES = 4, PAIRS = 4 /* of keys, at a time */, ABREAST = 8 /* vectors of sums of values */ };

typedef struct {
    const moe_attention *what;
    uint16_t *output;
    float *scratch; /* per head */
    size_t numbers; /* of it */
} widened;

/* A score of a key that is left over, by so many interleaved sums, or one of all products. */
static float score_alone(const float *query, const uint16_t *key, float root, size_t size, size_t lanes) {
    float sums[2 * LANES] = {0};
    size_t whole = lanes == 1 ? size : LANES + (size - LANES) / (2 * LANES) * (2 * LANES);
    for (size_t i = 0; i < whole; i++) {
        float product = query[i] * (from_bf16(key[i]) * root);
        sums[i < LANES || lanes == 1 ? 0 : (i - LANES) % lanes] += product;
    }
    for (size_t i = 0; i < LANES; i++)
        sums[i] += sums[LANES + i];
    float score = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    for (size_t i = whole; i < size; i++)
        score += query[i] * (from_bf16(key[i]) * root);
    return score;
}

/* Four products each of two keys that lie `apart`. */
ROUNDING_TARGET static inline __m256 multiply(const float *query, const uint16_t *key, size_t apart, __m256 root) {
    __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)key), _mm_loadl_epi64((const __m128i *)(key + apart)));
    __m256 keys = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both), 16));
    return _mm256_mul_ps(_mm256_mul_ps(keys, root), _mm256_broadcast_ps((const __m128 *)query));
}

/* Scores of 2 * `pairs` keys. */
ROUNDING_TARGET static inline __attribute__((always_inline)) void score_pairs(size_t pairs, const float *query, const uint16_t *keys,
                                                                               size_t apart, float root, size_t size,
                                                                               float *scores) {
    __m256 sums[PAIRS], factor = _mm256_set1_ps(root);
    for (size_t p = 0; p < pairs; p++) {
        __m256 first = multiply(query, keys + 2 * p * apart, apart, factor);
        __m256 sum = _mm256_add_ps(first, _mm256_permute_ps(first, 1));
        sum = _mm256_add_ps(sum, _mm256_permute_ps(first, 2));
        sum = _mm256_add_ps(sum, _mm256_permute_ps(first, 3));
        sums[p] = _mm256_blend_ps(_mm256_setzero_ps(), sum, 0x11);
    }
    for (size_t i = LANES; i < size; i += LANES)
        for (size_t p = 0; p < pairs; p++)
            sums[p] = _mm256_add_ps(sums[p], multiply(query + i, keys + 2 * p * apart + i, apart, factor));
    for (size_t p = 0; p < pairs; p++) {
        __m256 two = _mm256_add_ps(sums[p], _mm256_permute_ps(sums[p], 0x0e));
        __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 1));
        scores[2 * p] = _mm256_cvtss_f32(one);
        scores[2 * p + 1] = _mm_cvtss_f32(_mm256_extractf128_ps(one, 1));
    }
}

ROUNDING_TARGET static void score(const float *query, const uint16_t *keys, size_t apart, float root, size_t size, size_t tokens,
                                  float *scores) {
    size_t whole = size * tokens < FEW ? 0 : tokens / LANES * LANES, t = 0;
    for (; t + 2 * PAIRS <= whole; t += 2 * PAIRS)
        score_pairs(PAIRS, query, keys + t * apart, apart, root, size, scores + t);
    for (; t < whole; t += LANES)
        score_pairs(LANES / 2, query, keys + t * apart, apart, root, size, scores + t);
    for (; t < tokens; t++) {
        size_t lanes = size * tokens < FEW ? 1 : (t - whole) % 2 == 0 ? 2 * LANES : LANES;
        scores[t] = score_alone(query, keys + t * apart, root, size, lanes);
    }
}

/* Values that lie `apart`, weighed and added up, 8 * `vectors` numbers of each. */
ROUNDING_TARGET static inline __attribute__((always_inline)) void weigh_some(size_t vectors, const float *chances, const uint16_t *values,
                                                                              size_t apart, size_t tokens, uint16_t *output) {
    __m256 sums[ABREAST];
    for (size_t v = 0; v < vectors; v++)
        sums[v] = _mm256_setzero_ps();
    for (size_t t = 0; t < tokens; t++) {
        __m256 chance = _mm256_set1_ps(chances[t]);
        for (size_t v = 0; v < vectors; v++) {
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(values + t * apart + 8 * v)));
            __m256 value = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
            sums[v] = _mm256_add_ps(sums[v], _mm256_mul_ps(chance, value));
        }
    }
    for (size_t v = 0; v < vectors; v++) {
        float some[8];
        _mm256_storeu_ps(some, sums[v]);
        for (size_t i = 0; i < 8; i++)
            output[8 * v + i] = to_bf16(some[i]);
    }
}

ROUNDING_TARGET static void weigh(const float *chances, const uint16_t *values, size_t apart, size_t size, size_t tokens,
                                  uint16_t *output) {
    size_t i = 0;
    for (; i + 8 * ABREAST <= size; i += 8 * ABREAST)
        weigh_some(ABREAST, chances, values + i, apart, tokens, output + i);
    for (; i < size; i += 8)
        weigh_some(1, chances, values + i, apart, tokens, output + i);
}

/* Where nothing is left of any token, there are no chances. */
static void soften(float *scores, size_t tokens, size_t lanes) {
    size_t lost = 0;
    while (lost < tokens && scores[lost] == -INFINITY)
        lost++;
    if (lost < tokens)
        softmax(scores, tokens, lanes);
    else
        memset(scores, 0, tokens * sizeof *scores);
}

static void run_ticket(void *job, size_t ticket) {
    const widened *widened = job;
    const moe_attention *what = widened->what;
    size_t size = (size_t)what->size, tokens = (size_t)what->tokens, values = (size_t)what->value_size;
    size_t shared = ticket / (size_t)(what->heads / what->kv_heads);
    const uint16_t *keys = (const uint16_t *)what->keys + shared * (size_t)what->key_head;
    float *query = widened->scratch + ticket * widened->numbers, *scores = query + size;
    for (size_t i = 0; i < size; i++)
        query[i] = from_bf16(((const uint16_t *)what->query)[ticket * size + i]) * what->scale;
    score(query, keys, (size_t)what->key_token, what->scale, size, tokens, scores);
    soften(scores, tokens, (size_t)what->lanes);
    weigh(scores, (const uint16_t *)what->values + shared * (size_t)what->value_head, (size_t)what->value_token, values, tokens,
          widened->output + ticket * values);
}

int attend_widely(moe_pool *pool, const moe_attention *what, void *output) {
    widened job = {.what = what, .output = output, .numbers = ceil_div((size_t)(what->size + what->tokens), 16) * 16};
    if (!reserve(pool, (size_t)what->heads * job.numbers * sizeof(float)))
        return -1;
    job.scratch = pool->scratch;
    pool_run(pool->threads, run_ticket, &job, (size_t)what->heads);
    return 0;
}

#endif
