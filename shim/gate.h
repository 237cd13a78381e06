/* gate.h: between launch.c and graph.c (what launches), gate.c (whether it may) and flight.c (what is under way). */
#ifndef FGPU_GATE_H
#define FGPU_GATE_H

#include "pool.h"

struct fgpu_launch { /* one call that gives work to a device */
    int index;       /* the ledger's; -1: nobody schedules it there, nothing is counted */
    CUstream stream; /* never NULL: the default ones by their own handles */
    uint64_t key;    /* of the stream, as pool.c knows it */
    uint64_t graph;  /* 0: a kernel */
};

/* -- gate.c */
HIDDEN bool fgpu_is_gated(void);                        /* on any device: a few nanoseconds, and no driver call */
HIDDEN void fgpu_gate_enter(struct fgpu_launch *launch, /* index -1 */
                            CUstream stream, bool per_thread, CUgraphExec graph);
HIDDEN CUresult fgpu_gate_leave(const struct fgpu_launch *launch, CUresult result);

/* Around a call of the driver that waits for work, or asks whether it is done. */
struct fgpu_rest {
    uint64_t began_ns; /* 0: nothing is gated */
};
HIDDEN struct fgpu_rest fgpu_rest_begin(void);
HIDDEN void fgpu_rest_stream(struct fgpu_rest rest, CUresult result, CUstream stream, bool per_thread);
HIDDEN void fgpu_rest_context(struct fgpu_rest rest, CUresult result, CUcontext context); /* NULL: the current one */
HIDDEN void fgpu_rest_event(struct fgpu_rest rest, CUresult result);
HIDDEN void fgpu_stream_ends(CUstream stream);
HIDDEN void fgpu_stream_captures(CUstream stream, bool per_thread); /* soon: what it was given must be marked before */
HIDDEN void fgpu_context_ends(CUcontext context);
HIDDEN void fgpu_primary_ends(CUdevice ordinal);

/* -- flight.c: one of these per device, by the ledger's index */
HIDDEN uint64_t fgpu_flight_count(int index); /* launches not known to be done */
HIDDEN uint64_t fgpu_flight_until(int index); /* when they should be */
HIDDEN bool fgpu_flight_begin(int index);     /* one more, before the gate is read; false: no memory to count in */
HIDDEN void fgpu_flight_cancel(int index);
HIDDEN void fgpu_flight_launched(const struct fgpu_launch *launch, uint64_t budget_ns, uint64_t now);
HIDDEN bool fgpu_flight_has_room(int index, uint64_t budget_ns);
HIDDEN bool fgpu_flight_is_over(int index); /* marks what has no mark yet, and looks */
HIDDEN bool fgpu_flight_look(int index);    /* at the batches; false: there is none */
HIDDEN void fgpu_flight_rested(int index, uint64_t key, CUcontext context, uint64_t began_ns);
HIDDEN bool fgpu_flight_is_used(int index);
HIDDEN void fgpu_flight_forget(int index, CUcontext context); /* NULL: all but what cuCtxCreate gave */
HIDDEN void fgpu_flight_leave(int index, CUcontext context);  /* it ends, and its work goes on */
HIDDEN void fgpu_flight_mark(int index, uint64_t key, bool ends);

/* -- contexts.c */
HIDDEN void fgpu_context_made(CUcontext context);
HIDDEN void fgpu_primary_seen(CUdevice device, CUcontext context); /* retained */
HIDDEN void fgpu_managed_made(CUdeviceptr at);
HIDDEN bool fgpu_context_is_created(CUcontext context); /* and has not ended */
HIDDEN bool fgpu_context_is_known(CUcontext context);   /* likewise, or a primary one that was retained */

#endif
