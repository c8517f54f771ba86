#include "library.h"
#include "row_sum.h"

#include <math.h>

/* torch adds the squares of a row in LANES interleaved sums of 4 vectors each, which are rows of numbers (row_sum.h). What does
 * not fill 4 vectors, and then a vector, comes last. Less than a vector has 4 interleaved sums, the first of which takes in what
 * is left over. */
enum { LANES = 8, ABREAST = 4, ROW = LANES * ABREAST };

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
    float levels[LEVELS * ROW];
    size_t vectors = size / LANES, rows = vectors / ABREAST;
    row_sum sum = begin_rows(levels, rows, ROW);
    for (size_t row = 0; row < rows; row++) {
        add_to(levels, values + row * ROW, ROW);
        end_row(&sum);
    }
    float *sums = end_rows(&sum);
    for (size_t i = rows * ABREAST; i < vectors; i++)
        add_to(sums, values + i * LANES, LANES);
    for (size_t i = 1; i < ABREAST; i++)
        add_to(sums, sums + i * LANES, LANES);
    float total = 0;
    for (size_t i = vectors * LANES; i < size; i++)
        total += values[i];
    for (size_t i = 0; i < LANES; i++)
        total += sums[i];
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
