/* LD_PRELOAD: the clock on the wall is a day ahead, right and a day behind by turns, a third of a second each; the one
   that only counts (CLOCK_MONOTONIC) goes on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int (*exact(void))(clockid_t, struct timespec *) {
    static int (*found)(clockid_t, struct timespec *);
    if (!found)
        found = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    return found;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = exact()(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) {
        struct timespec counted;
        exact()(CLOCK_MONOTONIC, &counted);
        now->tv_sec += (counted.tv_nsec / 333333334 - 1) * 86400;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}

time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out)
        *out = precise.tv_sec;
    return precise.tv_sec;
}
