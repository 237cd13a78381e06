/* graph_memory.h: memory that graphs allocate for themselves. */
#ifndef FGPU_GRAPH_MEMORY_H
#define FGPU_GRAPH_MEMORY_H

#include "account/account.h"

#define FGPU_GRAPH_LIVE 64

/* Facts about a graph: the most bytes that its allocation nodes hold at the same time, and the bytes that they hold at
 * its end. */
struct fgpu_graph_reading {
    uint64_t live, peak;
    int ordinal;
    unsigned known;
    struct {
        CUdeviceptr pointer;
        uint64_t bytes;
    } nodes[FGPU_GRAPH_LIVE];
};

struct fgpu_graph_exec {
    _Atomic uint64_t handle;
    _Atomic uint64_t peak;
    _Atomic uint64_t kept;   /* bytes that it leaves to the program after its run */
    _Atomic uint64_t stream; /* key of the stream on which it last ran with its memory requested; 0: none */
    _Atomic int ordinal;
};

struct fgpu_graph_memory {
    struct portion portion;
    _Atomic uint64_t kept; /* left by graphs that ran, at most: nothing reports when the program frees them */
};

/* -- graph_reading.c */
HIDDEN void fgpu_graph_read(struct fgpu_graph_reading *reading, CUgraph graph);

/* -- graph_memory.c */
extern HIDDEN struct fgpu_graph_memory fgpu_graph_memory[FGPU_DEVICES];
extern HIDDEN _Atomic int fgpu_graphs_crowded;   /* n + 1: graphs without an entry allocate memory of device n */
extern HIDDEN _Atomic bool fgpu_graphs_allocate; /* a graph of this process allocates */
HIDDEN struct fgpu_graph_exec *fgpu_graph_exec_of(CUgraphExec handle);
HIDDEN void fgpu_graph_exec_keep(CUgraphExec handle, const struct fgpu_graph_reading *reading);
HIDDEN void fgpu_graphs_forget_places(CUdevice ordinal);
HIDDEN bool fgpu_graphs_measured(int ordinal, uint64_t *used, uint64_t *reserved);
HIDDEN bool fgpu_graphs_yield(CUdevice ordinal);

/* -- graph_growth.c */
HIDDEN void fgpu_graphs_follow(int ordinal);
HIDDEN CUresult fgpu_graphs_ask_for(int ordinal, uint64_t peak, struct patience *patience);
HIDDEN void fgpu_graphs_measure(CUdevice ordinal); /* < 0: on all devices */

#endif
