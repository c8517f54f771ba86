/* The maths of experts, in C: what torch_maths.py computes, rounded where torch rounds. And, at the end,
 * what needs no pool: the loops of the routing memory, the packing of lossless weights, and the reading of files.
 *
 * A caller opens a pool of threads once, describes each layer in a `moe_layer`, and per step calls `moe_experts` for
 * the experts that are in memory, as often as more arrive, then `moe_sum`. One thread at a time may use a pool. */
#ifndef MOE_H
#define MOE_H

#include <stddef.h>
#include <stdint.h>

#define MOE_API __attribute__((visibility("default")))

enum moe_dtype { MOE_F32, MOE_BF16 };

enum moe_activation { MOE_SILU, MOE_GELU, MOE_GELU_TANH, MOE_RELU2 };

/* Weights are of the layer's dtype, or numbers with a factor for each group of them within a row: of 8 bits, with factors in
 * float16; or of 4 bits, in groups of 16, with what kernels.h says; two are in a byte, the first one in its lower half. Such
 * weights are [out, in]; rows begin at whole bytes. MXFP4 is numbers of 4 bits in groups of 32, with a power of two (a byte)
 * for each; the layer is of bfloat16, and its
 * widths are multiples of 32. float8 (e4m3fn) has a scale (float32) for every block of so many rows and 128 columns, or
 * as many as there are where they are fewer; the layer is of bfloat16, and its widths are multiples of 128, or less.
 * Lossless weights are bfloat16 in panels, with their upper bytes instead of scales (lossless.py); rows of a matrix are a
 * multiple of 16, and widths of 8. */
enum moe_weights { MOE_PLAIN, MOE_INT8, MOE_INT4, MOE_MXFP4, MOE_FP8, MOE_LOSSLESS };

/* What becomes of gate g and up u, a being the activation:
 *   NONE     a(u); there is no gate
 *   PRODUCT  a(g) u
 *   CLAMPED  a(min(g, limit)) clamp(u, limit)
 *   SIGMOID  g' sigmoid(alpha g') (u' + 1), g' and u' being clamped as before
 * In bfloat16 all that is made of g, or of u where there is no gate, is looked up in a table. */
enum moe_gate { MOE_NONE, MOE_PRODUCT, MOE_CLAMPED, MOE_SIGMOID };

/* The experts of one layer: what they look like and where their tensors lie, in bytes from the start of an expert;
 * -1 stands for a bias that there is not. */
typedef struct {
    int32_t dtype;          /* of biases and hidden states, and of plain weights */
    int32_t weights;
    int32_t group;          /* 32 or 64; of use to MOE_INT8 alone */
    int32_t gate;
    int32_t activation;     /* of use to float32 alone, as alpha is */
    int32_t is_transposed;  /* weights are [in, out] */
    int32_t is_interleaved; /* gates and ups alternate, else all gates come first */
    float limit, alpha;
    int64_t hidden, inner;  /* widths */
    int64_t up, up_scales, up_bias, down, down_scales, down_bias;
    int64_t up_block, down_block; /* rows that share a scale; of use to float8 alone */
    int64_t up_chain, down_chain; /* of the order for one x (moe_order); 0 for the one that the set of instructions has */
    /* Of each of the 65,536 bfloat16, as bfloat16: the factor that the gate makes, of one x and of several, since torch may
     * compute those in another way. */
    const uint16_t *values, *values_of_several;
} moe_layer;

typedef struct moe_pool moe_pool;

/* Changes whenever anything in this file does, so that nobody calls a library that was built from another one. */
enum { MOE_INTERFACE = 24 };
MOE_API int moe_interface(void);

/* The instruction sets that this processor can run, by number from 0, the best one last; NULL past the last. */
MOE_API const char *moe_variant(int number);

/* A pool that computes on `threads` threads, the caller being one of them. NULL when memory or threads are lacking. */
MOE_API moe_pool *moe_open(int threads, int variant);
MOE_API void moe_close(moe_pool *pool);

/* Computes `count` experts on one token. experts[i] is where an expert's tensors begin and places[i] its number among
 * the token's choices: its share is weights[places[i]], and rows + places[i] * layer->hidden receives its weighted row,
 * rounded to row_dtype. 0, -1 when memory is lacking, -2 where chains are asked for that the set of instructions has not. */
MOE_API int moe_experts(moe_pool *pool, const moe_layer *layer, int count, const void *const *experts,
                        const int32_t *places, const void *hidden, const float *weights, int row_dtype, float *rows);

/* Adds up `count` rows in the order of `places`, rounding each sum to sum_dtype; output is of the layer's dtype. */
MOE_API void moe_sum(const moe_layer *layer, int count, const int32_t *places, const float *rows, int sum_dtype,
                     void *output);

/* In which order the inputs of a product are added up: sums of `chain` inputs each within every `share` of them, and then
 * the sums of shares; both are multiples of `step`, of which one instruction adds up so many where it adds up more than two.
 * Chains of 0 stand for the order that the set of instructions has by itself, those of MOE_IN_TURN for four chains that take
 * inputs in turn, which avx2 alone has. */
enum { MOE_IN_TURN = -1 };
typedef struct {
    int64_t chain, share, step;
} moe_order;

/* Computes `count` experts on many tokens, of which expert i has those of tokens[begins[i]] to tokens[ends[i] - 1], one or more
 * rows of `hidden`: rows[begins[i]] and so on, of sum_dtype, receive its rows times weights[begins[i]] and so on, rounded to
 * row_dtype first. Products of expert i have the orders[2 * i], up, and orders[2 * i + 1], down; all their own without
 * `orders`. 0, -1 when memory is lacking, -2 where it is not compiled in or not for such a layer: float32, [in, out]. */
MOE_API int moe_prompt(moe_pool *pool, const moe_layer *layer, int count, const void *const *experts,
                       const int64_t *begins, const int64_t *ends, const moe_order *orders, const int64_t *tokens,
                       const float *weights, const void *hidden, int row_dtype, int sum_dtype, void *rows);

/* Adds `count` rows to those of `total` that `tokens` names, one after the other, rounding each sum; both of that dtype and
 * `width` wide. */
MOE_API void moe_add(moe_pool *pool, int dtype, int64_t width, int64_t count, const int64_t *tokens, const void *rows,
                     void *total);

/* The activation by itself, on `count` outputs of the up projection, as a layer of that width holds them. */
MOE_API void moe_activate(const moe_layer *layer, const float *projected, float *inner);

/* Expands MXFP4, [rows, width], to bfloat16: [rows, width], or [width, rows] if is_transposed. `width` is a multiple of
 * 32. */
MOE_API void moe_expand(moe_pool *pool, const void *weights, const void *scales, int64_t rows, int64_t width,
                        int is_transposed, void *output);

/* Expands float8 in blocks of so many rows, [rows, width], to bfloat16, [rows, width]. `width` is as in a layer. */
MOE_API void moe_expand_fp8(moe_pool *pool, int64_t block, const void *weights, const void *scales, int64_t rows,
                            int64_t width, void *output);

/* Expands weights of that kind, MOE_INT8 or MOE_INT4, [rows, width], to bfloat16, [rows, width]. */
MOE_API void moe_expand_int(moe_pool *pool, int kind, int64_t group, const void *weights, const void *scales,
                            int64_t rows, int64_t width, void *output);

/* Expands `count` rows of a lossless weight [rows, width] to bfloat16, [count, width], from row `first` on: whole panels. */
MOE_API void moe_expand_lossless(moe_pool *pool, const void *panels, const void *uppers, int64_t rows, int64_t width,
                                 int64_t first, int64_t count, void *output);

/* A linear layer in bfloat16: weight is [outputs, inputs], with `uppers` a lossless one, and bias [outputs] or NULL. Of the
 * order nothing but chains is of use to one x. */
typedef struct {
    int64_t inputs, outputs;
    const void *weight, *bias, *uppers;
    moe_order order;
} moe_linear_layer;

/* The layer's outputs for `count` x. 0, -1 when memory is lacking, -2 where more than one x is not compiled in, or chains of
 * one are not. */
MOE_API int moe_linear(moe_pool *pool, const moe_linear_layer *layer, int64_t count, const void *x, void *output);

/* A gated MLP of the dense part in bfloat16: down (a(gate x) * up x), a being the activation; all is rounded after each step. */
typedef struct {
    const moe_linear_layer *gate, *up, *down;
    const uint16_t *values; /* what the activation makes of each of the 65,536 bfloat16, as bfloat16 */
    void *inner;            /* memory for what gate and up make */
} moe_mlp_layer;

/* The MLP's output for one x, which may be where x is. 0, -1 when memory is lacking. */
MOE_API int moe_mlp(moe_pool *pool, const moe_mlp_layer *layer, const void *x, void *output);

/* A root-mean-square norm of the dense part in bfloat16, weight being [size]: x / sqrt(mean(x²) + epsilon), rounded or
 * not, times weight, or times one more than that. */
typedef struct {
    int64_t size;
    float epsilon;
    int32_t rounds_first, adds_one;
    const void *weight;
} moe_norm_layer;

/* The norm of `count` rows of x, one after the other; `output` may be x. 0, or -1 when memory is lacking. */
MOE_API int moe_norm(moe_pool *pool, const moe_norm_layer *layer, int count, const void *x, void *output);

/* Attention of one token in bfloat16: query is [heads, size] and output [heads, value_size], keys and values are `tokens` rows of
 * these sizes for each of kv_heads, so many numbers apart; heads that follow each other share a KV head. Sizes are multiples of
 * 16. Where they differ, `scale` is the root of the scale, and exponentials are added up in vectors of `lanes`, 8 or 16. */
typedef struct {
    int64_t heads, kv_heads, size, value_size, tokens;
    int64_t key_head, key_token, value_head, value_token;
    const void *query, *keys, *values;
    float scale;
    int32_t lanes;
} moe_attention;

/* The sum of values, weighed by softmax(scale * query * key). Others than this take values of the keys' size. 0, -1 when memory is lacking, -2 where it is not compiled
 * in. */
MOE_API int moe_attend(moe_pool *pool, const moe_attention *what, void *output);

/* The same where each head has a sink, [heads] in bfloat16: a logit that takes its share of the softmax, and has no value. All is
 * rounded to bfloat16 after each step: products, scores, what they are less the largest, chances. Exponentials are added up in
 * vectors of `lanes`, 8 or 16. Rows of a head follow each other, and query is [heads, queries, size], output [queries, heads,
 * size]; query i sees the tokens from begins[i] to before ends[i]. */
MOE_API int moe_attend_with_sinks(moe_pool *pool, const moe_attention *what, const void *sinks, int32_t lanes, int64_t queries,
                                  const int64_t *begins, const int64_t *ends, void *output);

/* Softmax of `rows` of `count` numbers of that dtype, in place, as these take it: in bfloat16 the one with sinks. 0, or -2 for more
 * than 1024 numbers of bfloat16. */
MOE_API int moe_soften(int dtype, int64_t rows, int64_t count, int32_t lanes, void *x);

/* Rotary embedding in bfloat16 of `count` heads of x, one after the other: the halves of a head, [size], are turned by
 * the angles whose cosines and sines are given, [size] too; products are rounded before they are added. `output` may be x. */
MOE_API void moe_rotate(int count, int64_t size, const void *x, const void *cosines, const void *sines, void *output);

/* The gated delta rule for one token: a state [keys, values] in float32 per head, which decays, is corrected by what the key
 * finds in it, and gives what the query finds then. `heads` share `key_heads` queries and keys, some that follow each other
 * each; these are multiplied by one over their norm, and queries divided by `root`. */
typedef struct {
    int64_t key_heads, heads, keys, values;
    float root, epsilon;
} moe_delta_rule_layer;

/* query and key are [key_heads, keys], value and output [heads, values] in bfloat16, beta [heads] too; decay is [heads] in float32.
 * `next` may be `state`. 0, or -1 when memory is lacking. */
MOE_API int moe_delta_rule(moe_pool *pool, const moe_delta_rule_layer *layer, const void *query, const void *key, const void *value,
                           const float *decay, const void *beta, const float *state, float *next, void *output);

/* All of a layer's attention for one token: queries, keys and values of x; norms of queries and keys, of a head or of all
 * together, or none (NULL); of every head the first `turned` numbers turned; attention, the token itself included; and the
 * output's projection. */
typedef struct {
    int64_t turned;
    const moe_linear_layer *query, *key, *value, *output;
    const moe_norm_layer *query_norm, *key_norm;
} moe_self_attention;

/* `what` has the cache and its shape; it gets the token's keys and values, as the last of `tokens`. `between` is memory for
 * two queries, a key and a value of all heads, and begins with the queries afterwards: with an `output` that is NULL that is
 * all, and attending is left to the caller. Returns what moe_attend returns. */
MOE_API int moe_self_attend(moe_pool *pool, const moe_self_attention *layer, const moe_attention *what, const void *x,
                            const void *cosines, const void *sines, void *between, void *output);

/* How a router chooses: the `top_k` largest of `count` logits, whose weights, rounded to dtype, are
 *   OF_ALL      their softmax among all
 *   NORMALISED  the same, divided by the sum of what was chosen
 *   OF_CHOSEN   their softmax among what was chosen
 * in float32, exponentials being added up in vectors of `lanes`, 8 or 16. Of experts that are as likely as each other, it chooses
 * those that torch does on top of GNU's library if it breaks_ties. */
enum moe_shares { MOE_OF_ALL, MOE_NORMALISED, MOE_OF_CHOSEN };
typedef struct {
    int32_t count, top_k, lanes, shares, dtype, breaks_ties;
} moe_router;

/* What a token chooses, the likeliest first, by logits in bfloat16; `scores` is memory for `count` numbers. 0, or MOE_TIED where
 * that is left to torch: an expert that is chosen is as likely as one that is not, or logits are not finite. */
enum { MOE_AWAY = 1, MOE_TIED, MOE_UNATTENDED, MOE_UNDECIDED };
MOE_API int moe_route(const moe_router *router, const void *logits, float *scores, int64_t *chosen, float *weights);

/* A decoder layer for one token: what attention makes of the normed state is added to it, and what experts and an MLP make of
 * that, normed, is added, too, both times `scale`; one of the two may be lacking (NULL). What the MLP makes is multiplied by
 * `share` before. And memory for what lies between, which layers may share but for `chosen`.
 * Expert i is in the slot that slots[i] says, or nowhere if that is negative; slots lie in `memory`, so many bytes apart.
 * Without a `gate` somebody else chooses, and where there is an MLP and `asks_share` somebody else says its share.
 * Without `attention` somebody else attends, and where it `asks_attended` does all but its output's projection.
 * `what`, `cosines`, `sines` and `between` are as in moe_self_attend. */
typedef struct {
    const moe_norm_layer *norm, *second_norm;
    const moe_self_attention *attention;
    const moe_linear_layer *gate;
    const moe_router *router;
    const moe_layer *experts;
    const moe_mlp_layer *mlp;
    int32_t asks_attended, asks_share;
    int32_t top_k;
    int32_t row_dtype, sum_dtype; /* as moe_experts and moe_sum take them */
    float scale, share;
    const int32_t *slots;
    const void *memory;
    int64_t slot_bytes;
    const moe_attention *what;
    const void *cosines, *sines;
    void *between;
    void *state, *normed, *added, *logits; /* in bfloat16: [hidden] but for logits, [count] */
    float *scores, *rows, *weights;        /* [count], [top_k, hidden], [top_k] */
    int64_t *chosen;                       /* [top_k] */
} moe_decoder_layer;

/* Puts a token's state x, [hidden] in bfloat16, through `count` layers, one after the other; `done` receives the number of
 * those that are behind it. `attended` is what somebody else has made of the first one's normed state, or NULL. 0, or what ended
 * it at the layer that x is now before: MOE_UNATTENDED where somebody else is to attend first; or, when that layer's `state` is
 * what is to be added to, and its `normed` what is given to experts and MLP, MOE_AWAY where chosen experts are not all there, or
 * `tells`, and then no experts are computed; MOE_UNDECIDED where somebody else chooses, or says the share, and then moe_finish may
 * be called; and MOE_TIED. After MOE_AWAY `chosen` and `weights` are the choice. Or what moe_self_attend returns. */
MOE_API int moe_decode(moe_pool *pool, const moe_decoder_layer *const *layers, int count, int tells, const void *attended,
                       void *x, int32_t *done);

/* The rest of such a layer, after its choice and share have been filled in: 0, and x is behind it, or MOE_AWAY. */
MOE_API int moe_finish(moe_pool *pool, const moe_decoder_layer *layer, void *x);

/* Reads memory as fast as the pool's threads can, and returns the exclusive or of its words: what the memory's rate is
 * measured with. */
MOE_API uint64_t moe_read(moe_pool *pool, const void *memory, size_t bytes);

/* What the routers chose of late: the arrays of RoutingMemory (routing_memory.py says what is computed with them).
 * A token's choice is a bit per expert, in words that lie apart: [layers, width / 32, places]. */
enum { MOE_AHEAD = 4, MOE_AVERAGES = 2, MOE_NEIGHBOURS = 16 };
typedef struct {
    int32_t layers, width, places; /* width: experts with room for the largest layer, a multiple of 32 */
    int32_t past;                  /* tokens that the newest one is compared with */
    const uint32_t *chosen;
    const int64_t *newest;         /* [layers], places */
    double *likeness;              /* [past], of the oldest token first */
    double *averages;              /* [MOE_AVERAGES, layers, width] */
    double fade, sharpness, least, later_trust;
    double keep[MOE_AVERAGES], trust[MOE_AHEAD];
} moe_routing;

/* Layers from `first` to before `end` ran for the token at `place`: brings likeness and averages up to date. */
MOE_API void moe_learn(const moe_routing *routing, int first, int end, int64_t place);

/* What followed the tokens most like the newest, of `known` past ones, in `count` layers: [MOE_AHEAD, count, width]. */
MOE_API void moe_followed(const moe_routing *routing, int known, double most_likeness, int count,
                          const int32_t *layers, double *shares);

/* Finds the same shares, and by them the visits that are expected to pass before an expert is chosen: [count, width]. */
MOE_API void moe_visits(const moe_routing *routing, int known, double most_likeness, int count, const int32_t *layers,
                        double *shares, double *visits);

/* Packs bfloat16 [rows, width], multiples of 16 and 8, as lossless.py does. Returns how many are exceptions; where there is
 * no room for them, panels are not written. */
MOE_API int64_t moe_pack_lossless(const void *weights, int64_t rows, int64_t width, void *panels, void *uppers);

/* Threads that read files into memory: what transfer.Reader does, without Python. Any thread may call. */
typedef struct moe_reader moe_reader;
typedef struct moe_fetch moe_fetch;

/* Why bytes are read, the most urgent first: somebody waits for them; they are guessed at; they fill memory. */
enum { MOE_DEMAND, MOE_GUESS, MOE_WARM_UP, MOE_URGENCIES };

/* A fetch that ended: well, cancelled, or with an error: an errno, or that the file ends early, with the bytes it has. */
enum { MOE_ENDS_EARLY = -1 };
typedef struct {
    int64_t key, read_bytes, file_bytes;
    int32_t error, is_cancelled;
} moe_arrival;

/* Starts `threads` threads, past the page cache if is_direct: offsets and memory are then page-aligned, and memory is as long
 * as the bytes rounded up to whole pages. Guesses are read as if there were `most` threads. NULL when memory or threads are
 * lacking. */
MOE_API moe_reader *moe_open_reader(int32_t most, int32_t threads, int32_t is_direct);

/* Finishes the reads in flight, drops what waits, and ends the threads. */
MOE_API void moe_close_reader(moe_reader *reader);

/* Bytes `begin` to `end` of the file, in pieces of so many, are to be read into memory. 0, or -1 when memory is lacking. */
MOE_API int moe_fetch_file(moe_reader *reader, int64_t key, const char *path, int64_t begin, int64_t end, int64_t piece_bytes,
                           void *memory, int32_t urgency);

/* Somebody waits for this now; nobody wants it any more. Nothing happens when all of it is on its way. */
MOE_API void moe_promote(moe_reader *reader, int64_t key);
MOE_API void moe_cancel(moe_reader *reader, int64_t key);

/* Waits for the next fetch that ends, so long at most: 1 if one has. It stays the next one until it is forgotten, so that a
 * caller who is interrupted hears of it again. */
MOE_API int moe_await(moe_reader *reader, int32_t milliseconds, moe_arrival *arrival);
MOE_API void moe_forget(moe_reader *reader);

/* What each of the threads does, apart: it takes the next piece, 1 if there is one that may be read now, and reads it. */
typedef struct {
    moe_fetch *fetch;
    int64_t key, begin;
    int32_t is_guess;
} moe_piece;
MOE_API int moe_take_piece(moe_reader *reader, moe_piece *piece);
MOE_API void moe_read_piece(moe_reader *reader, const moe_piece *piece);

#endif
