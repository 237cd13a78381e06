/*
 * turn.c: a short lock that expires. Owns nothing: the word of a lock is stored with the data that it protects.
 */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

#include "base/shim.h"

#define TURN_NS 10000000ULL /* a turn expires after this time: its thread may have exited or left it by a jump */
#define TURN_TRIES 200

uint64_t fgpu_take_turn(_Atomic uint64_t *busy_until_ns)
{
    for (int i = 0; i < TURN_TRIES; i++) {
        uint64_t now = fgpu_now(), until = now + TURN_NS, was = atomic_load(busy_until_ns);
        if (was <= now && atomic_compare_exchange_strong(busy_until_ns, &was, until)) return until;
        syscall(SYS_sched_yield);
    }
    return 0;
}

void fgpu_end_turn(_Atomic uint64_t *busy_until_ns, uint64_t turn)
{
    if (turn) atomic_compare_exchange_strong(busy_until_ns, &turn, 0);
}
