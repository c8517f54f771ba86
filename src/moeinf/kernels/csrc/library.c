#include "library.h"

#include <stdlib.h>

enum { READ_BYTES = 1 << 20 };

int moe_interface(void) {
    return MOE_INTERFACE;
}

const char *moe_variant(int number) {
    const kernels *kernels = find_kernels(number);
    return kernels == NULL ? NULL : kernels->name;
}

moe_pool *moe_open(int threads, int variant) {
    const kernels *kernels = find_kernels(variant);
    moe_pool *pool = kernels == NULL ? NULL : calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->kernels = kernels;
    pool->threads = pool_open(threads);
    if (pool->threads == NULL) {
        free(pool);
        return NULL;
    }
    return pool;
}

void moe_close(moe_pool *pool) {
    pool_close(pool->threads);
    free(pool->scratch);
    free(pool);
}

bool reserve(moe_pool *pool, size_t bytes) {
    if (bytes <= pool->scratch_bytes)
        return true;
    bytes = ceil_div(bytes, 64) * 64; /* or C11 may refuse it */
    void *larger = aligned_alloc(64, bytes);
    if (larger == NULL)
        return false;
    free(pool->scratch);
    pool->scratch = larger;
    pool->scratch_bytes = bytes;
    return true;
}

typedef struct {
    const moe_pool *pool;
    const char *memory;
    size_t bytes;
    atomic_uint_least64_t sum;
} reading;

static void run_read(void *job, size_t ticket) {
    reading *reading = job;
    size_t first = ticket * READ_BYTES;
    uint64_t sum = reading->pool->kernels->read(reading->memory + first, smaller(READ_BYTES, reading->bytes - first));
    atomic_fetch_xor(&reading->sum, sum);
}

uint64_t moe_read(moe_pool *pool, const void *memory, size_t bytes) {
    reading reading = {.pool = pool, .memory = memory, .bytes = bytes};
    pool_run(pool->threads, run_read, &reading, ceil_div(bytes, READ_BYTES));
    return reading.sum;
}
