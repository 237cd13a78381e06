/*
 * unseen.c: frees that no probe reports. Owns the time of the last of them in this process.
 *
 * The agent corrects the kernel's ledger after NVML shows such a free. Until then, the requests of all programs of this
 * level wait (see reclaim.c). So the kernel writes the time of the free to the level's page.
 */
#include "account/account.h"

static _Atomic uint64_t freed_ns;
static _Atomic int unsettled; /* synchronisations after which memory that was freed in stream order may really be
                                 free */

void fgpu_frees_unseen(void) { atomic_store_explicit(&unsettled, FGPU_SYNCS, memory_order_relaxed); }

void fgpu_freed_unseen(void)
{
    atomic_store_explicit(&freed_ns, fgpu_now(), memory_order_relaxed);
    fgpu_admit_here(0, 0, FGPU_FREED, 0);
}

/* In a time namespace, the page's time is by another clock. If it is in the future, it does not count. */
uint64_t fgpu_freed_unseen_ns(struct fgpu_view view)
{
    uint64_t own = atomic_load_explicit(&freed_ns, memory_order_relaxed);
    uint64_t any = __atomic_load_n(&view.usage->freed_ns, __ATOMIC_RELAXED);
    return any > own && any <= fgpu_now() ? any : own;
}

void fgpu_freed_by_a_wait(void)
{
    int left = atomic_load_explicit(&unsettled, memory_order_relaxed);
    if (LIKELY(!left)) return;
    atomic_store_explicit(&unsettled, left - 1, memory_order_relaxed);
    fgpu_freed_unseen();
}
