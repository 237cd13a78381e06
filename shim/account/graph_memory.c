/*
 * graph_memory.c: memory of graphs. Owns the facts that were read from graphs that allocate; the kernel owns the sum.
 */
#include <errno.h>

#include "account/graph_memory.h"

#define EXECS 64

/* A table of EXECS, mapped when a graph that allocates is instantiated. A graph without room in it requests its memory
 * after its launch. */
static _Atomic(void *) table;
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

void fgpu_graphs_forget_places(CUdevice ordinal)
{
    struct fgpu_graph_exec *execs = atomic_load_explicit(&table, memory_order_acquire);
    for (unsigned i = 0; execs && i < EXECS; i++)
        if (ordinal < 0 || atomic_load(&execs[i].ordinal) == ordinal) atomic_store(&execs[i].stream, 0);
}

bool fgpu_graphs_yield(CUdevice ordinal)
{
    uint64_t used, reserved;
    if (ordinal < 0 || ordinal >= FGPU_DEVICES || !atomic_load(&fgpu_graph_memory[ordinal].portion.admitted))
        return false;
    __typeof__(&cuDeviceGraphMemTrim) trim = REAL(cuDeviceGraphMemTrim);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    fgpu_graphs_forget_places(ordinal);
    if (trim) trim(ordinal);
    bool more = fgpu_graphs_measured(ordinal, &used, &reserved) &&
                fgpu_give_back_above(&fgpu_graph_memory[ordinal].portion, reserved);
    fgpu_unrelax(mode);
    errno = saved;
    return more;
}

/* -- executable graphs */

struct fgpu_graph_exec *fgpu_graph_exec_of(CUgraphExec handle)
{
    struct fgpu_graph_exec *execs = atomic_load_explicit(&table, memory_order_acquire);
    for (unsigned i = 0; execs && i < EXECS; i++)
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
    struct fgpu_graph_exec *execs = fgpu_table(&table, EXECS * sizeof *execs);
    for (unsigned i = 0; execs && !exec && i < EXECS; i++) {
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
