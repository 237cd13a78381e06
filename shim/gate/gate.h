/* gate.h: the interfaces of gate.c (whether a launch may proceed) and flight.c (launches under way), for the hooks. */
#ifndef FGPU_GATE_H
#define FGPU_GATE_H

#include "account/stream.h"

struct fgpu_launch { /* one call that launches work on a device */
    int index;       /* the ledger's index; -1: no gatekeeper schedules launches there, and no launch is counted */
    CUstream stream; /* never NULL: a default stream has a handle too */
    uint64_t key;    /* of the stream, by fgpu_stream_key */
    uint64_t graph;  /* 0: a kernel */
};

/* -- waits.c */
struct fgpu_mark {     /* work that is done at the same time */
    uint64_t key;      /* of its stream; 0: the work of a context, or, without a context, no known work */
    CUcontext context; /* NULL: the key is enough */
    uint64_t until_ns; /* the work was launched before this time */
};
/* For use before and after a driver call that waits for work, queries whether it is done, or records an event. */
struct fgpu_rest {
    uint64_t began_ns; /* 0: nothing is gated */
};
HIDDEN struct fgpu_rest fgpu_rest_begin(void);
HIDDEN void fgpu_rest_stream(struct fgpu_rest rest, CUresult result, CUstream stream, bool per_thread);
HIDDEN void fgpu_rest_context(struct fgpu_rest rest, CUresult result, CUcontext context); /* NULL: the current one */
HIDDEN void fgpu_rest_event(struct fgpu_rest rest, CUresult result, CUevent event);
HIDDEN void fgpu_event_made(CUresult result, const CUevent *event);
HIDDEN void fgpu_event_recorded(struct fgpu_rest rest, CUresult result, CUevent event, CUstream stream,
                                bool per_thread);

/* -- gate.c */
HIDDEN bool fgpu_is_gated(void); /* on any device; takes a few nanoseconds, and makes no driver call */

/* Wait until the launch may proceed, and fill `launch`. Its index is -1 if the launch is not counted. */
HIDDEN void fgpu_gate_enter(struct fgpu_launch *launch, CUstream stream, bool per_thread, CUgraphExec graph);
HIDDEN CUresult fgpu_gate_leave(const struct fgpu_launch *launch, CUresult result);

/* Record that the work of `mark` is done. The call that showed this began at `began_ns`; at `undone_ns` the work was
 * last found not done. */
HIDDEN void fgpu_gate_rested(struct fgpu_mark mark, uint64_t began_ns, uint64_t undone_ns);
HIDDEN void fgpu_stream_ends(CUstream stream);

/* Record the event after the stream's launches: the stream is about to capture. */
HIDDEN void fgpu_stream_captures(CUstream stream, bool per_thread);
HIDDEN void fgpu_context_ends(CUcontext context);
HIDDEN void fgpu_primary_ends(CUdevice ordinal);

/* -- flight.c: one state for each device, by the ledger's index */
HIDDEN uint64_t fgpu_flight_count(int index); /* launches that may be unfinished */
HIDDEN uint64_t fgpu_flight_until(int index); /* when they should be done */
HIDDEN bool fgpu_flight_begin(int index);     /* adds one, before the gate is read; false: no memory for the count */
HIDDEN void fgpu_flight_cancel(int index);
HIDDEN void fgpu_flight_launched(const struct fgpu_launch *launch, uint64_t budget_ns, uint64_t now);
HIDDEN bool fgpu_flight_has_room(int index, uint64_t budget_ns);
HIDDEN bool fgpu_flight_is_over(int index); /* record an event after each launch without one, and check the batches */
HIDDEN bool fgpu_flight_look(int index);    /* check the batches; false: there is none */
HIDDEN void fgpu_flight_rested(int index, struct fgpu_mark mark, uint64_t undone_ns);
HIDDEN bool fgpu_flight_is_used(int index);
HIDDEN void fgpu_flight_forget(int index, CUcontext context); /* NULL: all contexts except those that cuCtxCreate
                                                                 created */
HIDDEN void fgpu_flight_leave(int index, CUcontext context);  /* the context is destroyed, and its work continues */
HIDDEN void fgpu_flight_close(int index, uint64_t key, bool ends);

#endif
