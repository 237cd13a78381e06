/*
 * verdict.c: one admission request to the kernel's probe, and its verdict on the usage page. Owns nothing; reads the
 * pages.
 *
 * Processes of one level share the page and its slots. A tagged verdict is in the array `answers`. BPF programs alone
 * choose the tags in it, so no other process can have written the verdict that this process waits for. A control page
 * without a tag comes from an older gatekeeper: then the ticket alone identifies the verdict.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "link/link.h"

#define ASKS 64

#ifdef __x86_64__
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() __asm__ volatile("yield")
#endif

/* Pause before the next request. Two threads that use the same slot at the same pace may repeatedly overwrite the
 * verdict that the other is about to read. Each waits for a random time that grows with every request; the later waits
 * are sleeps. */
static void step_aside(uint64_t ticket, int asked)
{
    uint64_t random = (ticket + (uint64_t)asked) * 0x9e3779b97f4a7c15ULL >> 32;
    if (asked < ASKS / 2) {
        for (uint64_t i = random & ((1u << (asked < 8 ? asked : 8)) - 1); i; i--) RELAX();
        return;
    }
    int saved = errno;
    struct timespec moment = {0, 20000 + (long)(random & 0x1ffff)};
    syscall(SYS_nanosleep, &moment, NULL);
    errno = saved;
}

/* Return the verdict for this ticket, or FGPU_AGAIN. `tag` 0: the request had no tag. */
static int answer(const struct fgpu_usage_page *page, uint64_t ticket, uint64_t tag)
{
    const uint64_t *slots = (const uint64_t *)(tag ? page->answers : page->verdicts);
    uint64_t wanted = tag ? tag << (FGPU_TAG_SHIFT - 2) | (ticket & FGPU_TICKET_BITS) : ticket;
    uint64_t word = __atomic_load_n(&slots[ticket & (FGPU_VERDICTS - 1)], __ATOMIC_RELAXED);
    return LIKELY(word >> 2 == wanted) ? (int)(word & 3) : FGPU_AGAIN;
}

/* Request admission, from attempt `from` to attempt `to`. The probe runs inside fgpu_admit_here. If another thread or
 * process has overwritten the slot since, repeat the request with the same ticket: the kernel returns the same verdict.
 * The tag is read each time, because the page may have a new tag. */
static int ask(struct fgpu_view view, unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket, int from, int to)
{
    for (int i = from; i < to; i++) {
        step_aside(ticket, i);
        uint64_t tag = __atomic_load_n(&view.control->tag, __ATOMIC_RELAXED);
        fgpu_admit_here(device, bytes, tag ? kind | FGPU_TAGGED : kind, ticket);
        int verdict = answer(view.usage, ticket, tag);
        if (LIKELY(verdict != FGPU_AGAIN)) return verdict;
    }
    return -1;
}

void fgpu_tell_called(void) { fgpu_admit_here(0, 0, FGPU_HELLO | FGPU_CALLED, 0); }

int fgpu_ask(struct fgpu_view view, unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket)
{
    return ask(view, device, bytes, kind, ticket, 0, ASKS);
}

/* All rounds together make as many attempts as one admission request. */
bool fgpu_is_heard(struct fgpu_view view, uint64_t ticket, unsigned round)
{
    int each = ASKS / FGPU_HELLO_ROUNDS, from = each * (int)round;
    return ask(view, 0, 0, FGPU_HELLO, ticket, from, from + each) >= 0;
}
