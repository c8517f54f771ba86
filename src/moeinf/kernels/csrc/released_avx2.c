/* Weights that were released packed, where the processor has vectors of eight float32: expanded to bfloat16 a row or less at a
 * time, into memory that the nearest cache holds, and multiplied there as bfloat16 is. */
#include "avx2.h"

#if defined(__x86_64__)

#define TARGET AVX2_TARGET

/* MXFP4. A weight is looked up, and the power of its group added to its exponent, where that is within what bfloat16 has. */
enum { LEAST_POWER = 3, MOST_POWER = 250, ONE = 127 };

static void expand_group_slowly(const uint8_t *w, uint8_t scale, uint16_t *out) {
    for (int i = 0; i < FP4_GROUP; i++)
        out[i] = to_bf16(FP4_VALUES[i % 2 ? w[i / 2] >> 4 : w[i / 2] & 15] * from_e8m0(scale));
}

TARGET static inline void expand_group(const uint8_t *w, uint8_t scale, uint16_t *out) {
    const __m128i nibble = _mm_set1_epi8(15);
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)FP4_BYTES));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(FP4_BYTES + 16)));
    const __m256i zero = _mm256_setzero_si256(), power = _mm256_set1_epi16((int16_t)((scale - ONE) * 128));
    __m128i bytes = _mm_loadu_si128((const __m128i *)w);
    __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    __m256i places = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    __m256i low = _mm256_shuffle_epi8(lower, places), high = _mm256_shuffle_epi8(upper, places);
    __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    first = _mm256_add_epi16(first, _mm256_andnot_si256(_mm256_cmpeq_epi16(_mm256_slli_epi16(first, 1), zero), power));
    second = _mm256_add_epi16(second, _mm256_andnot_si256(_mm256_cmpeq_epi16(_mm256_slli_epi16(second, 1), zero), power));
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i *)(out + FP4_GROUP / 2), _mm256_permute2x128_si256(first, second, 0x31));
}

TARGET void expand_mxfp4_avx2(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, uint16_t *out) {
    for (size_t i = 0; i < rows * width; i += FP4_GROUP, scales++)
        if (*scales >= LEAST_POWER && *scales <= MOST_POWER)
            expand_group(w + i / 2, *scales, out + i);
        else
            expand_group_slowly(w + i / 2, *scales, out + i);
}

TARGET void dot_mxfp4_avx2(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    uint16_t row[width];
    for (size_t r = 0; r < rows; r++) {
        expand_mxfp4_avx2(w + r * width / 2, scales + r * (width / FP4_GROUP), width, 1, row);
        out[r] = dot_row_avx2(row, width, packed);
    }
}

/* float8. A weight is (1 + m/8) 2^(e - 7), or m/8 2^-6 where e is 0. Rounding does not depend on powers of two, so a block has
 * eight fractions times its scale, rounded, to whose exponent e is added, and eight numbers where it is 0: all found by one
 * look-up for each byte of a bfloat16. */
enum { AT_ONCE_BYTES = 32, SMALLEST = 1, LARGEST = 254 - 14, NAN_BYTE = 0x7f };

/* Of the bfloat16 that numbers of a block become: lower and upper bytes, by m, and by 8 + m where e is 0. */
typedef struct {
    uint8_t lower[16], upper[16];
    bool holds; /* all numbers are normal ones with the scale */
} tables;

static tables make_tables(float scale) {
    tables made = {.holds = scale > 0};
    for (int m = 0; m < 8; m++) {
        uint16_t normal = to_bf16((1 + (float)m / 8) * 0x1p-6f * scale), small = to_bf16((float)m * 0x1p-9f * scale);
        made.lower[m] = (uint8_t)normal;
        made.upper[m] = (uint8_t)(normal >> 8);
        made.lower[8 + m] = (uint8_t)small;
        made.upper[8 + m] = (uint8_t)(small >> 8);
        made.holds = made.holds && normal >> 7 >= SMALLEST && normal >> 7 <= LARGEST;
    }
    return made;
}

static void expand_slowly(const uint8_t *w, float scale, size_t count, uint16_t *out) {
    for (size_t i = 0; i < count; i++)
        out[i] = to_bf16(from_e4m3(w[i]) * scale);
}

/* Weights of one block. */
TARGET static void expand_block(const uint8_t *w, const tables *tables, float scale, size_t count, uint16_t *out) {
    const __m256i fraction = _mm256_set1_epi8(7), exponent = _mm256_set1_epi8(0x78), sign = _mm256_set1_epi8((char)0x80);
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tables->lower));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tables->upper));
    const __m256i nan = _mm256_set1_epi8(NAN_BYTE), one = _mm256_set1_epi8(8), zero = _mm256_setzero_si256();
    size_t i = 0;
    for (; tables->holds && i + AT_ONCE_BYTES <= count; i += AT_ONCE_BYTES) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + i));
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, nan), nan))) {
            expand_slowly(w + i, scale, AT_ONCE_BYTES, out + i);
            continue;
        }
        __m256i e = _mm256_and_si256(bytes, exponent), is_small = _mm256_and_si256(_mm256_cmpeq_epi8(e, zero), one);
        __m256i place = _mm256_or_si256(_mm256_and_si256(bytes, fraction), is_small);
        __m256i low = _mm256_shuffle_epi8(lower, place);
        __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(upper, place), _mm256_and_si256(bytes, sign));
        e = _mm256_subs_epu8(e, one); /* the table's numbers have the first exponent */
        __m256i first = _mm256_add_epi16(_mm256_unpacklo_epi8(low, high), _mm256_srli_epi16(_mm256_unpacklo_epi8(zero, e), 4));
        __m256i second = _mm256_add_epi16(_mm256_unpackhi_epi8(low, high), _mm256_srli_epi16(_mm256_unpackhi_epi8(zero, e), 4));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i *)(out + i + AT_ONCE_BYTES / 2), _mm256_permute2x128_si256(first, second, 0x31));
    }
    expand_slowly(w + i, scale, count - i, out + i);
}

TARGET void put_fp8_avx2(const uint8_t *row, const float *scales, size_t start, size_t inputs, uint16_t *out) {
    for (size_t i = start; i < start + inputs;) {
        size_t count = smaller(start + inputs - i, FP8_BLOCK - i % FP8_BLOCK);
        tables tables = make_tables(scales[i / FP8_BLOCK]);
        expand_block(row + i, &tables, scales[i / FP8_BLOCK], count, out + i - start);
        i += count;
    }
}

void expand_fp8_avx2(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows, uint16_t *out) {
    for (size_t r = first; r < first + rows; r++, out += width)
        put_fp8_avx2(w + r * width, scales_of(blocks, r, width), 0, width, out);
}

TARGET void dot_fp8_avx2(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows, const void *packed,
                        float *out) {
    size_t count = ceil_div(width, FP8_BLOCK);
    tables all[count];
    const float *scales = NULL;
    uint16_t row[width];
    for (size_t r = 0; r < rows; r++) {
        const float *mine = scales_of(blocks, first + r, width);
        if (mine != scales)
            for (size_t b = 0; b < count; b++)
                all[b] = make_tables(mine[b]);
        scales = mine;
        for (size_t b = 0; b < count; b++) {
            size_t i = b * FP8_BLOCK;
            expand_block(w + (first + r) * width + i, &all[b], scales[b], smaller(FP8_BLOCK, width - i), row + i);
        }
        out[r] = dot_row_avx2(row, width, packed);
    }
}

#endif
