/*
 * unseen.c: frees that no probe sees. Owns the time of the last of them.
 *
 * The kernel's ledger learns of such a free by NVML, from the agent.
 */
#include "account/account.h"

static _Atomic uint64_t freed_ns;
static _Atomic bool waits; /* memory was freed in the order of a stream, and the program has not waited since */

void fgpu_frees_unseen(void) { atomic_store_explicit(&waits, true, memory_order_relaxed); }
void fgpu_freed_unseen(void) { atomic_store_explicit(&freed_ns, fgpu_now(), memory_order_relaxed); }
uint64_t fgpu_freed_unseen_ns(void) { return atomic_load_explicit(&freed_ns, memory_order_relaxed); }

void fgpu_freed_by_a_wait(void)
{
    if (atomic_load_explicit(&waits, memory_order_relaxed) && atomic_exchange(&waits, false)) fgpu_freed_unseen();
}
