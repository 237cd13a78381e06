/* own.h: the state of this process that a forked child must not inherit. */
#ifndef FGPU_OWN_H
#define FGPU_OWN_H

#include "base/shim.h"

/* The gatekeeper that sent a set of pages. A thread that has slept during two registrations may read a note while
 * another thread overwrites it. */
struct fgpu_note {
    _Atomic uint64_t boot[2];
    _Atomic uint64_t epoch;
};

/* An event that the program recorded while a device was gated. The event is done when all work that was launched before
 * it on this stream (and context) is done. */
struct fgpu_recorded {
    _Atomic uint64_t event, key, until_ns;
    _Atomic(void *) context;
};
#define FGPU_RECORDED 64

/* Zero after a fork, by MADV_WIPEONFORK: for the kernel's ledger the child is another process, and it registers
 * itself. */
struct fgpu_own {
    _Atomic uint32_t word; /* link | set << 8 | COOPERATIVE | levels << 16; a futex until the first hello has a reply */
    _Atomic uint32_t said;
    _Atomic uint64_t busy_until_ns; /* one thread at a time registers */
    _Atomic uint64_t next_ns;
    _Atomic uint64_t ticket_base;
    _Atomic uint32_t ticket_count;
    _Atomic int pid; /* only if the kernel cannot wipe */
    struct fgpu_note notes[2];
    _Atomic uint64_t polled, polled_ns; /* the stream or event that a query last found not done, and when */
    struct fgpu_recorded recorded[FGPU_RECORDED];
};
union fgpu_own_page {
    struct fgpu_own own;
    char page[FGPU_PAGE_BYTES];
};
extern HIDDEN union fgpu_own_page fgpu_own_page;

#endif
