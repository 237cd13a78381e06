/*
 * link.c: whether an agent decides for this process, and where the pages are. Owns the state of this process and its
 * mapped pages; decides no allocation. A failure leaves the state as it was, or closed; the state is never a guess.
 *
 * Two sets of six pages are in one region that is reserved once. A registration fills the set that is not in use, and
 * one store of the state word puts that set in use. So a reader has all of the old pages or all of the new pages, and
 * no address ever becomes invalid.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/futex.h>

#include "base/clock.h"
#include "base/own.h"
#include "link/hello.h"
#include "link/link.h"
#include "standalone/standalone.h"

/*
 * FRESH -> OPEN       There is no socket directory: this host has no agent. Unless the image has a limit, registers
 *                     again only in fgpu_arrive(): an agent may have started.
 *       -> CLOSED     The directory exists, and no reply came in time; or the reply refuses memory; or the directory
 *                     is hidden, and the agent's probes are in the shim. Admissions are refused. Registers again every
 *                     second.
 *       -> UNMANAGED  The reply says that this process is not managed. Its control page shows when that may have
 *                     changed.
 *       -> HELD       The reply had pages, and the kernel confirmed them.
 * UNMANAGED, HELD: register again when the page's writer is silent or requests it; without a reply the state stays.
 * OPEN, UNMANAGED -> CLOSED: the reply refuses memory, because a limit is not in force.
 * HELD -> OPEN: the probes and the directory were removed (`fgpu detach`).
 * If the image has a limit, OPEN and UNMANAGED have the flag COOPERATIVE: callers get a HELD link, with pages that are
 * made from the standalone ledger of this container. That state is checked once a second. When an agent responds, it
 * takes over. If an agent was there and is silent, the state stays HELD or CLOSED.
 */
#define COOPERATIVE (1u << 9)
#define CROWDED (1u << 8) /* in `said`, in the same word as the links */
#define SECOND FGPU_SECOND_NS
#define FIRST_NS (5 * SECOND)     /* long enough for a restart of the gatekeeper, also on a busy host */
#define ANSWERED_NS (SECOND / 4)  /* the heartbeat's period: the epoch on a page may be this old */
#define CLOSED_NS (SECOND / 10)   /* the wait for a reply: the allocation of this thread is delayed by it */
#define AGAIN_NS (SECOND / 50)    /* the wait for a reply: short, because the pages in use are still valid */
#define PAUSE_NS 4000000          /* the first pause; each further pause is four times as long as the one before */
#define ABANDONED_NS (5 * SECOND) /* a signal handler may have left a registration by a jump */

static struct fgpu_own *const own = &fgpu_own_page.own;
static _Atomic bool unwiped;

static enum fgpu_link link_of(uint32_t word) { return word & 0xff; }
static unsigned set_of(uint32_t word) { return word >> 8 & 1; }

/* Return the view of the pages that the gatekeeper sent. */
static struct fgpu_view given(uint32_t word)
{
    struct fgpu_view view = {.link = link_of(word)};
    if (view.link < FGPU_UNMANAGED) return view;
    char *set = fgpu_set(set_of(word));
    view.control = (const void *)set;
    if (view.link == FGPU_HELD) {
        view.levels = word >> 16;
        view.usage = (const void *)(set + 2 * FGPU_PAGE_BYTES);
        view.status = (void *)(set + FGPU_PAGE_BYTES);
    }
    return view;
}

static struct fgpu_view view_of(uint32_t word)
{
    return LIKELY(!(word & COOPERATIVE)) ? given(word) : fgpu_standalone_view();
}

static uint32_t load(void)
{
    if (atomic_load_explicit(&unwiped, memory_order_relaxed)) {
        int pid = (int)syscall(SYS_getpid); /* an old C library caches the pid, which is wrong after a direct clone() */
        if (atomic_load_explicit(&own->pid, memory_order_relaxed) != pid) {
            memset(&fgpu_own_page, 0, sizeof fgpu_own_page);
            atomic_store_explicit(&own->pid, pid, memory_order_relaxed);
        }
    }
    return atomic_load_explicit(&own->word, memory_order_acquire);
}

/* Take the turn to register. It is not a lock: it expires by itself if the thread dies, and a forked child has its
 * own. */
static bool take(uint64_t now, uint64_t until)
{
    uint64_t was = atomic_load(&own->busy_until_ns);
    return was <= now && atomic_compare_exchange_strong(&own->busy_until_ns, &was, until);
}

/* Return the state word of a process for which no agent decides: the image may have a limit. */
static COLD uint32_t without_agent(uint32_t word)
{
    switch (fgpu_standalone_join()) {
    case FGPU_STANDALONE_FREE:
        return word;
    case FGPU_STANDALONE_BARE:
        return FGPU_CLOSED;
    default:
        return word | COOPERATIVE;
    }
}

/* Wait between two registrations if the kernel did not confirm the pages of the first. Returns false if the deadline is
 * before the second. */
static COLD bool pause_before(unsigned round, uint64_t deadline)
{
    uint64_t pause_ns = (uint64_t)PAUSE_NS << 2 * (round - 1), now = fgpu_now();
    if (now + pause_ns >= deadline) return false;
    fgpu_nap((long)pause_ns);
    return true;
}

/* Register before the deadline, and again if the kernel does not confirm the pages. Returns the word of the following
 * state. The caller holds the turn. */
static COLD uint32_t hello(uint32_t word, struct fgpu_asked *asked, uint64_t now, uint64_t patience)
{
    unsigned set = set_of(word) ^ 1;
    struct fgpu_note *note = &own->notes[set];
    unsigned levels = 0;
    enum fgpu_outcome outcome = FGPU_IS_SILENT;
    for (unsigned round = 0; round < FGPU_HELLO_ROUNDS; round++) {
        if (round && !pause_before(round, now + patience)) break;
        outcome = fgpu_hello(asked, now + patience, &own->notes[set_of(word)], set, note, &levels);
        if (outcome != FGPU_IS_HELD) break;
        /* This request records in the kernel that the process has the shim, and shows the shim that the probes are
         * there. A level that gets a limit between the gatekeeper's reply and this request has another page; the next
         * reply has that page. */
        uint32_t next = FGPU_HELD | set << 8 | levels << 16;
        if (fgpu_is_heard(given(next), fgpu_ticket(), round)) {
            fgpu_tell_called();
            return next;
        }
        outcome = FGPU_IS_SILENT;
    }
    if (outcome == FGPU_IS_FREE) return without_agent(FGPU_UNMANAGED | set << 8);
    if ((outcome == FGPU_IS_ABSENT || outcome == FGPU_IS_EMPTY) && fgpu_is_hidden()) outcome = FGPU_IS_SILENT;
    /* While this process has pages, the kernel enforces with or without a gatekeeper, and an upgrade may be in
     * progress. A process that began without an agent is not stopped by one that does not answer. */
    bool keeps = link_of(word) >= FGPU_UNMANAGED || word == FGPU_OPEN;
    /* Without a limit, nothing but this state refuses memory. In HELD, the kernel enforces the outer limits. */
    if (outcome == FGPU_IS_REFUSED && link_of(word) != FGPU_HELD) return FGPU_CLOSED;
    if (outcome == FGPU_IS_ABSENT) {
        /* The kernel enforces while it answers; during an upgrade it does so without a directory. */
        if (link_of(word) == FGPU_HELD) keeps = fgpu_ask(given(word), 0, 0, FGPU_HELLO, fgpu_ticket()) >= 0;
        if (!keeps) return without_agent(FGPU_OPEN);
    }
    if (word & COOPERATIVE && fgpu_standalone_join() >= FGPU_STANDALONE_ALONE) return word;
    /* EMPTY: no gatekeeper has ever responded there, so the image's limit applies. A gatekeeper that has responded, and
     * is silent now, may have had a lower limit. */
    uint32_t open = outcome == FGPU_IS_EMPTY && !keeps ? without_agent(FGPU_OPEN) : word;
    if (open & COOPERATIVE) return open;
    return keeps ? word : FGPU_CLOSED;
}

/* Register if the turn is free. A thread that does not get the turn continues with the current state: threads wait only
 * for the first registration. */
static COLD uint32_t say_hello(uint32_t word, struct fgpu_asked *asked, uint64_t now, uint64_t patience)
{
    uint64_t mark = now + patience + ABANDONED_NS;
    if (!take(now, mark)) return word;
    uint32_t latest = load();
    if (latest == word) { /* else another thread was faster */
        atomic_store(&own->next_ns, now + SECOND);
        latest = hello(word, asked, now, patience);
        /* A registration costs the gatekeeper little, and a program that was moved must not wait a second for its new
         * pages. */
        if (latest != word) atomic_store(&own->next_ns, now + ANSWERED_NS);
        if (atomic_load(&own->busy_until_ns) == mark) atomic_store_explicit(&own->word, latest, memory_order_release);
    }
    atomic_compare_exchange_strong(&own->busy_until_ns, &mark, 0);
    if (link_of(word) == FGPU_FRESH) syscall(SYS_futex, &own->word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
    return latest;
}

/* Register for the first time. One thread registers. The others wait for at most FIRST_NS, and then treat the
 * registration as failed. */
static COLD uint32_t first(struct fgpu_asked *asked)
{
    if (madvise(&fgpu_own_page, sizeof fgpu_own_page, MADV_WIPEONFORK) && !atomic_exchange(&unwiped, true)) load();
    uint64_t now = fgpu_now(), deadline = now + FIRST_NS;
    for (;;) {
        uint32_t word = load();
        if (link_of(word) == FGPU_FRESH) word = say_hello(word, asked, now, FIRST_NS);
        if (link_of(word) != FGPU_FRESH) return word;
        now = fgpu_now();
        if (now >= deadline) return FGPU_CLOSED;
        struct timespec left = {(time_t)((deadline - now) / SECOND), (long)((deadline - now) % SECOND)};
        syscall(SYS_futex, &own->word, FUTEX_WAIT_PRIVATE, word, &left, NULL, 0);
        now = fgpu_now();
    }
}

/* Register again if it is due. Only the clock determines when, so waiting processes do not overload a gatekeeper that
 * responds slowly. */
static COLD uint32_t again(uint32_t word, uint64_t now, uint64_t patience)
{
    struct fgpu_asked nowhere = FGPU_NOT_ASKED;
    if (now < atomic_load_explicit(&own->next_ns, memory_order_relaxed)) return word;
    return say_hello(word, &nowhere, now, patience);
}

/* Return whether the page's writer has exited, or has changed its decision for this process. */
static bool stale(uint32_t word, uint64_t now)
{
    const struct fgpu_control_page *control = given(word).control;
    struct fgpu_note seen, *note = &own->notes[set_of(word)];
    fgpu_read_note(control, &seen);
    uint64_t heartbeat = __atomic_load_n(&control->heartbeat_ns, __ATOMIC_RELAXED);
    return (now > heartbeat && now - heartbeat > FGPU_LEASE_NS) || seen.epoch != note->epoch ||
           seen.boot[0] != note->boot[0] || seen.boot[1] != note->boot[1];
}

static uint32_t current(void)
{
    struct fgpu_asked nowhere = FGPU_NOT_ASKED;
    uint32_t word = load();
    if (link_of(word) == FGPU_FRESH) return first(&nowhere);
    if (word == FGPU_OPEN) return word;
    uint64_t now = fgpu_read_clock(CLOCK_MONOTONIC); /* each allocation reads the clock here, so it is read inline */
    if (link_of(word) == FGPU_OPEN) return again(word, now, AGAIN_NS);
    if (link_of(word) == FGPU_CLOSED) return again(word, now, CLOSED_NS);
    return stale(word, now) ? again(word, now, AGAIN_NS) : word;
}

/*
 * Record in the kernel that the driver may open device nodes for this process, and send the first hello, without a
 * wait, except on a host with MPS. Each call records it, because the ledger may be newer than this process. The driver
 * takes milliseconds to initialise, or seconds if many processes start at the same time, and the gatekeeper can reply
 * meanwhile. The only state until fgpu_arrive() are descriptors, which are not shared: any other thread registers by
 * itself.
 */
COLD struct fgpu_asked fgpu_announce(void)
{
    struct fgpu_asked asked = FGPU_NOT_ASKED;
    int saved = errno;
    fgpu_admit_here(0, 0, FGPU_HELLO | FGPU_ANNOUNCE, 0);
    if (link_of(load()) == FGPU_FRESH) asked = fgpu_knock(&own->notes[0]);
    const char *variable = fgpu_mps();
    if (variable) { /* the driver reads it in cuInit, and the pages say whether this process uses MPS */
        fgpu_arrive(asked);
        asked = FGPU_NOT_ASKED;
        struct fgpu_view view = fgpu_glance();
        if (view.link == FGPU_HELD && view.control->flags & FGPU_MPS) putenv((char *)(uintptr_t)variable);
    }
    errno = saved;
    return asked;
}

COLD void fgpu_arrive(struct fgpu_asked asked)
{
    int saved = errno;
    uint32_t word = load();
    if (link_of(word) == FGPU_FRESH) first(&asked);
    if (word == FGPU_OPEN) again(word, fgpu_now(), ANSWERED_NS); /* the driver's own start takes longer */
    fgpu_forget(&asked);
    fgpu_look();
    errno = saved;
}

struct fgpu_view fgpu_glance(void) { return view_of(load()); }

static COLD const char *text_of(uint32_t word)
{
    if (link_of(word) == FGPU_CLOSED)
        return fgpu_silence ?: "fgpu: the agent does not answer: device memory is refused\n";
    if (!(word & COOPERATIVE)) return "fgpu: no agent on this host: limits are not enforced\n";
    return fgpu_standalone_join() == FGPU_STANDALONE_WITH
               ? "fgpu: no agent: this container's programs share the image's limit\n"
               : "fgpu: no agent, no shared file in /run/fgpu: each process has the image's whole limit\n";
}

struct fgpu_view fgpu_look(void)
{
    int saved = errno;
    uint32_t word = current(), bit = 1u << (word & COOPERATIVE ? FGPU_HELD : link_of(word));
    if (LIKELY(bit == 1u << FGPU_HELD && !(word & COOPERATIVE))) goto out;
    if (bit != 1u << FGPU_UNMANAGED && !(atomic_fetch_or(&own->said, bit) & bit)) fgpu_say(text_of(word));
out:
    errno = saved;
    return view_of(word);
}

COLD void fgpu_report_crowd(void)
{
    int saved = errno;
    if (!(atomic_fetch_or(&own->said, CROWDED) & CROWDED))
        fgpu_say("fgpu: device memory is refused: too many allocations, threads or processes\n");
    errno = saved;
}

COLD struct fgpu_view fgpu_insist(void)
{
    int saved = errno;
    uint32_t word = load();
    if (link_of(word) == FGPU_HELD) {
        /* Wait instead of refusing: the gatekeeper replied a moment ago, and will reply again. */
        uint64_t now = fgpu_now(), next = atomic_load_explicit(&own->next_ns, memory_order_relaxed);
        struct timespec left = {0, (long)(next - now)};
        if (next > now && next - now <= ANSWERED_NS) syscall(SYS_nanosleep, &left, NULL);
        word = again(word, fgpu_now(), CLOSED_NS);
    }
    errno = saved;
    return view_of(word);
}
