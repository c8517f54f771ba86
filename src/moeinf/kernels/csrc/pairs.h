/* What the kernels for pairs of bfloat16 share: one output per lane, of weights that lie one output per row. */
#ifndef PAIRS_H
#define PAIRS_H

#include "kernels.h"

#ifdef HAS_DOT_PAIRS

#include <immintrin.h>
#include <stdbool.h>

#define PAIRS_TARGET __attribute__((target("avx512f,avx512bf16")))

enum {
    ROWS = 16, /* lanes */
    STEP = 32, /* inputs in a vector of pairs */
    LINE_BYTES = 64,
    DEPTH = 512, /* inputs that are unpacked or transposed at a time */
};

/* What memory is asked for ahead of its time depends on who made the processor. */
static inline bool is_intel(void) {
    return __builtin_cpu_is("intel");
}

/* One chain of one row, the slow way: for rows that are left over, and to be read. */
float dot_chain(const uint16_t *w, size_t count, const uint16_t *x);

/* 64 bytes of each of 16 rows, `stride` bytes apart: words[i] will have word i of row r in lane r. */
PAIRS_TARGET static inline void transpose(const char *rows, size_t stride, __m512i words[16]) {
    __m512i quads[16];
    for (int j = 0; j < 4; j++) {
        /* quads[4 j + c] will have, in 128-bit lane l, word 4 l + c of rows 4 j to 4 j + 3. */
        const char *row = rows + (size_t)(4 * j) * stride;
        __m512i r0 = _mm512_loadu_si512(row), r1 = _mm512_loadu_si512(row + stride);
        __m512i r2 = _mm512_loadu_si512(row + 2 * stride), r3 = _mm512_loadu_si512(row + 3 * stride);
        __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
        __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
        quads[4 * j] = _mm512_unpacklo_epi64(low01, low23);
        quads[4 * j + 1] = _mm512_unpackhi_epi64(low01, low23);
        quads[4 * j + 2] = _mm512_unpacklo_epi64(high01, high23);
        quads[4 * j + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    for (int c = 0; c < 4; c++) {
        __m512i low0 = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x44);
        __m512i low1 = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x44);
        __m512i high0 = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xee);
        __m512i high1 = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xee);
        words[c] = _mm512_shuffle_i32x4(low0, low1, 0x88);
        words[4 + c] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
        words[8 + c] = _mm512_shuffle_i32x4(high0, high1, 0x88);
        words[12 + c] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
}

/* The same by loads of parts of rows, which leave half of the work to whatever else the processor's ports are free for. */
PAIRS_TARGET static inline void transpose_parts(const char *rows, size_t stride, __m512i words[16]) {
    for (int c = 0; c < 4; c++, rows += 16) {
        __m512i parts[4]; /* of rows k, 4 + k, 8 + k and 12 + k */
        for (int k = 0; k < 4; k++) {
            const char *row = rows + (size_t)k * stride;
            parts[k] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row));
            for (int j = 1; j < 4; j++) {
                __m128i part = _mm_loadu_si128((const __m128i *)(row + (size_t)(4 * j) * stride));
                parts[k] = _mm512_mask_broadcast_i32x4(parts[k], (__mmask16)(0xf << 4 * j), part);
            }
        }
        __m512i low01 = _mm512_unpacklo_epi32(parts[0], parts[1]), high01 = _mm512_unpackhi_epi32(parts[0], parts[1]);
        __m512i low23 = _mm512_unpacklo_epi32(parts[2], parts[3]), high23 = _mm512_unpackhi_epi32(parts[2], parts[3]);
        words[4 * c] = _mm512_unpacklo_epi64(low01, low23);
        words[4 * c + 1] = _mm512_unpackhi_epi64(low01, low23);
        words[4 * c + 2] = _mm512_unpacklo_epi64(high01, high23);
        words[4 * c + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
}

/* Adds a pair of inputs of 16 rows to their chains. */
PAIRS_TARGET static inline __m512 add_pair(__m512i pairs, const uint16_t *x, __m512 chain) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(chain, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(pair));
}

/* Adds STEP inputs of 16 rows, as pairs, to their chains. */
PAIRS_TARGET static inline __m512 add_pairs(const __m512i pairs[16], const uint16_t *x, __m512 chain) {
    for (int i = 0; i < 16; i++)
        chain = add_pair(pairs[i], x + 2 * i, chain);
    return chain;
}

/* The same of rows as they lie, `stride` bytes apart. */
PAIRS_TARGET static inline __m512 add_step(const char *w, size_t stride, const uint16_t *x, __m512 chain) {
    __m512i pairs[16];
    transpose(w, stride, pairs);
    return add_pairs(pairs, x, chain);
}

#endif
#endif
