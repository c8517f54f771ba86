/* Threads that share the tickets of one job at a time, and sleep between jobs. */
#ifndef POOL_H
#define POOL_H

#include <stdatomic.h>
#include <stddef.h>

typedef struct pool pool;
typedef void pool_job(void *job, size_t ticket);

/* NULL when memory or threads are lacking. The caller of `pool_run` is one of the threads. */
pool *pool_open(int threads);
void pool_close(pool *pool);

/* Calls run(job, ticket) once for each ticket below `tickets`, on all threads, and returns when all of it is done. Tickets
 * are drawn in ascending order. */
void pool_run(pool *pool, pool_job *run, void *job, size_t tickets);

/* For a job: one of the things counted by `left` is done; wait until all are. What is waited for must have been drawn
 * before what waits. */
void pool_done(pool *pool, atomic_int *left);
void pool_wait(pool *pool, atomic_int *left);

#endif
