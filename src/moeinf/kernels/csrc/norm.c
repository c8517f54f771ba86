#include "library.h"

#include <math.h>

/* torch adds the squares of a row in LANES interleaved sums of 4 vectors each; such a sum is emptied into the next of 4
 * LEVELS every 16 vectors or more, and that one into the next, so that no sum takes in too many small numbers. What does
 * not fill 4 vectors, and then a vector, comes last. Less than a vector has 4 interleaved sums, the first of which takes in what
 * is left over. (ATen/native/cpu/SumKernel.cpp, found again by trying.) */
enum { LANES = 8, ABREAST = 4, ROW = LANES * ABREAST, LEVELS = 4 };

static int ceil_log2(size_t size) {
    int power = 0;
    while ((size_t)1 << power < size)
        power++;
    return power;
}

static void add_to(float *sums, const float *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        sums[i] += values[i];
}

static float sum_few(const float *values, size_t size) {
    float sums[ABREAST] = {0};
    size_t whole = size / ABREAST * ABREAST;
    for (size_t i = 0; i < size; i++)
        sums[i < whole ? i % ABREAST : 0] += values[i];
    return sums[0] + sums[1] + sums[2] + sums[3];
}

float sum_like_torch(const float *values, size_t size) {
    if (size < LANES)
        return sum_few(values, size);
    float sums[LEVELS][ROW] = {{0}};
    size_t vectors = size / LANES, rows = vectors / ABREAST, row = 0;
    int log2 = ceil_log2(rows), power = log2 / LEVELS > 4 ? log2 / LEVELS : 4;
    size_t step = (size_t)1 << power;
    while (row + step <= rows) {
        for (size_t end = row + step; row < end; row++)
            add_to(sums[0], values + row * ROW, ROW);
        for (int level = 1; level < LEVELS; level++) {
            add_to(sums[level], sums[level - 1], ROW);
            memset(sums[level - 1], 0, sizeof sums[0]);
            if ((row & ((step - 1) << (level * power))) != 0)
                break;
        }
    }
    for (; row < rows; row++)
        add_to(sums[0], values + row * ROW, ROW);
    for (int level = 1; level < LEVELS; level++)
        add_to(sums[0], sums[level], ROW);
    for (size_t i = rows * ABREAST; i < vectors; i++)
        add_to(sums[0], values + i * LANES, LANES);
    for (size_t i = 1; i < ABREAST; i++)
        add_to(sums[0], sums[0] + i * LANES, LANES);
    float total = 0;
    for (size_t i = vectors * LANES; i < size; i++)
        total += values[i];
    for (size_t i = 0; i < LANES; i++)
        total += sums[0][i];
    return total;
}

/* Apart from the adding, so that no compiler makes one rounding out of two. */
__attribute__((noinline)) static void square(const float *values, size_t size, float *squares) {
    for (size_t i = 0; i < size; i++)
        squares[i] = values[i] * values[i];
}

int moe_norm(moe_pool *pool, const moe_norm_layer *layer, int count, const void *x, void *output) {
    size_t size = (size_t)layer->size;
    const uint16_t *weight = layer->weight, *in = x;
    uint16_t *out = output;
    if (!reserve(pool, 2 * padded(size) * sizeof(float)))
        return -1;
    float *values = pool->scratch, *squares = values + padded(size);
    for (; count > 0; count--, in += size, out += size) {
        for (size_t i = 0; i < size; i++)
            values[i] = from_bf16(in[i]);
        square(values, size, squares);
        float scale = 1 / sqrtf(sum_like_torch(squares, size) / (float)size + layer->epsilon);
        for (size_t i = 0; i < size; i++) {
            float value = values[i] * scale;
            float times = from_bf16(weight[i]) + (layer->adds_one ? 1.0f : 0.0f);
            out[i] = to_bf16(times * (layer->rounds_first ? rounded(value, MOE_BF16) : value));
        }
    }
    return 0;
}
