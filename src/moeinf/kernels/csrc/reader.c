#if defined(__linux__)
#define _GNU_SOURCE /* O_DIRECT */
#endif
#include "moe.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct moe_fetch {
    moe_fetch *next, *before;
    int64_t key, begin, end, piece_bytes;
    int64_t unread; /* where the piece begins that nobody reads yet */
    int64_t read_bytes, file_bytes;
    char *memory;
    int32_t pieces, pieces_left, error, is_cancelled;
    char path[];
};

typedef struct {
    moe_fetch *first, *last;
} queue;

struct moe_reader {
    pthread_mutex_t lock;
    pthread_cond_t work;    /* there are pieces that may be read, or the reader closes */
    pthread_cond_t arrival; /* a fetch ended */
    queue waiting[MOE_URGENCIES], ended;
    pid_t process; /* whose threads they are */
    pthread_t *threads;
    int32_t most, num_threads, idle, guessing, is_direct, closes;
};

static void append(queue *queue, moe_fetch *fetch) {
    fetch->next = NULL;
    fetch->before = queue->last;
    if (queue->first == NULL)
        queue->first = fetch;
    else
        queue->last->next = fetch;
    queue->last = fetch;
}

static void take_out(queue *queue, moe_fetch *fetch) {
    if (fetch->before == NULL)
        queue->first = fetch->next;
    else
        fetch->before->next = fetch->next;
    if (fetch->next == NULL)
        queue->last = fetch->before;
    else
        fetch->next->before = fetch->before;
}

static int64_t pieces_of(int64_t bytes, int64_t piece_bytes) {
    return (bytes + piece_bytes - 1) / piece_bytes;
}

static void end_pieces(moe_reader *reader, moe_fetch *fetch, int64_t count) {
    fetch->pieces_left -= (int32_t)count;
    if (fetch->pieces_left > 0)
        return;
    append(&reader->ended, fetch);
    pthread_cond_signal(&reader->arrival);
}

/* Of a fetch that could keep all threads busy, half of them read while it is a guess: what the next layer then asks for waits
 * for fewer pieces that nobody wants. */
static int32_t most_guessing(const moe_reader *reader, const moe_fetch *fetch) {
    return fetch->pieces < reader->most ? reader->most : (reader->most + 1) / 2;
}

/* The most urgent piece that nobody reads and that may be read now; the reader is locked. */
static int next_piece(moe_reader *reader, moe_piece *piece) {
    for (int urgency = 0; urgency < MOE_URGENCIES; urgency++) {
        queue *queue = &reader->waiting[urgency];
        moe_fetch *fetch = queue->first;
        if (fetch == NULL)
            continue;
        if (urgency == MOE_GUESS && reader->guessing >= most_guessing(reader, fetch))
            return 0;
        *piece = (moe_piece){.fetch = fetch, .key = fetch->key, .begin = fetch->unread, .is_guess = urgency == MOE_GUESS};
        reader->guessing += piece->is_guess;
        fetch->unread += fetch->piece_bytes;
        if (fetch->unread >= fetch->end)
            take_out(queue, fetch);
        return 1;
    }
    return 0;
}

static int open_file(const char *path, int is_direct) {
#ifdef O_DIRECT
    return open(path, O_RDONLY | O_CLOEXEC | (is_direct ? O_DIRECT : 0));
#else
    int file = open(path, O_RDONLY | O_CLOEXEC);
#ifdef F_NOCACHE
    if (file >= 0 && is_direct)
        fcntl(file, F_NOCACHE, 1);
#endif
    return file;
#endif
}

/* Reads `wanted` bytes from `offset`, or more, up to `room`, where the end of a page is nearer. 0, an errno, or MOE_ENDS_EARLY
 * with the bytes that the file has. */
static int read_exactly(int file, char *memory, int64_t room, int64_t offset, int64_t wanted, int64_t *file_bytes) {
    for (int64_t done = 0; done < wanted;) {
        ssize_t count = pread(file, memory + done, (size_t)(room - done), (off_t)(offset + done));
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return errno;
        done += count;
        struct stat about;
        if (done >= wanted)
            break;
        if (fstat(file, &about) < 0)
            return errno;
        if (count == 0 || about.st_size < offset + wanted) {
            *file_bytes = about.st_size;
            return MOE_ENDS_EARLY;
        }
    }
    return 0;
}

static int read_file(const moe_reader *reader, const moe_fetch *fetch, int64_t begin, int64_t wanted, int64_t *file_bytes) {
    int file = open_file(fetch->path, reader->is_direct);
    if (file < 0)
        return errno;
    int64_t room = reader->is_direct ? (wanted + PAGE - 1) / PAGE * PAGE : wanted;
    int error = read_exactly(file, fetch->memory + (begin - fetch->begin), room, begin, wanted, file_bytes);
    close(file);
    return error;
}

int moe_take_piece(moe_reader *reader, moe_piece *piece) {
    pthread_mutex_lock(&reader->lock);
    int is_taken = next_piece(reader, piece);
    pthread_mutex_unlock(&reader->lock);
    return is_taken;
}

static void read_piece(moe_reader *reader, const moe_piece *piece) { /* locked before and behind */
    moe_fetch *fetch = piece->fetch;
    if (fetch->error == 0) {
        int64_t left = fetch->end - piece->begin, file_bytes = 0;
        int64_t wanted = left < fetch->piece_bytes ? left : fetch->piece_bytes;
        pthread_mutex_unlock(&reader->lock);
        int error = read_file(reader, fetch, piece->begin, wanted, &file_bytes);
        pthread_mutex_lock(&reader->lock);
        if (error == 0)
            fetch->read_bytes += wanted;
        else if (fetch->error == 0) {
            fetch->error = error;
            fetch->file_bytes = file_bytes;
        }
    }
    reader->guessing -= piece->is_guess;
    end_pieces(reader, fetch, 1);
}

void moe_read_piece(moe_reader *reader, const moe_piece *piece) {
    pthread_mutex_lock(&reader->lock);
    read_piece(reader, piece);
    pthread_mutex_unlock(&reader->lock);
}

/* One thread wakes the next, if there is more to read, so that who asks for files wakes one alone. */
static void wake(moe_reader *reader) {
    for (int urgency = 0; urgency < MOE_URGENCIES; urgency++)
        if (reader->waiting[urgency].first != NULL && reader->idle > 0) {
            pthread_cond_signal(&reader->work);
            return;
        }
}

static void *serve(void *argument) {
    moe_reader *reader = argument;
    moe_piece piece;
    pthread_mutex_lock(&reader->lock);
    for (;;) {
        int is_taken;
        while (!(is_taken = next_piece(reader, &piece)) && !reader->closes) {
            reader->idle++;
            pthread_cond_wait(&reader->work, &reader->lock);
            reader->idle--;
        }
        if (!is_taken)
            break;
        wake(reader);
        read_piece(reader, &piece);
    }
    pthread_mutex_unlock(&reader->lock);
    return NULL;
}

/* Signals are for the threads of who opened the reader. */
static void start(moe_reader *reader, int32_t threads) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (reader->num_threads < threads &&
           pthread_create(&reader->threads[reader->num_threads], NULL, serve, reader) == 0)
        reader->num_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

moe_reader *moe_open_reader(int32_t most, int32_t threads, int32_t is_direct) {
    moe_reader *reader = calloc(1, sizeof *reader);
    if (reader == NULL)
        return NULL;
    reader->threads = calloc((size_t)threads + 1, sizeof *reader->threads);
    if (reader->threads == NULL) {
        free(reader);
        return NULL;
    }
    pthread_mutex_init(&reader->lock, NULL);
    pthread_cond_init(&reader->work, NULL);
    pthread_cond_init(&reader->arrival, NULL);
    reader->process = getpid();
    reader->most = most;
    reader->is_direct = is_direct;
    start(reader, threads);
    if (reader->num_threads == 0 && threads > 0) {
        moe_close_reader(reader);
        return NULL;
    }
    return reader;
}

static void drop(queue *queue) {
    while (queue->first != NULL) {
        moe_fetch *fetch = queue->first;
        queue->first = fetch->next;
        free(fetch);
    }
    queue->last = NULL;
}

void moe_close_reader(moe_reader *reader) {
    if (reader->process != getpid())
        return; /* a child has no threads, and nobody who would unlock what they locked */
    queue dropped[MOE_URGENCIES] = {{NULL, NULL}};
    pthread_mutex_lock(&reader->lock);
    reader->closes = 1;
    for (int urgency = 0; urgency < MOE_URGENCIES; urgency++)
        for (moe_fetch *fetch; (fetch = reader->waiting[urgency].first) != NULL;) {
            take_out(&reader->waiting[urgency], fetch);
            int64_t unread = pieces_of(fetch->end - fetch->unread, fetch->piece_bytes);
            fetch->pieces_left -= (int32_t)unread;
            if (fetch->pieces_left == 0) /* else who reads the last piece ends it */
                append(&dropped[urgency], fetch);
        }
    pthread_cond_broadcast(&reader->work);
    pthread_mutex_unlock(&reader->lock);
    for (int32_t i = 0; i < reader->num_threads; i++)
        pthread_join(reader->threads[i], NULL);
    for (int urgency = 0; urgency < MOE_URGENCIES; urgency++)
        drop(&dropped[urgency]);
    drop(&reader->ended);
    pthread_cond_destroy(&reader->arrival);
    pthread_cond_destroy(&reader->work);
    pthread_mutex_destroy(&reader->lock);
    free(reader->threads);
    free(reader);
}

int moe_fetch_file(moe_reader *reader, int64_t key, const char *path, int64_t begin, int64_t end, int64_t piece_bytes,
                   void *memory, int32_t urgency) {
    moe_fetch *fetch = calloc(1, sizeof *fetch + strlen(path) + 1);
    if (fetch == NULL)
        return -1;
    fetch->key = key;
    fetch->begin = fetch->unread = begin;
    fetch->end = end;
    fetch->piece_bytes = piece_bytes;
    fetch->memory = memory;
    fetch->pieces = fetch->pieces_left = (int32_t)pieces_of(end - begin, piece_bytes);
    strcpy(fetch->path, path);
    pthread_mutex_lock(&reader->lock);
    append(&reader->waiting[urgency], fetch);
    wake(reader);
    pthread_mutex_unlock(&reader->lock);
    return 0;
}

/* Takes what nobody reads yet of a fetch that nobody waits for out of its queue; NULL if there is no such fetch. The newest
 * are looked at first, since they are what is given up first. */
static moe_fetch *take(moe_reader *reader, int64_t key) {
    for (int urgency = MOE_GUESS; urgency < MOE_URGENCIES; urgency++)
        for (moe_fetch *fetch = reader->waiting[urgency].last; fetch != NULL; fetch = fetch->before)
            if (fetch->key == key) {
                take_out(&reader->waiting[urgency], fetch);
                return fetch;
            }
    return NULL;
}

void moe_promote(moe_reader *reader, int64_t key) {
    pthread_mutex_lock(&reader->lock);
    moe_fetch *fetch = take(reader, key);
    if (fetch != NULL) {
        append(&reader->waiting[MOE_DEMAND], fetch);
        wake(reader);
    }
    pthread_mutex_unlock(&reader->lock);
}

void moe_cancel(moe_reader *reader, int64_t key) {
    pthread_mutex_lock(&reader->lock);
    moe_fetch *fetch = take(reader, key);
    if (fetch != NULL) {
        fetch->is_cancelled = 1;
        end_pieces(reader, fetch, pieces_of(fetch->end - fetch->unread, fetch->piece_bytes));
    }
    pthread_mutex_unlock(&reader->lock);
}

int moe_await(moe_reader *reader, int32_t milliseconds, moe_arrival *arrival) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    int64_t nanoseconds = until.tv_nsec + milliseconds % 1000 * INT64_C(1000000);
    until.tv_sec += milliseconds / 1000 + nanoseconds / 1000000000;
    until.tv_nsec = (long)(nanoseconds % 1000000000);
    pthread_mutex_lock(&reader->lock);
    for (int late = 0; reader->ended.first == NULL && milliseconds > 0 && !late;)
        late = pthread_cond_timedwait(&reader->arrival, &reader->lock, &until) != 0;
    moe_fetch *fetch = reader->ended.first;
    if (fetch != NULL)
        *arrival = (moe_arrival){fetch->key, fetch->read_bytes, fetch->file_bytes, fetch->error, fetch->is_cancelled};
    pthread_mutex_unlock(&reader->lock);
    return fetch != NULL;
}

void moe_forget(moe_reader *reader) {
    pthread_mutex_lock(&reader->lock);
    moe_fetch *fetch = reader->ended.first;
    take_out(&reader->ended, fetch);
    pthread_mutex_unlock(&reader->lock);
    free(fetch);
}
