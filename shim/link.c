/*
 * link.c: whether somebody decides here, and where the pages are. Owns the state of this process and its mapped pages;
 * decides no allocation. What fails leaves the state as it was, or closed: never a guess.
 *
 * Two sets of six pages lie in one region that is reserved once. A hello fills the set that is not in use, and one
 * store of the state word makes it the one in use: a reader has all of the old pages or all of the new, and no address
 * ever dangles.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/futex.h>

#include "books.h"

/*
 * FRESH  -> OPEN     no socket directory: this host has no agent. For good, unless the image has a limit.
 *        -> CLOSED   the directory is there, but no answer in time: admissions are refused. Hello again, once a second.
 *        -> FREE     answered: nobody manages this process. Its control page says when that may have changed.
 *        -> HELD     answered with pages, and the probes answered too.
 * FREE, HELD: hello again when the page's writer is silent or says so; without an answer they stay what they are.
 * HELD -> OPEN when the probes are gone and the directory too: `fgpu detach`.
 * OPEN and FREE are COOPERATIVE besides where the image has a limit: who asks sees a HELD link, whose pages are made
 * from the books of this container. Looked after once a second; an agent that answers takes over, one that was there
 * and is silent leaves what was: HELD, or CLOSED.
 */
#define COOPERATIVE (1u << 9)
#define SECOND 1000000000ULL
#define FIRST_NS (2 * SECOND)     /* an upgrade of the gatekeeper fits in */
#define ANSWERED_NS (SECOND / 4)  /* the heartbeat's period: the epoch is no newer */
#define CLOSED_NS (SECOND / 10)   /* this thread's allocation waits for it */
#define AGAIN_NS (SECOND / 50)    /* the pages at hand still hold: nobody should notice */
#define ABANDONED_NS (5 * SECOND) /* a signal handler may have jumped out of a hello */

/* Zero after a fork, by MADV_WIPEONFORK: the child is another process to the kernel's ledger and says its own hello. */
struct own {
    _Atomic uint32_t word; /* link | set << 8 | COOPERATIVE | levels << 16; a futex while nobody has an answer */
    _Atomic uint32_t said;
    _Atomic uint64_t busy_until_ns; /* one thread at a time says hello */
    _Atomic uint64_t next_ns;
    _Atomic uint64_t ticket_base;
    _Atomic uint32_t ticket_count;
    _Atomic int pid; /* only where the kernel cannot wipe */
    struct fgpu_note notes[2];
};
static union {
    struct own own;
    char page[FGPU_PAGE_BYTES];
} mine __attribute__((aligned(FGPU_PAGE_BYTES)));
static struct own *const own = &mine.own;
static _Atomic bool unwiped;

#pragma weak clock_gettime /* not in libc before glibc 2.17 */
uint64_t fgpu_clock(int which)
{
    struct timespec now;
    if (LIKELY(clock_gettime))
        clock_gettime(which, &now);
    else
        syscall(SYS_clock_gettime, which, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

uint64_t fgpu_now(void) { return fgpu_clock(CLOCK_MONOTONIC); }

static enum fgpu_link link_of(uint32_t word) { return word & 0xff; }
static unsigned set_of(uint32_t word) { return word >> 8 & 1; }

/* As the gatekeeper gave it. */
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
    return LIKELY(!(word & COOPERATIVE)) ? given(word) : fgpu_standing_view();
}

static uint32_t load(void)
{
    if (atomic_load_explicit(&unwiped, memory_order_relaxed)) {
        int pid = (int)syscall(SYS_getpid); /* the C library of old caches it, and clone() by hand fools that */
        if (atomic_load_explicit(&own->pid, memory_order_relaxed) != pid) {
            memset(&mine, 0, sizeof mine);
            atomic_store_explicit(&own->pid, pid, memory_order_relaxed);
        }
    }
    return atomic_load_explicit(&own->word, memory_order_acquire);
}

/* Not a lock that somebody can take to the grave: it runs out by itself, and a fork's child has its own. */
static bool take(uint64_t now, uint64_t until)
{
    uint64_t was = atomic_load(&own->busy_until_ns);
    return was <= now && atomic_compare_exchange_strong(&own->busy_until_ns, &was, until);
}

/* 40 random bits and a counter: threads and processes that share a page never share a ticket. */
uint64_t fgpu_ticket(void)
{
    uint64_t base = atomic_load_explicit(&own->ticket_base, memory_order_relaxed);
    if (!base) {
        int saved = errno;
        uint64_t fresh = 0;
        if (syscall(SYS_getrandom, &fresh, sizeof fresh, 1 /* GRND_NONBLOCK */) != sizeof fresh)
            fresh = (fgpu_now() ^ (uint64_t)syscall(SYS_getpid) << 24) * 0x9e3779b97f4a7c15ULL;
        fresh = fresh >> 24 ? fresh >> 24 : 1; /* 0 is what an empty slot holds */
        if (atomic_compare_exchange_strong(&own->ticket_base, &base, fresh)) base = fresh;
        errno = saved;
    }
    return base << 22 | (atomic_fetch_add_explicit(&own->ticket_count, 1, memory_order_relaxed) & 0x3fffff);
}

/* Nobody decides here: the image may. */
static uint32_t nobody(uint32_t word)
{
    switch (fgpu_stand()) {
    case FGPU_STANDS_FREE:
        return word;
    case FGPU_STANDS_BARE:
        return FGPU_CLOSED;
    default:
        return word | COOPERATIVE;
    }
}

/* One hello within the deadline; the word that it leads to. The caller holds the turn. */
static uint32_t hello(uint32_t word, int *asked, uint64_t now, uint64_t patience, bool unanswered)
{
    unsigned set = set_of(word) ^ 1;
    struct fgpu_note *note = &own->notes[set];
    unsigned levels = 0;
    enum fgpu_outcome outcome = fgpu_hello(asked, now + patience, &own->notes[set_of(word)], set, note, &levels);
    if (outcome == FGPU_IS_HELD) {
        /* The kernel learns that this process has the shim, and we that the probes are there. */
        uint32_t next = FGPU_HELD | set << 8 | levels << 16;
        if (fgpu_ask(given(next), 0, 0, FGPU_HELLO, fgpu_ticket()) >= 0) return next;
        outcome = FGPU_IS_SILENT;
    }
    if (outcome == FGPU_IS_FREE) return nobody(FGPU_UNMANAGED | set << 8);
    /* With pages in hand the kernel enforces whether or not anybody is there to greet, and an upgrade may pass by. */
    bool keeps = link_of(word) >= FGPU_UNMANAGED;
    if (outcome == FGPU_IS_ABSENT && (!keeps || unanswered)) return nobody(FGPU_OPEN);
    if (word & COOPERATIVE && fgpu_stand() >= FGPU_STANDS_ALONE) return word;
    /* Nobody has ever answered there; who has, and is silent, may have had a tighter limit. */
    uint32_t open = outcome == FGPU_IS_EMPTY && !keeps ? nobody(FGPU_OPEN) : word;
    if (open & COOPERATIVE) return open;
    return keeps ? word : FGPU_CLOSED;
}

/* Whoever does not get the turn goes on with what there is: nobody queues for a hello but the first. */
static uint32_t say_hello(uint32_t word, int *asked, uint64_t now, uint64_t patience, bool unanswered)
{
    uint64_t mark = now + patience + ABANDONED_NS;
    if (!take(now, mark)) return word;
    uint32_t latest = load();
    if (latest == word) { /* else somebody was faster */
        atomic_store(&own->next_ns, now + SECOND);
        latest = hello(word, asked, now, patience, unanswered);
        /* An answered hello costs the gatekeeper little: a program that is moved must not wait a second to hear of it.
         */
        if (latest != word) atomic_store(&own->next_ns, now + ANSWERED_NS);
        if (atomic_load(&own->busy_until_ns) == mark) atomic_store_explicit(&own->word, latest, memory_order_release);
    }
    atomic_compare_exchange_strong(&own->busy_until_ns, &mark, 0);
    if (link_of(word) == FGPU_FRESH) syscall(SYS_futex, &own->word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
    return latest;
}

/* The first hello: one thread says it, the others wait as long as it may take and then take it for unanswered. */
static uint32_t first(int *asked)
{
    if (madvise(&mine, sizeof mine, MADV_WIPEONFORK) && !atomic_exchange(&unwiped, true)) load();
    uint64_t now = fgpu_now(), deadline = now + FIRST_NS;
    for (;;) {
        uint32_t word = load();
        if (link_of(word) == FGPU_FRESH) word = say_hello(word, asked, now, FIRST_NS, false);
        if (link_of(word) != FGPU_FRESH) return word;
        now = fgpu_now();
        if (now >= deadline) return FGPU_CLOSED;
        struct timespec left = {(time_t)((deadline - now) / SECOND), (long)((deadline - now) % SECOND)};
        syscall(SYS_futex, &own->word, FUTEX_WAIT_PRIVATE, word, &left, NULL, 0);
        now = fgpu_now();
    }
}

/* Paced by the clock alone, so that a gatekeeper in trouble is not made busier by those that wait for it. */
static uint32_t again(uint32_t word, uint64_t now, uint64_t patience, bool unanswered)
{
    int nowhere = -1;
    if (now < atomic_load_explicit(&own->next_ns, memory_order_relaxed)) return word;
    return say_hello(word, &nowhere, now, patience, unanswered);
}

/* The page's writer is gone, or what it knew of us has changed. */
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
    int nowhere = -1;
    uint32_t word = load();
    if (link_of(word) == FGPU_FRESH) return first(&nowhere);
    if (word == FGPU_OPEN) return word;
    uint64_t now = fgpu_now();
    if (link_of(word) == FGPU_OPEN) return again(word, now, AGAIN_NS, false);
    if (link_of(word) == FGPU_CLOSED) return again(word, now, CLOSED_NS, false);
    return stale(word, now) ? again(word, now, AGAIN_NS, false) : word;
}

/*
 * The driver takes milliseconds to initialise, seconds where many do at one moment, and the gatekeeper can answer in
 * them. Nothing of this process stands in memory meanwhile but a descriptor: whoever else comes says a hello of its
 * own.
 */
int fgpu_announce(void)
{
    int saved = errno, asked = -1;
    if (link_of(load()) == FGPU_FRESH) asked = fgpu_knock(&own->notes[0]);
    errno = saved;
    return asked;
}

void fgpu_arrive(int asked)
{
    int saved = errno;
    if (link_of(load()) == FGPU_FRESH) first(&asked);
    if (asked >= 0) syscall(SYS_close, asked);
    fgpu_look();
    errno = saved;
}

struct fgpu_view fgpu_glance(void) { return view_of(load()); }

static const char *text_of(uint32_t word)
{
    if (link_of(word) == FGPU_CLOSED) return "fgpu: the agent does not answer: device memory is refused\n";
    if (!(word & COOPERATIVE)) return "fgpu: no agent on this host: not enforced\n";
    return fgpu_stand() == FGPU_STANDS_WITH
               ? "fgpu: no agent: the image's limit, as far as this container's programs keep it together\n"
               : "fgpu: no agent, and no place for books in /run/fgpu: the image's limit for each process by itself\n";
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

struct fgpu_view fgpu_insist(void)
{
    int saved = errno;
    uint32_t word = load();
    if (link_of(word) == FGPU_HELD) {
        /* Better late than refused: whoever was answered a moment ago will be again. */
        uint64_t now = fgpu_now(), next = atomic_load_explicit(&own->next_ns, memory_order_relaxed);
        struct timespec left = {0, (long)(next - now)};
        if (next > now && next - now <= ANSWERED_NS) syscall(SYS_nanosleep, &left, NULL);
        word = again(word, fgpu_now(), CLOSED_NS, true);
    }
    errno = saved;
    return view_of(word);
}
