/* The loops that read weights, one set of them per instruction set. */
#ifndef KERNELS_H
#define KERNELS_H

#include "moe.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers lie in files with their lowest byte first");

/* float16 by arithmetic on its bits: moved to where float32 has them, its exponent is 112 too small, but for infinity and
 * NaN. */
static inline float from_f16(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x8000) << 16 | (uint32_t)(half & 0x7fff) << 13;
    if ((half & 0x7c00) == 0x7c00)
        bits |= 0x7f800000;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;
}

/* bfloat16 is the upper half of a float32. Rounds to the nearest, halves to even, as torch does. */
static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t half = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return value == value ? half : 0x7fc0;
}

/* Rows are added AT_ONCE by `columns_*`; x is laid out PAD values at a time. */
enum { PAD = 128, AT_ONCE = 16 };

/* torch's own order of adding up products of bfloat16, which it takes where oneDNN does not multiply (aten/src/ATen/native/cpu:
 * ReducedPrecisionFloatGemvFastPathKernel.cpp, BlasKernel.cpp). Of weights [out, in]: VECTORS vectors of sums side by side,
 * which are added by halves, vectors first and then lanes; inputs behind the last VECTORS vectors have a vector of sums of
 * their own, if they fill two, and the rest are added one by one. Of weights [in, out]: TURNS chains, of which each takes
 * every fourth input. It is the same for any number of x. */
enum { VECTORS = 8, TURNS = 4 };

static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

static inline size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static inline size_t padded(size_t size) {
    return (size + PAD - 1) / PAD * PAD;
}

/* How x is laid out for a kernel: `pack` writes PAD values, those from `count` on being 0, in `bytes` bytes. */
typedef struct {
    void (*pack)(const float *values, size_t count, void *packed);
    size_t bytes;
} packing;

static inline void pack_plain(const float *values, size_t count, void *packed) {
    memset(packed, 0, PAD * sizeof *values);
    memcpy(packed, values, count * sizeof *values);
}

/* MXFP4: a power of two for every FP4_GROUP weights of a row, which each have a sign, two bits of exponent and one of
 * fraction. The power lies in a byte, as the exponent of a float32 does; see `from_e8m0`. Two weights share a byte, the
 * first one in its lower half. */
enum { FP4_GROUP = 32 };
static const float FP4_VALUES[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
/* The same as bfloat16: their lower bytes, then their upper ones. */
static const uint8_t FP4_BYTES[32] = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0, 0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0,
                                      0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};

static inline float from_e8m0(uint8_t exponent) {
    uint32_t bits = exponent == 0 ? 0x400000 : (uint32_t)exponent << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Weights of 4 bits: places in a table of whole numbers, two in a byte, the first one in its lower half. Those of INT4_GROUP
 * share a factor, a whole number of a byte times what a row has in common: a float16 UNIT_SCALE times as large, which lies
 * before the row's factors. codebook.py says what the numbers are. */
enum { INT4_GROUP = 16, UNIT_BYTES = 2 };
#define UNIT_SCALE 0x1p12f
#define INT4_NUMBERS -127, -89, -71, -55, -41, -28, -16, -5, 5, 16, 27, 39, 53, 69, 88, 110
static const int8_t INT4_BYTES[16] = {INT4_NUMBERS};
static const float INT4_VALUES[16] = {INT4_NUMBERS};

static inline size_t int4_factor_bytes(size_t width) {
    return UNIT_BYTES + (width + INT4_GROUP - 1) / INT4_GROUP;
}

static inline float unit_of(const uint8_t *factors) {
    uint16_t half;
    memcpy(&half, factors, sizeof half);
    return from_f16(half) / UNIT_SCALE;
}

/* float8 (e4m3fn): a sign, four bits of exponent, three of fraction; no infinities, all ones being NaN. Moved to where
 * float32 has them, its exponent is 120 too small. */
static inline float from_e4m3(uint8_t byte) {
    uint32_t bits = (uint32_t)(byte & 0x80) << 24 | (uint32_t)(byte & 0x7f) << 20;
    if ((byte & 0x7f) == 0x7f)
        bits |= 0x7fc00000;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value * 0x1p120f;
}

/* A float32 scale for every block of a weight in float8: of `rows` rows and FP8_BLOCK columns, or as many as there are
 * where they are fewer. */
enum { FP8_BLOCK = 128 };
typedef struct {
    const float *scales;
    size_t rows;
} fp8_blocks;

static inline const float *scales_of(const fp8_blocks *blocks, size_t row, size_t width) {
    return blocks->scales + row / blocks->rows * ((width + FP8_BLOCK - 1) / FP8_BLOCK);
}

/* bfloat16 of 12 bits (lossless.py): panels of so many rows, in which so many columns take so many bytes. These are first
 * the lower bytes of four columns, four for each row in PANEL_ORDER, then those of the other four columns, then a byte
 * for each row and place: two indices into a table of upper bytes, of the first four columns in the lower half. What
 * the table lacks are exceptions, in words: column, row of the panel (4 bits), upper byte; those of a panel stand
 * together by column, from begins[panel] on, and there are `room` at most. */
enum { PANEL_ROWS = 16, PANEL_INPUTS = 8, PANEL_BYTES = 192, TABLE_WORDS = 4, EXCEPTION_SHARE = 256 };
static const uint8_t PANEL_ORDER[4] = {0, 2, 1, 3};
typedef struct {
    const uint8_t *panels, *table;
    const uint32_t *begins, *exceptions;
    size_t room;
} lossless;

/* The weight [rows, width] of these two tensors. */
static inline lossless make_lossless(const void *panels, const void *uppers, size_t rows, size_t width) {
    const uint32_t *begins = (const uint32_t *)uppers + TABLE_WORDS;
    return (lossless){panels, uppers, begins, begins + rows / PANEL_ROWS + 1, rows * width / EXCEPTION_SHARE};
}

/* The end of a panel's exceptions, and where they begin. Damaged files have others than there is room for. */
static inline size_t find_exceptions(const lossless *w, size_t panel, size_t *begin) {
    size_t end = w->begins[panel + 1] < w->room ? w->begins[panel + 1] : w->room;
    *begin = w->begins[panel] < end ? w->begins[panel] : end;
    return end;
}

static inline size_t column_of(uint32_t exception) {
    return exception >> 12;
}

static inline size_t row_of(uint32_t exception) {
    return exception >> 8 & 15;
}

/* `dot_*`: out[r] = sum of w[r * width + i] x[i] for r < rows, i < width; x as the packing of that name lays it out.
 * dot_int8: weights are whole numbers of 8 bits; a group of 32 or 64 in a row has a common factor in float16 in `scales`,
 * and scales of a row stand together.
 * dot_int4: weights of 4 bits, rows beginning at whole bytes.
 * dot_mxfp4: `width` is a multiple of FP4_GROUP, and x laid out and added as by dot_bf16, so that the sums are those of
 * dot_bf16 with the weights that expand_mxfp4 writes, out[r * width + i]. `turn_mxfp4`: out[i * stride + r], for up to PAD
 * rows.
 * dot_fp8: likewise with the weights that expand_fp8 writes; w is all of a matrix, of which both take the rows from
 * `first` on. `width` is a multiple of FP8_BLOCK, or less than that.
 * dot_lossless: likewise with the weights that expand_lossless writes; rows are taken from `first` on, by fours in both.
 * `columns_*`: out[c] = sum of w[r * stride + c] x[r] for c < columns and the r of one chain; x is plain. Chains are of CHAIN
 * rows, or there are TURNS of them.
 * Sums are kept in float32, and their order depends on nothing but the sizes. */
typedef void dot_bytes(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, size_t rows,
                       const void *packed, float *out);

typedef void dot_nibbles(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out);

typedef void dot_blocks(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows,
                        const void *packed, float *out);

typedef void dot_packed(const lossless *w, size_t width, size_t first, size_t rows, const void *packed, float *out);

/* Any weight [rows, width] that has numbers of that kind (moe_weights) as they lie in a moe_layer: `scales` and `group`
 * are of use to packed ones, `group` being rows for float8. */
typedef struct {
    int kind;
    const void *numbers, *scales;
    size_t rows, width, group;
} matrix;

/* dot_bf16, dot_mxfp4, dot_fp8 or dot_lossless, whichever the matrix takes, with sums of `chain` inputs each that are then
 * added up, or with TURNS chains if that is MOE_IN_TURN. */
typedef void dot_matrix(const matrix *w, size_t first, size_t rows, int64_t chain, const void *packed, float *out);

/* Products with many x, which lie in tiles of TILE_ROWS at most, an even number; `bytes` is what one takes there. `pack` lays
 * `rows` x out in a tile, and 0 for those it lacks; `put` `count` numbers of one, from a multiple of BLOCK_OUTPUTS on.
 * `multiply`: sums[x * BLOCK_OUTPUTS + r] = sum of w[(first + r) * width + i] x[i] for r < outputs, i < width, and the x of
 * all tiles, in that order; there are BLOCK_OUTPUTS and BLOCK_ROWS at most. `order` is what torch's is for so many x, as far
 * as is known; NULL where there is but one. */
enum { TILE_ROWS = 24, BLOCK_ROWS = 4 * TILE_ROWS, BLOCK_OUTPUTS = 64 };
typedef struct {
    size_t (*bytes)(size_t width);
    void (*pack)(const uint16_t *const *x, size_t width, size_t rows, size_t tile, void *packed);
    void (*put)(const float *values, size_t first, size_t count, size_t width, size_t tile, size_t row, void *packed);
    void (*multiply)(const matrix *w, size_t first, size_t outputs, const moe_order *order, const void *packed,
                     size_t tile, size_t tiles, float *sums);
    moe_order (*order)(size_t x, size_t width);
} tiling;

static inline moe_order own_order(const tiling *tiles, size_t x, size_t width) {
    return tiles->order == NULL ? (moe_order){0} : tiles->order(x, width);
}

typedef void expand_bytes(const uint8_t *w, const uint16_t *scales, size_t width, size_t group, uint16_t *out);

typedef void expand_nibbles(const uint8_t *w, const uint8_t *scales, size_t start, size_t inputs, uint16_t *out);

typedef struct {
    const char *name;
    packing pairs, bytes, nibbles; /* for dot_bf16, _mxfp4, _fp8 and _lossless, dot_int8, dot_int4; x is plain for dot_f32 */
    void (*dot_bf16)(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out);
    void (*dot_f32)(const float *w, size_t width, size_t rows, const float *x, float *out);
    dot_bytes *dot_int8;
    dot_nibbles *dot_int4, *dot_mxfp4;
    expand_bytes *expand_int8; /* of one row, and of `inputs` in it from `start` on, a multiple of the group */
    expand_nibbles *expand_int4;
    void (*expand_mxfp4)(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, uint16_t *out);
    void (*turn_mxfp4)(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, size_t stride,
                       uint16_t *out);
    dot_blocks *dot_fp8;
    void (*expand_fp8)(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows,
                       uint16_t *out);
    dot_packed *dot_lossless;
    void (*expand_lossless)(const lossless *w, size_t width, size_t first, size_t rows, uint16_t *out);
    void (*columns_bf16)(const uint16_t *w, size_t stride, size_t columns, size_t rows, size_t chain, const float *x, float *out);
    void (*columns_f32)(const float *w, size_t stride, size_t columns, size_t rows, size_t chain, const float *x, float *out);
    bool takes_turns; /* columns_bf16 has TURNS chains */
    tiling tiles; /* of NULLs where there are no such loops */
    bool is_wide; /* the processor has what WIDE_TARGET allows */
    dot_matrix *dot_chains; /* NULL where they have but one order */
    uint64_t (*read)(const void *memory, size_t bytes);
} kernels;

/* As above, where the processor multiplies pairs of bfloat16 (dot_pairs.c, dot_mxfp4.c, dot_fp8.c, dot_lossless.c, tiles.c)
 * and bytes (dot_vnni.c). expand_lossless takes whole panels; write_lossless writes `inputs` columns of one, from `start`
 * on, as pairs with an output in each lane; write_mxfp4 and write_fp8 the same of 16 rows of theirs; put_lossless writes rows,
 * `stride` numbers apart. expand_part: inputs from `start` on
 * of one row of a weight that was released packed, as bfloat16. */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_DOT_PAIRS
void pack_pairs(const float *values, size_t count, void *packed);
void dot_pairs(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out);
void pack_vnni8(const float *values, size_t count, void *packed);
void pack_vnni4(const float *values, size_t count, void *packed);
dot_bytes dot_vnni8;
dot_nibbles dot_vnni4, dot_mxfp4;
dot_blocks dot_fp8;
dot_packed dot_lossless;
void expand_lossless(const lossless *w, size_t width, size_t first, size_t rows, uint16_t *out);
void write_lossless(const lossless *w, size_t panel, size_t width, size_t start, size_t inputs, void *words);
void write_mxfp4(const uint8_t *w, const uint8_t *scales, size_t width, size_t start, size_t inputs, void *words);
void write_fp8(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t start, size_t inputs,
               void *words);
void put_lossless(const lossless *w, size_t row, size_t rows, size_t width, size_t start, size_t inputs, uint16_t *out,
                  size_t stride);
void expand_part(const matrix *w, size_t row, size_t start, size_t inputs, uint16_t *out);

expand_bytes expand_int8_avx512;
expand_nibbles expand_int4_avx512;
size_t word_bytes(size_t width);
void pack_words(const uint16_t *const *x, size_t width, size_t rows, size_t tile, void *packed);
void put_words(const float *values, size_t first, size_t count, size_t width, size_t tile, size_t row, void *packed);
void multiply_tiles(const matrix *w, size_t first, size_t outputs, const moe_order *order, const void *packed,
                    size_t tile, size_t tiles, float *sums);
moe_order order_tiles(size_t x, size_t width);
enum { VNNI_BYTES = 384 }; /* of x for a vector of weights */
#endif

/* What avx2 has loops of its own for, in files of that name; the others are its in kernels.inc. put_rows_avx2: `inputs` of some
 * rows of any weight, from `start` on, where a group begins, as bfloat16, `stride` numbers apart; rows of lossless ones by fours.
 * dot_row_avx2: dot_bf16 of one row. */
#if defined(__x86_64__)
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
void put_rows_avx2(const matrix *w, size_t first, size_t rows, size_t start, size_t inputs, uint16_t *out, size_t stride);
void pack_int8_avx2(const float *values, size_t count, void *packed);
void pack_int4_avx2(const float *values, size_t count, void *packed);
dot_bytes dot_int8_avx2;
dot_nibbles dot_int4_avx2;
enum { EIGHTS_BYTES = 68, FOURS_BYTES = 192 }; /* of x for 32 weights, and for 64 */
expand_bytes expand_int8_avx2;
expand_nibbles expand_int4_avx2;
dot_packed dot_lossless_avx2;
void expand_mxfp4_avx2(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, uint16_t *out);
dot_nibbles dot_mxfp4_avx2;
dot_blocks dot_fp8_avx2;
void expand_fp8_avx2(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows, uint16_t *out);
void put_fp8_avx2(const uint8_t *row, const float *scales, size_t start, size_t inputs, uint16_t *out);
float dot_row_avx2(const uint16_t *w, size_t width, const void *packed);
dot_matrix dot_turns;
size_t tile_bytes_avx2(size_t width);
void pack_tile_avx2(const uint16_t *const *x, size_t width, size_t rows, size_t tile, void *packed);
void put_tile_avx2(const float *values, size_t first, size_t count, size_t width, size_t tile, size_t row, void *packed);
void multiply_avx2(const matrix *w, size_t first, size_t outputs, const moe_order *order, const void *packed, size_t tile,
                  size_t tiles, float *sums);
#else
#define AVX2_TARGET
#endif

/* Loops of many rows that have nothing to do with weights are compiled twice, for sets that have such products. */
#ifdef HAS_DOT_PAIRS
#define WIDE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define WIDE_TARGET
#endif

/* Likewise where it multiplies tiles of them (amx.c), which a process has to ask the system for: has_amx does. x is laid out
 * as for the others. */
#if defined(HAS_DOT_PAIRS) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 12)
#define HAS_DOT_AMX
bool has_amx(void);
void dot_amx(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out);
dot_nibbles dot_mxfp4_amx;
dot_blocks dot_fp8_amx;
dot_packed dot_lossless_amx;
dot_matrix dot_chains_amx;
void dot_lossless_chains(const lossless *w, size_t width, size_t first, size_t rows, size_t chain, const void *packed,
                         float *out);
#define ONE_CHAIN SIZE_MAX
void multiply_amx(const matrix *w, size_t first, size_t outputs, const moe_order *order, const void *packed,
                  size_t tile, size_t tiles, float *sums);
moe_order order_amx(size_t x, size_t width);
#endif

/* Likewise where a 64-bit ARM multiplies bytes (dot_neon.c). clang has the instruction in a function alone from 16 on. */
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#define HAS_DOT_NEON
void pack_neon8(const float *values, size_t count, void *packed);
void pack_neon4(const float *values, size_t count, void *packed);
dot_bytes dot_neon8;
dot_nibbles dot_neon4;
enum { NEON_BYTES = 68 }; /* of x for 32 weights */
#endif

enum { CHAIN = 512 }; /* inputs that are added up before their sum is added to others, as torch does it for one x */

expand_bytes expand_int8_plain;
expand_nibbles expand_int4_plain;

/* The set of that number, the one that every processor has being 0; NULL when the processor has no such set. */
const kernels *find_kernels(int number);

#endif
