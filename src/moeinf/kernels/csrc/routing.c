#include "moe.h"

#include <math.h>
#include <string.h>

enum { WORD = 32 };

static inline int word_count(const moe_routing *routing) {
    return routing->width / WORD;
}

/* The words of that number of all tokens, in a row. */
static inline const uint32_t *words_of(const moe_routing *routing, int layer, int word) {
    return routing->chosen + ((size_t)layer * (size_t)word_count(routing) + (size_t)word) * (size_t)routing->places;
}

static inline double *average_of(const moe_routing *routing, int which, int layer) {
    return routing->averages + ((size_t)which * (size_t)routing->layers + (size_t)layer) * (size_t)routing->width;
}

/* By adding neighbouring fields of bits, which compilers do for several words at once on every processor. */
static inline uint32_t count_bits(uint32_t bits) {
    bits -= bits >> 1 & 0x55555555;
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333);
    bits = (bits + (bits >> 4)) & 0x0f0f0f0f;
    bits += bits >> 8;
    bits += bits >> 16;
    return bits & 0x3f;
}

/* In two loops, so that no compiler makes one rounding out of two: numpy rounds twice. */
static void compare(const moe_routing *routing, int layer, int64_t place) {
    double *restrict likeness = routing->likeness;
    for (int i = 0; i < routing->past; i++)
        likeness[i] *= routing->fade;
    for (int word = 0; word < word_count(routing); word++) {
        const uint32_t *words = words_of(routing, layer, word), *past = words + place - routing->past;
        uint32_t newest = words[place];
        for (int i = 0; i < routing->past; i++)
            likeness[i] += (int32_t)count_bits(past[i] & newest);
    }
}

/* Adds to the numbers of those experts of a layer that the token at `place` chose. */
static void add_to_chosen(const moe_routing *routing, int layer, int64_t place, double value, double *numbers) {
    for (int word = 0; word < word_count(routing); word++)
        for (uint32_t bits = words_of(routing, layer, word)[place]; bits != 0; bits &= bits - 1)
            numbers[word * WORD + __builtin_ctz(bits)] += value;
}

static void average(const moe_routing *routing, int layer, int64_t place) {
    for (int which = 0; which < MOE_AVERAGES; which++) {
        double *averages = average_of(routing, which, layer), keep = routing->keep[which];
        for (int expert = 0; expert < routing->width; expert++)
            averages[expert] *= keep;
        add_to_chosen(routing, layer, place, 1 - keep, averages);
    }
}

void moe_learn(const moe_routing *routing, int first, int end, int64_t place) {
    for (int layer = first; layer < end; layer++) {
        compare(routing, layer, place);
        average(routing, layer, place);
    }
}

/* The tokens most like the newest, the likest first: how long before the newest what followed them stands, and their
 * weights, which add up to 1. */
typedef struct {
    int count;
    int before[MOE_NEIGHBOURS];
    double weights[MOE_NEIGHBOURS];
} neighbours;

static neighbours find_neighbours(const moe_routing *routing, int known, double most_likeness) {
    neighbours near = {0};
    double likeness[MOE_NEIGHBOURS], sum = 0;
    for (int before = 0; before < known; before++) {
        double like = routing->likeness[routing->past - 1 - before];
        if (near.count == MOE_NEIGHBOURS && like <= likeness[near.count - 1])
            continue;
        int i = near.count < MOE_NEIGHBOURS ? near.count++ : near.count - 1;
        for (; i > 0 && likeness[i - 1] < like; i--) {
            likeness[i] = likeness[i - 1];
            near.before[i] = near.before[i - 1];
        }
        likeness[i] = like;
        near.before[i] = before;
    }
    for (int i = 0; i < near.count; i++)
        sum += near.weights[i] = exp(likeness[i] * (routing->sharpness / (most_likeness > 1 ? most_likeness : 1)));
    for (int i = 0; i < near.count; i++)
        near.weights[i] /= sum;
    return near;
}

/* Adds up the weights of the neighbours that were followed by each expert, `ahead` visits further on than the next. */
static void add_followers(const moe_routing *routing, const neighbours *near, int layer, int ahead, double *shares) {
    for (int i = 0; i < near->count; i++) {
        int64_t before = near->before[i] > ahead ? near->before[i] - ahead : 0;
        int64_t place = routing->newest[layer] > before ? routing->newest[layer] - before : 0;
        add_to_chosen(routing, layer, place, near->weights[i], shares);
    }
}

void moe_followed(const moe_routing *routing, int known, double most_likeness, int count, const int32_t *layers,
                  double *shares) {
    neighbours near = find_neighbours(routing, known, most_likeness);
    memset(shares, 0, (size_t)(MOE_AHEAD * count * routing->width) * sizeof *shares);
    for (int ahead = 0; ahead < MOE_AHEAD; ahead++)
        for (int i = 0; i < count; i++, shares += routing->width)
            add_followers(routing, &near, layers[i], ahead, shares);
}

void moe_visits(const moe_routing *routing, int known, double most_likeness, int count, const int32_t *layers,
                double *shares, double *visits) {
    moe_followed(routing, known, most_likeness, count, layers, shares);
    for (int i = 0; i < count; i++, shares += routing->width, visits += routing->width) {
        const double *shorter = average_of(routing, 0, layers[i]), *longer = average_of(routing, 1, layers[i]);
        for (int expert = 0; expert < routing->width; expert++) {
            double average = (shorter[expert] + longer[expert]) / 2, mean = 0, unused[MOE_AHEAD];
            for (int ahead = 0; ahead < MOE_AHEAD; ahead++) {
                double share = shares[ahead * count * routing->width + expert];
                mean += share / MOE_AHEAD;
                unused[ahead] = 1 - (average + routing->trust[ahead] * (share - average));
            }
            double later = average + routing->later_trust * (mean - average);
            double passing = unused[MOE_AHEAD - 1] / (later > routing->least ? later : routing->least);
            for (int ahead = MOE_AHEAD - 2; ahead >= 0; ahead--)
                passing = (passing + 1) * unused[ahead];
            visits[expert] = passing;
        }
    }
}
