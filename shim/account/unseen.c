/*
 * unseen.c: frees that no probe reports. Owns the number of synchronisations after which memory may have been freed.
 *
 * The agent corrects the kernel's ledger after NVML shows such a free. Until then, the requests of all programs of this
 * level wait (see reclaim.c). So the kernel writes the time of the free to the level's page.
 */
#include "account/account.h"

static _Atomic int unsettled; /* synchronisations after which memory that was freed in stream order may really be
                                 free */

void fgpu_frees_unseen(void) { atomic_store_explicit(&unsettled, FGPU_SYNCS, memory_order_relaxed); }
void fgpu_freed_unseen(void) { fgpu_admit_here(0, 0, FGPU_FREED, 0); }

void fgpu_freed_by_a_wait(void)
{
    int left = atomic_load_explicit(&unsettled, memory_order_relaxed);
    if (LIKELY(!left)) return;
    atomic_store_explicit(&unsettled, left - 1, memory_order_relaxed);
    fgpu_freed_unseen();
}
