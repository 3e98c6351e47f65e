/* LD_PRELOAD: reads of files named *.tar fail, fall short or take long, as those of a network file system do.
   FAULTY_AFTER: so many reads go well first; then for FAULTY_MS milliseconds all fail (EIO and ESTALE by turns; 0: not
   at all, -1: for ever). Of the other reads one in three gives half of what was asked for, one in fifty takes 20 ms. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static atomic_long reads, ends = -1;

static long milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int is_shard(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path);
    return length > 4 && memcmp(path + length - 4, ".tar", 4) == 0;
}

/* How many bytes of `count` a read is to ask for; -1: it fails. */
static ssize_t allowed(int file, size_t count) {
    int before = errno;
    if (!is_shard(file)) {
        errno = before;
        return count;
    }
    errno = before;
    const char *after = getenv("FAULTY_AFTER"), *length = getenv("FAULTY_MS");
    long number = atomic_fetch_add(&reads, 1), none = -1, last = length ? atol(length) : 0;
    if (after && last && number >= atol(after)) {
        atomic_compare_exchange_strong(&ends, &none, milliseconds() + last);
        if (last < 0 || milliseconds() < ends) {
            errno = number % 2 ? EIO : ESTALE;
            return -1;
        }
    }
    if (number % 50 == 7)
        usleep(20000);
    return number % 3 == 1 && count > 1 ? count / 2 : count;
}

ssize_t pread64(int file, void *data, size_t count, off64_t start) {
    static ssize_t (*next)(int, void *, size_t, off64_t);
    ssize_t most = allowed(file, count);
    if (!next)
        next = (ssize_t(*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    return most < 0 ? -1 : next(file, data, most, start);
}

ssize_t pread(int file, void *data, size_t count, off_t start) { return pread64(file, data, count, start); }

ssize_t read(int file, void *data, size_t count) {
    static ssize_t (*next)(int, void *, size_t);
    ssize_t most = allowed(file, count);
    if (!next)
        next = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    return most < 0 ? -1 : next(file, data, most);
}
