/* Products of bfloat16 in the very order in which torch adds them up where a processor has AMX: by the instruction that
 * oneDNN takes there. It adds 32 products to a sum at a time, the 16 even and the 16 odd ones each in a chain of its own
 * from 0 on, then both; numbers too small to be normal are 0.
 *
 * A tile of 16 rows of weights is loaded as they lie in memory; what they are multiplied with lies in words of two inputs,
 * as tiles.c packs it. For one x weights that were released packed are unpacked into such words, and multiplied the other way
 * round (lossless ones are dot_lossless.c's); for many they are expanded to rows of bfloat16 first. */
#define _GNU_SOURCE /* syscall */
#include "pairs.h"

#ifdef HAS_DOT_AMX

#include <cpuid.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw")))

enum { WORD = 4, AHEAD = 4 * STEP };
enum { BF16_BIT = 1 << 22, TILE_BIT = 1 << 24 }; /* of EDX, in leaf 7 of cpuid */
enum { REQUEST_STATE = 0x1023, TILE_STATE = 18 }; /* ARCH_REQ_XCOMP_PERM and the data of tiles, of asm/prctl.h */

/* What a processor is told of its eight tiles: their rows, and the bytes of each. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

bool has_amx(void) {
    unsigned a, b, c, d = 0, both = BF16_BIT | TILE_BIT;
    bool has_both = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & both) == both;
    return has_both && syscall(SYS_arch_prctl, REQUEST_STATE, TILE_STATE) == 0;
}

/* Not every compiler knows that an instruction which loads a tile reads memory: what is written before has to be there. */
#define WRITTEN() __asm__ volatile("" ::: "memory")

/* oneDNN, in the same thread, may count on the shapes that it set. */
#define BEGIN(shapes_of_this)                                                                                          \
    shapes before;                                                                                                     \
    _tile_storeconfig(&before);                                                                                        \
    _tile_loadconfig(&(shapes_of_this))
#define END() _tile_loadconfig(&before)

/* Up to 16 rows of any weight, and DEPTH inputs from `start` on, `stride` bytes apart; what lies behind is 0, up to a whole
 * step. `room` is for those that do not lie so in memory. */
TARGET static const char *rows_of(const matrix *w, size_t row, size_t rows, size_t start, size_t inputs,
                                  uint16_t room[ROWS][DEPTH], size_t *stride) {
    const char *plain = (const char *)w->numbers + (row * w->width + start) * sizeof(uint16_t);
    if (w->kind == MOE_PLAIN && rows == ROWS && inputs % STEP == 0) {
        *stride = w->width * sizeof(uint16_t);
        return plain;
    }
    *stride = sizeof room[0];
    if (rows < ROWS || inputs % STEP != 0)
        memset(room, 0, ROWS * sizeof room[0]);
    if (w->kind == MOE_LOSSLESS) {
        lossless packed = make_lossless(w->numbers, w->scales, w->rows, w->width);
        put_lossless(&packed, row, rows, w->width, start, inputs, room[0], DEPTH);
        return (const char *)room;
    }
    for (size_t r = 0; r < rows; r++)
        if (w->kind == MOE_PLAIN)
            memcpy(room[r], plain + r * w->width * sizeof(uint16_t), inputs * sizeof(uint16_t));
        else
            expand_part(w, row + r, start, inputs, room[r]);
    return (const char *)room;
}

/* Asks memory for what 32 rows read AHEAD inputs later, of the next 32 where these end. A tile is loaded from 16 places, which
 * the processor does not guess. */
static inline void fetch_ahead(const matrix *w, size_t row, size_t input) {
    size_t stride = w->width * sizeof(uint16_t), at = input + AHEAD;
    if (at >= w->width) {
        row += 2 * ROWS;
        at -= w->width;
    }
    const char *from = (const char *)w->numbers + row * stride + at * sizeof(uint16_t);
    for (size_t r = 0; r < 2 * ROWS; r++)
        _mm_prefetch(from + r * stride, _MM_HINT_T0);
}

/* Adds the sums of a chain, tiles 0 and 1, to those of the chains before it. */
TARGET static inline void end_chains(float sums[2 * ROWS]) {
    float chains[2 * ROWS];
    _tile_stored(0, chains, WORD);
    _tile_stored(1, chains + ROWS, WORD);
    _tile_zero(0);
    _tile_zero(1);
    for (size_t r = 0; r < 2 * ROWS; r++)
        sums[r] += chains[r];
}

/* One x, which is followed by zeros. Tiles: 0 and 1 are the sums of 16 rows each, 2 and 3 the rows, 4 the x. */
TARGET static void dot_any(const matrix *w, size_t first, size_t rows, size_t chain, const uint16_t *x, float *out) {
    static const shapes SHAPES = {
        .palette = 1,
        .bytes = {WORD, WORD, LINE_BYTES, LINE_BYTES, WORD},
        .rows = {ROWS, ROWS, ROWS, ROWS, ROWS},
    };
    uint16_t room[2][ROWS][DEPTH];
    BEGIN(SHAPES);
    for (size_t r = 0; r < rows; r += 2 * ROWS) {
        size_t left = rows - r, some = left < ROWS ? left : ROWS, more = left - some < ROWS ? left - some : ROWS;
        size_t of_chain = chain;
        float sums[2 * ROWS] = {0};
        _tile_zero(0);
        _tile_zero(1);
        for (size_t start = 0; start < w->width; start += DEPTH) {
            size_t inputs = w->width - start < DEPTH ? w->width - start : DEPTH, stride, other = 0;
            const char *a = rows_of(w, first + r, some, start, inputs, room[0], &stride), *b = NULL;
            if (more > 0)
                b = rows_of(w, first + r + ROWS, more, start, inputs, room[1], &other);
            WRITTEN();
            for (size_t i = 0; i < inputs; i += STEP) {
                if (w->kind == MOE_PLAIN)
                    fetch_ahead(w, first + r, start + i);
                _tile_loadd(4, x + start + i, WORD);
                _tile_loadd(2, a + i * sizeof *x, stride);
                _tile_dpbf16ps(0, 2, 4);
                if (b != NULL) {
                    _tile_loadd(3, b + i * sizeof *x, other);
                    _tile_dpbf16ps(1, 3, 4);
                }
                if ((of_chain -= STEP) == 0) {
                    end_chains(sums);
                    of_chain = chain;
                }
            }
        }
        end_chains(sums);
        memcpy(out + r, sums, (some + more) * sizeof *out);
    }
    END();
}

void dot_amx(const uint16_t *w, size_t width, size_t rows, const void *packed, float *out) {
    matrix plain = {.kind = MOE_PLAIN, .numbers = w, .rows = rows, .width = width};
    dot_any(&plain, 0, rows, ONE_CHAIN, packed, out);
}

/* Words of 16 rows, which an x is multiplied with from the left. Tiles: 0 is the rows' sums, 1 a step of the x, 2 of the words. */
#define BEGIN_WORDS()                                                                                                  \
    static const shapes SHAPES = {                                                                                     \
        .palette = 1,                                                                                                  \
        .bytes = {LINE_BYTES, LINE_BYTES, LINE_BYTES},                                                                 \
        .rows = {1, 1, ROWS},                                                                                          \
    };                                                                                                                 \
    BEGIN(SHAPES)

/* Sums of 16 rows: those of the chains that have ended, and the inputs that are left of the one in tile 0. */
typedef struct {
    __m512 ended;
    size_t chain, left;
} word_sums;

TARGET static inline void end_word_chain(word_sums *sums) {
    float chain[ROWS];
    _tile_stored(0, chain, LINE_BYTES);
    _tile_zero(0);
    sums->ended = _mm512_add_ps(sums->ended, _mm512_loadu_ps(chain));
    sums->left = sums->chain;
}

TARGET static inline void add_words(__m512i *words, size_t inputs, const uint16_t *x, word_sums *sums) {
    if (inputs % STEP != 0)
        memset(words + (inputs + 1) / 2, 0, (STEP - inputs % STEP) / 2 * sizeof *words);
    WRITTEN();
    for (size_t i = 0; i < inputs; i += STEP) {
        _tile_loadd(1, x + i, LINE_BYTES);
        _tile_loadd(2, words + i / 2, LINE_BYTES);
        _tile_dpbf16ps(0, 1, 2);
        if ((sums->left -= STEP) == 0)
            end_word_chain(sums);
    }
}

/* Whole sixteens of rows of a weight that was released packed. */
TARGET static void dot_sixteens(const matrix *w, size_t first, size_t rows, size_t chain, const uint16_t *x, float *out) {
    const fp8_blocks blocks = {w->scales, w->group};
    size_t width = w->width;
    __m512i words[DEPTH / 2];
    BEGIN_WORDS();
    for (size_t r = 0; r < rows; r += ROWS) {
        size_t at = (first + r) * width;
        word_sums sums = {_mm512_setzero_ps(), chain, chain};
        _tile_zero(0);
        for (size_t start = 0; start < width; start += DEPTH) {
            size_t inputs = width - start < DEPTH ? width - start : DEPTH;
            if (w->kind == MOE_MXFP4)
                write_mxfp4((const uint8_t *)w->numbers + at / 2, (const uint8_t *)w->scales + at / FP4_GROUP, width, start,
                            inputs, words);
            else
                write_fp8(w->numbers, &blocks, width, first + r, start, inputs, words);
            add_words(words, inputs, x + start, &sums);
        }
        end_word_chain(&sums);
        _mm512_storeu_ps(out + r, sums.ended);
    }
    END();
}

static void dot_released(const matrix *w, size_t first, size_t rows, size_t chain, const uint16_t *x, float *out) {
    size_t whole = rows / ROWS * ROWS;
    dot_sixteens(w, first, whole, chain, x, out);
    dot_any(w, first + whole, rows - whole, chain, x, out + whole);
}

void dot_mxfp4_amx(const uint8_t *w, const uint8_t *scales, size_t width, size_t rows, const void *packed, float *out) {
    matrix released = {.kind = MOE_MXFP4, .numbers = w, .scales = scales, .rows = rows, .width = width};
    dot_released(&released, 0, rows, ONE_CHAIN, packed, out);
}

void dot_fp8_amx(const uint8_t *w, const fp8_blocks *blocks, size_t width, size_t first, size_t rows, const void *packed,
                 float *out) {
    matrix released = {.kind = MOE_FP8, .numbers = w, .scales = blocks->scales, .width = width, .group = blocks->rows};
    dot_released(&released, first, rows, ONE_CHAIN, packed, out);
}

void dot_chains_amx(const matrix *w, size_t first, size_t rows, int64_t chain, const void *packed, float *out) {
    if (w->kind == MOE_PLAIN) {
        dot_any(w, first, rows, (size_t)chain, packed, out);
    } else if (w->kind == MOE_LOSSLESS) {
        lossless panels = make_lossless(w->numbers, w->scales, w->rows, w->width);
        dot_lossless_chains(&panels, w->width, first, rows, (size_t)chain, packed, out);
    } else
        dot_released(w, first, rows, (size_t)chain, packed, out);
}

/* Up to 32 rows of a weight, the second half being NULL where there are 16 or fewer, and the x of a tile. */
typedef struct {
    const char *a, *b;
    size_t strides[2];
    size_t tile; /* x of a tile, more than 16 if it `is_wide` */
    bool is_wide;
} halves;

enum { APART = BLOCK_ROWS * sizeof(float) }; /* of the sums of one row and the next */

/* Tiles: 0 to 3 are the sums of 16 rows each with the x of a tile's first and second part, 4 and 5 the rows, 6 and 7 the x. */
TARGET static inline void begin_sums(const halves *of, const float *sums, bool is_first) {
    _tile_zero(0);
    _tile_zero(2);
    if (of->is_wide) {
        _tile_zero(1);
        _tile_zero(3);
    }
    if (is_first)
        return;
    _tile_loadd(0, sums, APART);
    if (of->is_wide)
        _tile_loadd(1, sums + ROWS, APART);
    if (of->b != NULL)
        _tile_loadd(2, sums + ROWS * BLOCK_ROWS, APART);
    if (of->b != NULL && of->is_wide)
        _tile_loadd(3, sums + ROWS * BLOCK_ROWS + ROWS, APART);
}

TARGET static inline void end_sums(const halves *of, float *sums) {
    _tile_stored(0, sums, APART);
    if (of->is_wide)
        _tile_stored(1, sums + ROWS, APART);
    if (of->b != NULL)
        _tile_stored(2, sums + ROWS * BLOCK_ROWS, APART);
    if (of->b != NULL && of->is_wide)
        _tile_stored(3, sums + ROWS * BLOCK_ROWS + ROWS, APART);
}

/* Adds inputs `i` and some that follow, of which the words `x` are. */
TARGET static inline void multiply_step(const halves *of, size_t i, const uint32_t *x) {
    size_t apart = of->tile * WORD;
    _tile_loadd(4, of->a + i * sizeof(uint16_t), of->strides[0]);
    _tile_loadd(6, x, apart);
    _tile_dpbf16ps(0, 4, 6);
    if (of->is_wide) {
        _tile_loadd(7, x + ROWS, apart);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (of->b != NULL) {
        _tile_loadd(5, of->b + i * sizeof(uint16_t), of->strides[1]);
        _tile_dpbf16ps(2, 5, 6);
        if (of->is_wide)
            _tile_dpbf16ps(3, 5, 7);
    }
}

/* Adds those from `i` to before `end`; the last ones, if they are no whole step, are followed by zeros among the rows. */
TARGET static inline void multiply_steps(const halves *of, size_t i, size_t end, size_t step, const uint32_t *x) {
    WRITTEN();
    for (; i + step <= end; i += step, x += step / 2 * of->tile)
        multiply_step(of, i, x);
    if (i < end) {
        uint32_t rest[STEP / 2 * TILE_ROWS] = {0};
        memcpy(rest, x, (end - i + 1) / 2 * of->tile * WORD);
        WRITTEN();
        multiply_step(of, i, rest);
    }
}

/* Sums of a block's outputs with all of its x. */
typedef float block_sums[BLOCK_OUTPUTS][BLOCK_ROWS];

/* What becomes of sums: those of the chain of now, of the chains of a share, and of shares. */
typedef struct {
    block_sums chain, share, all;
} levels;

/* Up to 32 outputs' chains, from `first` on, with the x of a tile ended before input `end`. */
TARGET static void end_chain(levels *sums, const moe_order *order, size_t end, bool is_last, size_t first, size_t from,
                             size_t tile) {
    size_t chain = (size_t)order->chain, share = (size_t)order->share, begin = (end - 1) / chain * chain;
    bool begins_share = begin % share == 0, is_first_share = begin < share, ends_share = is_last || end % share == 0;
    for (size_t i = first; i < first + 2 * ROWS; i++) {
        float *chains = sums->chain[i] + from, *shares = sums->share[i] + from, *all = sums->all[i] + from;
        for (size_t r = 0; r < tile; r++)
            shares[r] = begins_share ? chains[r] : shares[r] + chains[r];
        for (size_t r = 0; r < tile && ends_share; r++)
            all[r] = is_first_share ? shares[r] : all[r] + shares[r];
    }
}

/* Up to 32 x, or 448 inputs (docs/experiments.md); orders.py finds others. The steps of several x are of equal length if that
 * takes no more of them. */
moe_order order_amx(size_t x, size_t width) {
    size_t steps = ceil_div(width, STEP);
    return (moe_order){INT64_MAX, INT64_MAX, x > 1 && width % (2 * steps) == 0 ? (int64_t)(width / steps) : STEP};
}

TARGET void multiply_amx(const matrix *w, size_t first_row, size_t outputs, const moe_order *order, const void *packed,
                         size_t tile, size_t tiles, float *sums) {
    const uint32_t *x = packed;
    if (w->kind == MOE_INT8 || w->kind == MOE_INT4) {
        multiply_tiles(w, first_row, outputs, order, x, tile, tiles, sums);
        return;
    }
    size_t width = w->width, tile_words = (width + 1) / 2 * tile;
    size_t chain = (size_t)order->chain, step = (size_t)order->step;
    halves of = {.tile = tile, .is_wide = tile > ROWS};
    uint16_t one = (uint16_t)(smaller(tile, ROWS) * WORD), two = (uint16_t)(tile * WORD - one);
    uint16_t inputs_of = (uint16_t)(step * sizeof(uint16_t));
    uint8_t words = (uint8_t)(step / 2), more = of.is_wide ? ROWS : 0;
    shapes shapes_of = {
        .palette = 1,
        .bytes = {one, two, one, two, inputs_of, inputs_of, one, two},
        .rows = {ROWS, more, ROWS, more, ROWS, ROWS, words, of.is_wide ? words : 0},
    };
    bool is_cut = chain < width;
    levels all;
    uint16_t room[2][ROWS][DEPTH];
    BEGIN(shapes_of);
    for (size_t start = 0; start < width; start += DEPTH) {
        size_t inputs = smaller(width - start, DEPTH);
        for (size_t first = 0; first < outputs; first += 2 * ROWS) {
            size_t row = first_row + first, left = outputs - first;
            of.a = rows_of(w, row, smaller(left, ROWS), start, inputs, room[0], &of.strides[0]);
            of.b = NULL;
            if (left > ROWS)
                of.b = rows_of(w, row + ROWS, smaller(left - ROWS, ROWS), start, inputs, room[1], &of.strides[1]);
            for (size_t t = 0; t < tiles; t++)
                for (size_t at = start, end; at < start + inputs; at = end) {
                    end = smaller(start + inputs, at - at % chain + chain);
                    begin_sums(&of, all.chain[first] + t * tile, at % chain == 0);
                    multiply_steps(&of, at - start, end - start, step, x + t * tile_words + at / 2 * tile);
                    end_sums(&of, all.chain[first] + t * tile);
                    if (is_cut && (end == width || end % chain == 0))
                        end_chain(&all, order, end, end == width, first, t * tile, tile);
                }
        }
    }
    END();
    block_sums *result = is_cut ? &all.all : &all.chain;
    for (size_t r = 0; r < tiles * tile; r++)
        for (size_t i = 0; i < outputs; i++)
            sums[r * BLOCK_OUTPUTS + i] = (*result)[i][r];
}

#endif
