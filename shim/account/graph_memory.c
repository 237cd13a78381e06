/*
 * graph_memory.c: memory of graphs. Owns the facts that were read from graphs that allocate; the kernel owns the sum.
 */
#include <errno.h>

#include "account/graph_memory.h"

#define EXECS 64

static struct fgpu_graph_exec execs[EXECS]; /* a graph without room in this table requests its memory after its
                                               launch */
struct fgpu_graph_memory fgpu_graph_memory[FGPU_DEVICES];
_Atomic int fgpu_graphs_crowded;
_Atomic bool fgpu_graphs_allocate;

bool fgpu_graphs_measured(int ordinal, uint64_t *used, uint64_t *reserved)
{
    __typeof__(&cuDeviceGetGraphMemAttribute) get = REAL(cuDeviceGetGraphMemAttribute);
    cuuint64_t in_use = 0, in_all = 0;
    if (!get || get(ordinal, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, &in_use) != CUDA_SUCCESS ||
        get(ordinal, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT, &in_all) != CUDA_SUCCESS)
        return false;
    *used = in_use > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_use;
    *reserved = in_all > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_all;
    return true;
}

bool fgpu_graphs_give_back_above(struct fgpu_graph_memory *m, uint64_t keep)
{
    uint64_t admitted = atomic_load(&m->admitted);
    while (admitted > keep)
        if (atomic_compare_exchange_weak(&m->admitted, &admitted, keep)) {
            fgpu_give_back(atomic_load(&m->index), admitted - keep);
            return true;
        }
    return false;
}

void fgpu_graphs_forget_places(CUdevice ordinal)
{
    for (unsigned i = 0; i < EXECS; i++)
        if (ordinal < 0 || atomic_load(&execs[i].ordinal) == ordinal) atomic_store(&execs[i].stream, 0);
}

bool fgpu_graphs_yield(CUdevice ordinal)
{
    uint64_t used, reserved;
    if (ordinal < 0 || ordinal >= FGPU_DEVICES || !atomic_load(&fgpu_graph_memory[ordinal].admitted)) return false;
    __typeof__(&cuDeviceGraphMemTrim) trim = REAL(cuDeviceGraphMemTrim);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    fgpu_graphs_forget_places(ordinal);
    if (trim) trim(ordinal);
    bool more = fgpu_graphs_measured(ordinal, &used, &reserved) &&
                fgpu_graphs_give_back_above(&fgpu_graph_memory[ordinal], reserved);
    fgpu_unrelax(mode);
    errno = saved;
    return more;
}

/* -- executable graphs */

struct fgpu_graph_exec *fgpu_graph_exec_of(CUgraphExec handle)
{
    for (unsigned i = 0; i < EXECS; i++)
        if (atomic_load_explicit(&execs[i].handle, memory_order_acquire) == (uint64_t)handle) return &execs[i];
    return NULL;
}

void fgpu_graph_exec_keep(CUgraphExec handle, const struct fgpu_graph_reading *r)
{
    struct fgpu_graph_exec *exec = fgpu_graph_exec_of(handle); /* a destroyed graph may have had the same handle */
    if (!r->peak) {
        if (exec) atomic_store(&exec->handle, 0);
        return;
    }
    atomic_store(&fgpu_graphs_allocate, true);
    for (unsigned i = 0; !exec && i < EXECS; i++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&execs[i].handle, &none, 1)) exec = &execs[i];
    }
    if (!exec) {
        atomic_store(&fgpu_graphs_crowded, r->ordinal + 1);
        return;
    }
    atomic_store(&exec->peak, r->peak);
    atomic_store(&exec->kept, r->live);
    atomic_store(&exec->stream, 0);
    atomic_store(&exec->ordinal, r->ordinal);
    atomic_store_explicit(&exec->handle, (uint64_t)handle, memory_order_release);
}
