/* Attention of one token over a KV cache, added up in the order in which torch's kernel for processors does it
 * (ATen/native/cpu/FlashAttentionKernel.cpp; orders found by trying):
 *
 *   Tokens are taken BLOCK at a time, with a running maximum and sum. A score is four interleaved sums of products,
 *   (0 + 2) + (1 + 3), times the scale. Whole vectors of 16 go through an exponential of its own (`exponential`), the
 *   rest through exp, rounded; their sum is one of 16 interleaved ones. Chances are rounded to bfloat16 before they weigh the
 *   values, which are four interleaved sums again.
 *
 * torch computes these with scalar loops, one head after the other. Here heads that share keys share the reading. */
#include "attention.h"

enum { ALONE = 1 << 16 /* products that are not worth a wake-up */ };

typedef struct {
    const attention_loops *loops;
    const moe_attention *what;
    uint16_t *output;
    char *scratch; /* per KV head */
    size_t scratch_bytes;
    size_t per_ticket;
} attending;

/* NULL where there are none for this set of instructions. */
static const attention_loops *find_loops(const kernels *kernels) {
#ifdef HAS_DOT_PAIRS
    if (kernels->is_wide)
        return &attention_avx512;
#endif
#if defined(__x86_64__)
    if (kernels->tiles.multiply != NULL)
        return &attention_avx2;
#endif
    (void)kernels;
    return NULL;
}

/* The heads that share one KV head. */
static void attend(const attending *job, size_t shared) {
    const moe_attention *what = job->what;
    size_t size = (size_t)what->size, tokens = (size_t)what->tokens, heads = (size_t)(what->heads / what->kv_heads);
    const uint16_t *keys = (const uint16_t *)what->keys + shared * (size_t)what->key_head;
    const uint16_t *values = (const uint16_t *)what->values + shared * (size_t)what->value_head;
    size_t key_token = (size_t)what->key_token, value_token = (size_t)what->value_token;
    float *numbers = (float *)(job->scratch + shared * job->scratch_bytes);
    float *queries = numbers, *totals = queries + heads * size, *chances = totals + heads * size;
    head *each = (head *)(chances + heads * BLOCK);
    memset(totals, 0, heads * size * sizeof *totals);
    for (size_t i = 0; i < heads * size; i++)
        queries[i] = from_bf16(((const uint16_t *)what->query)[shared * heads * size + i]);
    for (size_t h = 0; h < heads; h++)
        each[h] = (head){-INFINITY, 0, chances + h * BLOCK, totals + h * size};
    for (size_t start = 0; start < tokens; start += BLOCK) {
        size_t count = smaller(BLOCK, tokens - start);
        job->loops->score(each, heads, queries, keys + start * key_token, key_token, size, count);
        for (size_t h = 0; h < heads; h++)
            job->loops->take_in(&each[h], what->scale, count, size);
        job->loops->weigh(each, heads, values + start * value_token, value_token, size, count);
    }
    for (size_t h = 0; h < heads; h++) {
        float share = each[h].sum == 0 ? 1 : 1 / each[h].sum;
        for (size_t i = 0; i < size; i++)
            job->output[(shared * heads + h) * size + i] = to_bf16(each[h].total[i] * share);
    }
}

static void run_ticket(void *job, size_t ticket) {
    const attending *attending = job;
    size_t first = ticket * attending->per_ticket, all = (size_t)attending->what->kv_heads;
    for (size_t shared = first; shared < all && shared < first + attending->per_ticket; shared++)
        attend(attending, shared);
}

int moe_attend(moe_pool *pool, const moe_attention *what, void *output) {
    const attention_loops *loops = find_loops(pool->kernels);
    if (loops == NULL)
        return -2;
#if defined(__x86_64__)
    if (what->value_size != what->size)
        return attend_widely(pool, what, output);
#endif
    size_t size = (size_t)what->size, all = (size_t)what->kv_heads, heads = (size_t)what->heads / all;
    size_t numbers = heads * (2 * size + BLOCK) * sizeof(float) + heads * sizeof(head);
    attending job = {.loops = loops, .what = what, .output = output, .scratch_bytes = ceil_div(numbers, 64) * 64};
    if (!reserve(pool, all * job.scratch_bytes))
        return -1;
    job.scratch = pool->scratch;
    bool is_little = (size_t)(what->heads * what->tokens) * size < ALONE;
    job.per_ticket = is_little ? all : 1;
    pool_run(pool->threads, run_ticket, &job, is_little ? 1 : all);
    return 0;
}

