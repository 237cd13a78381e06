/*
 * graph_growth.c: admissions for graphs. Owns nothing; the kernel owns the sum.
 */
#include <errno.h>

#include "account/graph_memory.h"

static CUresult ask_up_to(int ordinal, uint64_t need, struct patience *patience)
{
    struct fgpu_graph_memory *m = &fgpu_graph_memory[ordinal];
    uint64_t admitted = atomic_load(&m->admitted);
    if (need <= admitted) return CUDA_SUCCESS;
    struct admission admission = fgpu_admission_with(patience, ordinal, need - admitted, FGPU_POOL);
    if (admission.index >= 0) {
        atomic_store(&m->index, admission.index);
        atomic_fetch_add(&m->admitted, admission.bytes);
    }
    return admission.refusal;
}

/* Adjust to the memory that the driver has allocated: request the difference, or release it. */
void fgpu_graphs_follow(int ordinal)
{
    uint64_t used, reserved;
    if (!fgpu_graphs_measured(ordinal, &used, &reserved)) return;
    if (!ask_up_to(ordinal, reserved, NULL)) fgpu_graphs_give_back_above(&fgpu_graph_memory[ordinal], reserved);
}

/* Request the memory of a graph. Graphs that never run at the same time share memory, so the sum of their peaks is more
 * than they need. If that sum does not fit, a graph may run if its peak fits into the memory that the device holds for
 * graphs and that no graph has left to the program, as long as all of that was admitted. */
CUresult fgpu_graphs_ask_for(int ordinal, uint64_t peak)
{
    uint64_t used, reserved;
    struct patience patience = {0};
    if (!fgpu_graphs_measured(ordinal, &used, &reserved))
        return ask_up_to(ordinal, atomic_load(&fgpu_graph_memory[ordinal].admitted) + peak, &patience);
    uint64_t need = used + peak > reserved ? used + peak : reserved;
    uint64_t admitted = atomic_load(&fgpu_graph_memory[ordinal].admitted);
    if (need > admitted && need - admitted > fgpu_room(ordinal).left &&
        peak + atomic_load(&fgpu_graph_memory[ordinal].kept) <= reserved && reserved <= admitted)
        return CUDA_SUCCESS;
    return ask_up_to(ordinal, need, &patience);
}

/* A context was destroyed, or the program has trimmed the graphs' memory: charge what the device now holds for
 * graphs. */
void fgpu_graphs_measure(CUdevice ordinal)
{
    if (!atomic_load(&fgpu_graphs_allocate)) return;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    fgpu_graphs_forget_places(ordinal);
    for (int i = 0; i < FGPU_DEVICES; i++)
        if (ordinal < 0 || ordinal == i) fgpu_graphs_follow(i);
    fgpu_unrelax(mode);
    errno = saved;
}
