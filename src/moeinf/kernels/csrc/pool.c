#include "pool.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
/* `yield` does nothing on a core of one thread. An `isb` waits for 30 to 40 cycles (rust-lang/rust#84725 and
 * travisdowns/concurrency-hierarchy-bench#3 on GitHub), so three for about as long as a pause of x86. */
#define PAUSE() __asm__ volatile("isb\n\tisb\n\tisb")
#else
#define PAUSE() ((void)0)
#endif

/* How often a thread looks before it sleeps. For others to end: some 20 microseconds, less than two system calls and a
   wake-up take. For work: some 400, which is more than what lies between most calls of a token. */
enum { LOOKS = 500, LOOKS_FOR_WORK = 10000 };

/* What a thread needs; some systems give it an eighth of that. */
enum { STACK_BYTES = 1 << 20 };

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work;     /* there is a new job, or the pool closes */
    pthread_cond_t progress; /* a count came to 0 */
    pthread_t *workers;
    pid_t process; /* whose workers they are */
    int num_workers;
    bool is_open; /* a job may be joined */
    bool closes;
    atomic_uint number; /* of the job; tells a worker the next one from the last */
    atomic_int active; /* workers that joined the job */
    pool_job *run;
    void *job;
    size_t tickets;
    atomic_size_t next;
};

/* Numbers too small to be normal are numbers in every thread alike, whatever the caller has told its own: float16 and float8
 * become float32 by way of them. Returns how it was. */
static uint64_t keep_small_numbers(void) {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr(), flush = 0x8040;
    if (before & flush)
        __builtin_ia32_ldmxcsr(before & ~flush);
    return before;
#elif defined(__aarch64__)
    uint64_t before, flush = 1 << 24;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    if (before & flush)
        __asm__ volatile("msr fpcr, %0" : : "r"(before & ~flush));
    return before;
#else
    return 0;
#endif
}

static void treat_small_numbers_as(uint64_t before) {
#if defined(__x86_64__)
    if (before != __builtin_ia32_stmxcsr())
        __builtin_ia32_ldmxcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

static void draw(pool *pool) {
    uint64_t before = keep_small_numbers();
    size_t ticket;
    while ((ticket = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed)) < pool->tickets)
        pool->run(pool->job, ticket);
    treat_small_numbers_as(before);
}

/* A worker that wakes after the job was closed does not join it: the caller waits for nobody that did nothing. */
static void *work(void *argument) {
    pool *pool = argument;
    unsigned seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->closes && (!pool->is_open || pool->number == seen))
            pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->closes)
            break;
        seen = pool->number;
        atomic_fetch_add(&pool->active, 1);
        pthread_mutex_unlock(&pool->lock);
        draw(pool);
        pool_done(pool, &pool->active);
        for (int i = 0; i < LOOKS_FOR_WORK && atomic_load_explicit(&pool->number, memory_order_relaxed) == seen; i++)
            PAUSE();
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

pool *pool_open(int threads) {
    pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->progress, NULL);
    pool->workers = calloc((size_t)(threads > 1 ? threads - 1 : 1), sizeof *pool->workers);
    pool->process = getpid();
    pthread_attr_t kind;
    pthread_attr_init(&kind);
    pthread_attr_setstacksize(&kind, STACK_BYTES);
    while (pool->workers != NULL && pool->num_workers < threads - 1 &&
           pthread_create(&pool->workers[pool->num_workers], &kind, work, pool) == 0)
        pool->num_workers++;
    pthread_attr_destroy(&kind);
    if (pool->workers == NULL || pool->num_workers < threads - 1) {
        pool_close(pool);
        return NULL;
    }
    return pool;
}

void pool_close(pool *pool) {
    if (pool->process != getpid())
        return; /* a child has no workers, and nobody who would unlock what they locked */
    pthread_mutex_lock(&pool->lock);
    pool->closes = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->num_workers; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->progress);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool->workers);
    free(pool);
}

void pool_run(pool *pool, pool_job *run, void *job, size_t tickets) {
    pthread_mutex_lock(&pool->lock);
    pool->run = run;
    pool->job = job;
    pool->tickets = tickets;
    atomic_store(&pool->next, 0);
    atomic_fetch_add_explicit(&pool->number, 1, memory_order_relaxed);
    pool->is_open = true;
    if (tickets > 1)
        pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    draw(pool);
    pthread_mutex_lock(&pool->lock);
    pool->is_open = false;
    pthread_mutex_unlock(&pool->lock);
    pool_wait(pool, &pool->active);
}

void pool_done(pool *pool, atomic_int *left) {
    if (atomic_fetch_sub_explicit(left, 1, memory_order_acq_rel) != 1)
        return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->progress);
    pthread_mutex_unlock(&pool->lock);
}

void pool_wait(pool *pool, atomic_int *left) {
    for (int i = 0; i < LOOKS; i++) {
        if (atomic_load_explicit(left, memory_order_acquire) == 0)
            return;
        PAUSE();
    }
    pthread_mutex_lock(&pool->lock);
    while (atomic_load_explicit(left, memory_order_acquire) != 0)
        pthread_cond_wait(&pool->progress, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
