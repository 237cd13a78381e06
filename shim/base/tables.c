/*
 * tables.c: memory for tables that most programs never use, mapped at the first use. Owns no table.
 *
 * Tables are zero after a fork: the child has no driver, and nothing is admitted for it yet. Older kernels cannot wipe
 * them at a fork. There the child's driver refuses all calls anyway.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "base/shim.h"

void *fgpu_table(_Atomic(void *) *table, size_t bytes)
{
    void *found = atomic_load_explicit(table, memory_order_acquire), *none = NULL;
    if (LIKELY(found)) return found;
    int saved = errno;
    found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) {
        found = NULL;
    } else {
        madvise(found, bytes, MADV_WIPEONFORK);
        if (!atomic_compare_exchange_strong(table, &none, found)) {
            munmap(found, bytes);
            found = none;
        }
    }
    errno = saved;
    return found;
}
