/*
 * graph_growth.c: admissions for graphs. Owns nothing; the kernel owns the sum.
 */
#include <errno.h>

#include "account/graph_memory.h"

/* Adjust to the memory that the driver has allocated: request the difference, or release it. */
void fgpu_graphs_follow(int ordinal)
{
    uint64_t used, reserved;
    struct portion *portion = &fgpu_graph_memory[ordinal].portion;
    if (!fgpu_graphs_measured(ordinal, &used, &reserved)) return;
    if (!fgpu_ask_up_to(portion, ordinal, reserved, NULL)) fgpu_give_back_above(portion, reserved);
}

/* Request the memory of a graph. Graphs that never run at the same time share memory, so the sum of their peaks is more
 * than they need. If that sum does not fit, a graph may run if its peak fits into the memory that the device holds for
 * graphs and that no graph has left to the program, as long as all of that was admitted. */
CUresult fgpu_graphs_ask_for(int ordinal, uint64_t peak, struct patience *patience)
{
    uint64_t used, reserved;
    struct portion *portion = &fgpu_graph_memory[ordinal].portion;
    if (!fgpu_graphs_measured(ordinal, &used, &reserved))
        return fgpu_ask_up_to(portion, ordinal, atomic_load(&portion->admitted) + peak, patience);
    uint64_t need = used + peak > reserved ? used + peak : reserved;
    uint64_t admitted = atomic_load(&portion->admitted);
    if (need > admitted && need - admitted > fgpu_room(ordinal).left &&
        peak + atomic_load(&fgpu_graph_memory[ordinal].kept) <= reserved && reserved <= admitted)
        return CUDA_SUCCESS;
    return fgpu_ask_up_to(portion, ordinal, need, patience);
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
