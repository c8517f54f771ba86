/* Attention with sinks, in torch's order where that multiplies matrices of bfloat16 by itself: scores are products
 * with rows, as those of linear layers, and values are weighed as weights are that lie [in, out]. */
#include "library.h"

#include <math.h>

enum { ALONE = 1 << 16 /* products that are not worth a wake-up */ };

typedef struct {
    const kernels *kernels;
    const moe_attention *what;
    const uint16_t *sinks;
    size_t lanes, queries;
    const int64_t *begins, *ends;
    size_t chains, chain; /* so many, of so many tokens each; or all of them take tokens in turn */
    uint16_t *output;
    char *scratch; /* per KV head */
    size_t scratch_bytes;
    size_t per_ticket;
} attending;

/* One query: `scratch` has room for it, packed, all scores and one more, and sums of values. */
static void attend(const attending *job, size_t head, size_t number, const uint16_t *keys, const uint16_t *values,
                   char *scratch) {
    const moe_attention *what = job->what;
    const kernels *kernels = job->kernels;
    size_t size = (size_t)what->size, tokens = (size_t)what->tokens, heads = (size_t)what->heads;
    size_t begin = (size_t)job->begins[number], end = (size_t)job->ends[number];
    float *sums = (float *)(scratch + padded(size) / PAD * kernels->pairs.bytes), *scores = sums + job->chains * size;
    const uint16_t *query = (const uint16_t *)what->query + (head * job->queries + number) * size;
    uint16_t *output = job->output + (number * heads + head) * size;
    for (size_t i = 0; i < size; i += PAD) {
        float some[PAD];
        size_t count = smaller(PAD, size - i);
        for (size_t k = 0; k < count; k++)
            some[k] = from_bf16(query[i + k]);
        kernels->pairs.pack(some, count, scratch + i / PAD * kernels->pairs.bytes);
    }
    kernels->dot_bf16(keys + begin * size, size, end - begin, scratch, scores + begin);
    for (size_t t = begin; t < end; t++)
        scores[t] = rounded(rounded(scores[t], MOE_BF16) * what->scale, MOE_BF16);
    float most = scores[tokens] = from_bf16(job->sinks[head]);
    for (size_t t = begin; t < end; t++)
        most = scores[t] > most ? scores[t] : most;
    for (size_t t = begin; t < end; t++)
        scores[t] = rounded(scores[t] - most, MOE_BF16);
    scores[tokens] = rounded(scores[tokens] - most, MOE_BF16);
    softmax_bf16(scores, tokens + 1, job->lanes, begin, end);
    /* Whole chains, or turns: what is hidden has no chance, and what is left over at the end is added in another way. */
    size_t first = begin / job->chain * job->chain, some = smaller(tokens, ceil_div(end, job->chain) * job->chain) - first;
    size_t chains = kernels->takes_turns ? TURNS : ceil_div(some, job->chain);
    for (size_t chain = 0; chain < chains; chain++)
        kernels->columns_bf16(values + first * size, size, size, some, chain, scores + first, sums + chain * size);
    for (size_t chain = 1; chain < chains; chain++)
        for (size_t i = 0; i < size; i++)
            sums[i] += sums[chain * size + i];
    for (size_t i = 0; i < size; i++)
        output[i] = to_bf16(sums[i]);
}

static void run_ticket(void *context, size_t ticket) {
    const attending *job = context;
    const moe_attention *what = job->what;
    size_t all = (size_t)what->kv_heads, shares = (size_t)what->heads / all;
    size_t end = smaller(all, (ticket + 1) * job->per_ticket);
    for (size_t shared = ticket * job->per_ticket; shared < end; shared++) {
        const uint16_t *keys = (const uint16_t *)what->keys + shared * (size_t)what->key_head;
        const uint16_t *values = (const uint16_t *)what->values + shared * (size_t)what->value_head;
        for (size_t number = 0; number < job->queries; number++)
            for (size_t head = shared * shares; head < (shared + 1) * shares; head++)
                attend(job, head, number, keys, values, job->scratch + shared * job->scratch_bytes);
    }
}

int moe_attend_with_sinks(moe_pool *pool, const moe_attention *what, const void *sinks, int32_t lanes, int64_t queries,
                          const int64_t *begins, const int64_t *ends, void *output) {
    const kernels *kernels = pool->kernels;
    size_t size = (size_t)what->size, tokens = (size_t)what->tokens, all = (size_t)what->kv_heads;
    size_t chain = kernels->takes_turns ? TURNS : CHAIN;
    size_t chains = kernels->takes_turns ? TURNS : ceil_div(tokens, CHAIN);
    size_t bytes = padded(size) / PAD * kernels->pairs.bytes + (chains * size + tokens + 1) * sizeof(float);
    attending job = {
        .kernels = kernels,
        .what = what,
        .sinks = sinks,
        .lanes = (size_t)lanes,
        .queries = (size_t)queries,
        .begins = begins,
        .ends = ends,
        .chains = chains,
        .chain = chain,
        .output = output,
        .scratch_bytes = ceil_div(bytes, 64) * 64,
    };
    if (!reserve(pool, all * job.scratch_bytes))
        return -1;
    job.scratch = pool->scratch;
    bool is_little = (size_t)(what->heads * what->tokens * queries) * size < ALONE;
    job.per_ticket = is_little ? all : 1;
    pool_run(pool->threads, run_ticket, &job, is_little ? 1 : all);
    return 0;
}
