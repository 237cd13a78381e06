/*
 * clock.c: clocks of Linux, in ns, and sleeping. Owns nothing.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "base/clock.h"

uint64_t fgpu_clock(int which) { return fgpu_read_clock(which); }

uint64_t fgpu_now(void) { return fgpu_read_clock(CLOCK_MONOTONIC); }

void fgpu_nap(long ns)
{
    struct timespec time = {0, ns};
    int saved = errno;
    syscall(SYS_nanosleep, &time, NULL);
    errno = saved;
}
