/* clock.h: reads a clock inline, for callers that a function call would slow down. */
#ifndef FGPU_CLOCK_H
#define FGPU_CLOCK_H

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/shim.h"

#pragma weak clock_gettime /* not in libc before glibc 2.17 */

/* Return a clock of Linux, in ns. */
static inline __attribute__((always_inline)) uint64_t fgpu_read_clock(int which)
{
    struct timespec now;
    if (LIKELY(clock_gettime))
        clock_gettime(which, &now);
    else
        syscall(SYS_clock_gettime, which, &now);
    return (uint64_t)now.tv_sec * FGPU_SECOND_NS + (uint64_t)now.tv_nsec;
}

#endif
