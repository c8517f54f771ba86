#include "pool.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

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

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work;     /* there is a new job, or the pool closes */
    pthread_cond_t progress; /* a count came to 0 */
    pthread_t *workers;
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

static void draw(pool *pool) {
    size_t ticket;
    while ((ticket = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed)) < pool->tickets)
        pool->run(pool->job, ticket);
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
    while (pool->workers != NULL && pool->num_workers < threads - 1 &&
           pthread_create(&pool->workers[pool->num_workers], NULL, work, pool) == 0)
        pool->num_workers++;
    if (pool->workers == NULL || pool->num_workers < threads - 1) {
        pool_close(pool);
        return NULL;
    }
    return pool;
}

void pool_close(pool *pool) {
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
