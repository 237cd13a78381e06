/*
 * ticket.c: the ticket numbers of requests to the kernel. Owns the counter of this process, which is in the page of
 * own.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/own.h"

static struct fgpu_own *const own = &fgpu_own_page.own;

/* Return a fresh ticket: 40 random bits of this process, and a counter of 22 bits. So threads of a process get
 * different tickets, and processes that share a page get the same ticket only if their random bits are the same. */
uint64_t fgpu_ticket(void)
{
    uint64_t base = atomic_load_explicit(&own->ticket_base, memory_order_relaxed);
    if (!base) {
        int saved = errno;
        uint64_t fresh = 0;
        if (syscall(SYS_getrandom, &fresh, sizeof fresh, 1 /* GRND_NONBLOCK */) != sizeof fresh)
            fresh = (fgpu_now() ^ (uint64_t)syscall(SYS_getpid) << 24) * 0x9e3779b97f4a7c15ULL;
        fresh = fresh >> 24 ? fresh >> 24 : 1; /* 0 is the value of an empty slot */
        if (atomic_compare_exchange_strong(&own->ticket_base, &base, fresh)) base = fresh;
        errno = saved;
    }
    return base << 22 | (atomic_fetch_add_explicit(&own->ticket_count, 1, memory_order_relaxed) & 0x3fffff);
}
