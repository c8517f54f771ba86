/* A router's choice, with torch's results to the last bit. */
#include "library.h"

#include <math.h>

enum { MOST_EXPERTS = 1024 };

static bool is_finite(const float *x, size_t count) {
    float sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += x[i] * 0; /* NaN for what is not finite */
    return sum == 0;
}

static size_t largest(const float *x, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

typedef struct {
    float score;
    int32_t expert;
} candidate;

static void swap(candidate *a, candidate *b) {
    candidate kept = *a;
    *a = *b;
    *b = kept;
}

static bool goes_before(const candidate *a, const candidate *b) { return a->score > b->score; }

/* The median of three; which of them, where some are as good, is C++'s, too. */
static candidate *median(candidate *a, candidate *b, candidate *c) {
    if (goes_before(a, b))
        return goes_before(b, c) ? b : goes_before(a, c) ? c : a;
    return goes_before(a, c) ? a : goes_before(b, c) ? c : b;
}

/* Brings the k best to the front, in the order in which C++'s nth_element of GNU's library does, which torch's topk calls: which of
 * several that are as good come to the front depends on each step. Whether it could. */
static bool bring_forward(candidate *all, size_t count, size_t k) {
    candidate *begin = all, *end = all + count, *wanted = all + k - 1;
    int steps = 0;
    for (size_t left = count; left > 1; left /= 2)
        steps += 2;
    while (end - begin > 3) {
        if (steps-- == 0)
            return false; /* there it goes on in another way */
        swap(begin, median(begin + 1, begin + (end - begin) / 2, end - 1));
        candidate *low = begin + 1, *high = end;
        for (;; swap(low++, high)) {
            while (goes_before(low, begin))
                low++;
            while (goes_before(begin, --high))
                ;
            if (low >= high)
                break;
        }
        if (low <= wanted)
            begin = low;
        else
            end = low;
    }
    for (candidate *next = begin + 1; next < end; next++)
        for (candidate *at = next; at > begin && goes_before(at, at - 1); at--)
            swap(at, at - 1);
    return true;
}

/* Of experts that are as likely as the last of what was chosen takes those that torch takes. `scores` are without what was chosen,
 * and `weights` are its own. Whether it could. */
static bool break_ties(const moe_router *router, const float *scores, int64_t *chosen, const float *weights) {
    size_t count = (size_t)router->count, k = (size_t)router->top_k, sure = 0;
    candidate all[MOST_EXPERTS];
    if (!router->breaks_ties || count > MOST_EXPERTS || k * 64 <= count) /* of few out of many it makes a heap */
        return false;
    for (size_t i = 0; i < count; i++)
        all[i] = (candidate){scores[i], (int32_t)i};
    for (size_t i = 0; i < k; i++)
        all[chosen[i]].score = weights[i];
    if (!bring_forward(all, count, k))
        return false;
    while (weights[sure] > weights[k - 1])
        sure++;
    for (size_t i = 0; i < k; i++)
        if (all[i].score == weights[k - 1])
            chosen[sure++] = all[i].expert;
    return true;
}

int moe_route(const moe_router *router, const void *logits, float *scores, int64_t *chosen, float *weights) {
    size_t count = (size_t)router->count, k = (size_t)router->top_k, lanes = (size_t)router->lanes;
    for (size_t i = 0; i < count; i++)
        scores[i] = from_bf16(((const uint16_t *)logits)[i]);
    if (!is_finite(scores, count))
        return MOE_TIED;
    if (router->shares != MOE_OF_CHOSEN)
        softmax(scores, count, lanes);
    for (size_t i = 0; i < k; i++) {
        size_t best = largest(scores, count);
        chosen[i] = (int64_t)best;
        weights[i] = scores[best];
        scores[best] = -INFINITY;
    }
    if (scores[largest(scores, count)] == weights[k - 1] && !break_ties(router, scores, chosen, weights))
        return MOE_TIED;
    if (router->shares == MOE_OF_CHOSEN)
        softmax(weights, k, lanes);
    float total = router->shares == MOE_NORMALISED ? sum_like_torch(weights, k) : 1;
    for (size_t i = 0; i < k; i++)
        weights[i] = rounded(weights[i] / total, router->dtype);
    return 0;
}
