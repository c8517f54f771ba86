/* Products for many x at once in torch's own order (VECTORS in kernels.h), where the processor has vectors of eight float32.
 *
 * An output of one x is VECTORS vectors of sums, too many to stay in registers. But they do not depend on each other: so x and
 * weights are laid out with what belongs to the first vector in front, then what belongs to the second one, and of these
 * OUTPUTS outputs and XS x at a time stay in registers, over DEPTH inputs. Packed weights are expanded on the way. */
#include "avx2.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

enum { LANES = 8, STEP = VECTORS * LANES, OUTPUTS = 4, XS = 3, DEPTH = 1024, BLOCKS = DEPTH / STEP };

/* Rows of x lie a little more than their width apart: powers of two would share the cache's sets. */
static inline size_t row_floats(size_t width) {
    return (width + LANES - 1) / LANES * LANES + 16;
}

size_t tile_bytes_avx2(size_t width) {
    return row_floats(width) * sizeof(float);
}

/* Where eight numbers of an x lie, or what is behind the last step as it is. */
static inline float *place(void *packed, size_t width, size_t row, size_t i) {
    size_t blocks = width / STEP, whole = blocks * STEP;
    float *x = (float *)packed + row * row_floats(width);
    return i < whole ? x + (i % STEP / LANES * blocks + i / STEP) * LANES : x + i;
}

TARGET void pack_tile_avx2(const uint16_t *const *x, size_t width, size_t rows, size_t tile, void *packed) {
    for (size_t r = 0; r < tile; r++) {
        if (r >= rows) {
            memset((float *)packed + r * row_floats(width), 0, tile_bytes_avx2(width));
            continue;
        }
        size_t i = 0;
        for (; i + LANES <= width; i += LANES)
            _mm256_storeu_ps(place(packed, width, r, i), widen_avx2(x[r] + i));
        for (float *last = place(packed, width, r, i); i < width; i++)
            *last++ = from_bf16(x[r][i]);
    }
}

TARGET void put_tile_avx2(const float *values, size_t first, size_t count, size_t width, size_t tile, size_t row, void *packed) {
    (void)tile;
    for (size_t i = 0; i < count; i += LANES)
        memcpy(place(packed, width, row, first + i), values + i, smaller(LANES, count - i) * sizeof *values);
}

/* Weights of OUTPUTS rows in float32: for each vector of sums, for each step, one vector of every row. */
typedef struct {
    float weights[VECTORS][BLOCKS][OUTPUTS][LANES];
} panel;

/* DEPTH inputs or fewer of these rows, `stride` apart. */
TARGET static void write_panel(const uint16_t *w, size_t stride, size_t rows, size_t blocks, panel *to) {
    for (size_t b = 0; b < blocks; b++)
        for (size_t o = 0; o < OUTPUTS; o++) {
            const uint16_t *from = w + smaller(o, rows - 1) * stride + b * STEP;
            for (size_t v = 0; v < VECTORS; v++)
                _mm256_store_ps(to->weights[v][b][o], widen_avx2(from + v * LANES));
        }
}

/* Sums of OUTPUTS outputs of all x, vector by vector. */
typedef float sums_of_x[OUTPUTS][LANES];

/* Those of `count` x, a constant, into registers, as 0 if they begin; and back. */
TARGET static inline __attribute__((always_inline)) void load_sums(sums_of_x *sums, size_t count, int begins,
                                                                   __m256 each[XS][OUTPUTS]) {
#pragma GCC unroll 3
    for (size_t k = 0; k < count; k++)
#pragma GCC unroll 4
        for (size_t o = 0; o < OUTPUTS; o++)
            each[k][o] = begins ? _mm256_setzero_ps() : _mm256_load_ps(sums[k][o]);
}

TARGET static inline __attribute__((always_inline)) void store_sums(__m256 each[XS][OUTPUTS], size_t count, sums_of_x *sums) {
#pragma GCC unroll 3
    for (size_t k = 0; k < count; k++)
#pragma GCC unroll 4
        for (size_t o = 0; o < OUTPUTS; o++)
            _mm256_store_ps(sums[k][o], each[k][o]);
}

/* Adds the products of one vector of `blocks` steps and `count` x, which are `stride` apart. */
TARGET static inline __attribute__((always_inline)) void add_some(float (*w)[OUTPUTS][LANES], size_t blocks, const float *x,
                                                                  size_t stride, size_t count, int begins, sums_of_x *sums) {
    __m256 each[XS][OUTPUTS];
    load_sums(sums, count, begins, each);
    for (size_t b = 0; b < blocks; b++) {
        __m256 values[XS];
#pragma GCC unroll 3
        for (size_t k = 0; k < count; k++)
            values[k] = _mm256_loadu_ps(x + k * stride + b * LANES);
#pragma GCC unroll 4
        for (size_t o = 0; o < OUTPUTS; o++) {
            __m256 weight = _mm256_load_ps(w[b][o]);
#pragma GCC unroll 3
            for (size_t k = 0; k < count; k++)
                each[k][o] = _mm256_fmadd_ps(weight, values[k], each[k][o]);
        }
    }
    store_sums(each, count, sums);
}

TARGET static void add(float (*w)[OUTPUTS][LANES], size_t blocks, const float *x, size_t stride, size_t count, int begins,
                       sums_of_x *sums) {
    size_t k = 0;
    for (; k + XS <= count; k += XS)
        add_some(w, blocks, x + k * stride, stride, XS, begins, sums + k);
    if (count - k == 2)
        add_some(w, blocks, x + k * stride, stride, 2, begins, sums + k);
    else if (count - k == 1)
        add_some(w, blocks, x + k * stride, stride, 1, begins, sums + k);
}

/* The lanes of four vectors, added by halves. */
TARGET static inline __m128 fold(const __m256 *sums) {
    __m128 four[4];
    for (int o = 0; o < 4; o++)
        four[o] = _mm_add_ps(_mm256_castps256_ps128(sums[o]), _mm256_extractf128_ps(sums[o], 1));
    _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
    return _mm_add_ps(_mm_add_ps(four[0], four[2]), _mm_add_ps(four[1], four[3]));
}

/* What is behind the last whole step: `count` inputs of OUTPUTS rows, and one x. */
TARGET static inline __m128 add_rest(uint16_t (*rest)[STEP], size_t count, const float *x, __m128 total) {
    __m256 sums[OUTPUTS];
    size_t vectors = count / (2 * LANES) * 2;
    for (size_t o = 0; o < OUTPUTS; o++) {
        sums[o] = _mm256_setzero_ps();
        for (size_t v = 0; v < vectors; v++)
            sums[o] = _mm256_fmadd_ps(widen_avx2(rest[o] + v * LANES), _mm256_loadu_ps(x + v * LANES), sums[o]);
    }
    total = _mm_add_ps(total, fold(sums));
    for (size_t i = vectors * LANES; i < count; i++) {
        __m128 weights = _mm_setr_ps(from_bf16(rest[0][i]), from_bf16(rest[1][i]), from_bf16(rest[2][i]), from_bf16(rest[3][i]));
        total = _mm_fmadd_ps(weights, _mm_set1_ps(x[i]), total);
    }
    return total;
}

/* `rows` rows of a weight from `start` on, and how far apart they lie: where they are, or expanded into `some`. */
static const uint16_t *find_rows(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs,
                                 uint16_t (*some)[DEPTH], size_t *stride) {
    if (w->kind == MOE_PLAIN) {
        *stride = w->width;
        return (const uint16_t *)w->numbers + row * w->width + start;
    }
    *stride = DEPTH;
    put_rows_avx2(w, row, rows, start, inputs, some[0], DEPTH);
    return some[0];
}

/* The order of turns_avx2.c: OUTPUTS pairs of outputs at a time, whose chains are the halves of a vector. */
typedef struct {
    float weights[DEPTH / TURNS / 4][OUTPUTS][LANES];
} pairs;

enum { TURNED = DEPTH / 4, SOME_ROWS = 2 * OUTPUTS };

/* TURNED inputs or fewer, a multiple of LANES, of these rows, which are so far apart. */
TARGET static void write_pairs(const uint16_t *w, size_t stride, size_t rows, size_t inputs, pairs *to) {
    for (size_t i = 0; i < inputs; i += LANES)
        for (size_t o = 0; o < OUTPUTS; o++) {
            __m256 one = widen_avx2(w + smaller(2 * o, rows - 1) * stride + i);
            __m256 other = widen_avx2(w + smaller(2 * o + 1, rows - 1) * stride + i);
            _mm256_store_ps(to->weights[i / TURNS][o], _mm256_permute2f128_ps(one, other, 0x20));
            _mm256_store_ps(to->weights[i / TURNS + 1][o], _mm256_permute2f128_ps(one, other, 0x31));
        }
}

/* Adds the products of these inputs, which lie in eights, and `count` x. */
TARGET static inline __attribute__((always_inline)) void turn_some(const pairs *w, size_t start, size_t inputs, const float *x,
                                                                   size_t width, size_t count, sums_of_x *sums) {
    __m256 each[XS][OUTPUTS];
    load_sums(sums, count, start == 0, each);
    for (size_t i = 0; i < inputs; i += LANES) {
        const float *eight = place((void *)x, width, 0, start + i);
        for (size_t half = 0; half < 2; half++) {
            __m256 values[XS];
#pragma GCC unroll 3
            for (size_t k = 0; k < count; k++)
                values[k] = _mm256_broadcast_ps((const __m128 *)(eight + k * row_floats(width) + half * TURNS));
#pragma GCC unroll 4
            for (size_t o = 0; o < OUTPUTS; o++) {
                __m256 weight = _mm256_load_ps(w->weights[i / TURNS + half][o]);
#pragma GCC unroll 3
                for (size_t k = 0; k < count; k++)
                    each[k][o] = _mm256_fmadd_ps(weight, values[k], each[k][o]);
            }
        }
    }
    store_sums(each, count, sums);
}

TARGET static void multiply_turns(const matrix *w, size_t first, size_t outputs, const float *x, size_t count, float *out) {
    size_t width = w->width, whole = width / LANES * LANES, apart = 0;
    _Alignas(32) sums_of_x sums[BLOCK_ROWS];
    _Alignas(32) pairs weights;
    for (size_t output = 0; output < outputs; output += SOME_ROWS) {
        uint16_t some[SOME_ROWS][DEPTH];
        size_t rows = smaller(SOME_ROWS, outputs - output), row = first + output;
        memset(sums, 0, sizeof sums);
        for (size_t start = 0; start < whole; start += TURNED) {
            size_t inputs = smaller(TURNED, whole - start), k = 0;
            const uint16_t *from = find_rows(w, row, rows, start, inputs, some, &apart);
            write_pairs(from, apart, rows, inputs, &weights);
            for (; k + XS <= count; k += XS)
                turn_some(&weights, start, inputs, x + k * row_floats(width), width, XS, sums + k);
            for (; k < count; k++)
                turn_some(&weights, start, inputs, x + k * row_floats(width), width, 1, sums + k);
        }
        const uint16_t *rest = whole < width ? find_rows(w, row, rows, whole, width - whole, some, &apart) : NULL;
        for (size_t k = 0; k < count; k++)
            for (size_t r = 0; r < rows; r++) {
                float *chains = &sums[k][r / 2][r % 2 * TURNS];
                for (size_t i = whole; i < width; i++) /* what fills no turn is the first one's */
                    chains[i < width / TURNS * TURNS ? i % TURNS : 0] += from_bf16(rest[r * apart + i - whole]) *
                                                                         x[k * row_floats(width) + i];
                out[k * BLOCK_OUTPUTS + output + r] = chains[0] + chains[1] + chains[2] + chains[3];
            }
    }
}

TARGET void multiply_avx2(const matrix *w, size_t first, size_t outputs, const moe_order *order, const void *packed,
                         size_t tile, size_t tiles, float *out) {
    size_t width = w->width, whole = width / STEP * STEP, stride = row_floats(width), count = tiles * tile;
    const float *x = packed;
    _Alignas(32) sums_of_x sums[VECTORS][BLOCK_ROWS];
    _Alignas(32) panel panel;
    if (order->chain == MOE_IN_TURN) {
        multiply_turns(w, first, outputs, x, count, out);
        return;
    }
    for (size_t output = 0; output < outputs; output += OUTPUTS) {
        uint16_t some[OUTPUTS][DEPTH], rest[OUTPUTS][STEP] = {{0}};
        size_t rows = smaller(OUTPUTS, outputs - output), row = first + output, apart;
        for (size_t start = 0; start < whole; start += DEPTH) {
            size_t inputs = smaller(DEPTH, whole - start), blocks = inputs / STEP;
            const uint16_t *from = find_rows(w, row, rows, start, inputs, some, &apart);
            write_panel(from, apart, rows, blocks, &panel);
            for (size_t v = 0; v < VECTORS; v++) {
                const float *here = x + (v * (whole / STEP) + start / STEP) * LANES;
                add(panel.weights[v], blocks, here, stride, count, start == 0, sums[v]);
            }
        }
        if (whole < width) {
            const uint16_t *from = find_rows(w, row, rows, whole, width - whole, some, &apart);
            for (size_t o = 0; o < rows; o++)
                memcpy(rest[o], from + o * apart, (width - whole) * sizeof *from);
        }
        for (size_t k = 0; k < count; k++) {
            __m256 each[OUTPUTS];
            for (size_t o = 0; o < OUTPUTS; o++) {
                __m256 v[VECTORS];
                for (size_t i = 0; i < VECTORS; i++)
                    v[i] = whole > 0 ? _mm256_load_ps(sums[i][k][o]) : _mm256_setzero_ps();
                for (size_t half = VECTORS / 2; half > 0; half /= 2)
                    for (size_t i = 0; i < half; i++)
                        v[i] = _mm256_add_ps(v[i], v[i + half]);
                each[o] = v[0];
            }
            __m128 total = fold(each);
            if (whole < width)
                total = add_rest(rest, width - whole, x + k * stride + whole, total);
            float four[OUTPUTS];
            _mm_storeu_ps(four, total);
            memcpy(out + k * BLOCK_OUTPUTS + output, four, rows * sizeof *four);
        }
    }
}

#endif
