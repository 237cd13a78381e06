/* flight.h: declarations for flight.c (turns of threads) and batches.c (launches under way). */
#ifndef FGPU_FLIGHT_H
#define FGPU_FLIGHT_H

#include "gate/gate.h"

#define LANES 32
#define BATCHES 64
#define GUESSES 64

/* All fields are atomic: a turn may expire, and then two threads use them. */
struct lane { /* a stream, between two batches */
    _Atomic uint64_t key;
    _Atomic(CUstream) stream;
    _Atomic(CUcontext) context;
    _Atomic uint64_t open;    /* launches */
    _Atomic uint64_t cost_ns; /* their estimated duration */
    _Atomic uint64_t guess_key;
    _Atomic uint64_t first_ns, last_ns;
};
struct batch { /* launches on one stream, and the event after them */
    _Atomic(CUevent) event;
    _Atomic(CUcontext) context;
    _Atomic uint64_t key, guess_key;
    _Atomic uint64_t launches; /* 0: free */
    _Atomic uint64_t cost_ns;
    _Atomic uint64_t first_ns, recorded_ns;
    _Atomic uint64_t unready_ns; /* when it was last found not done */
};
struct guess {
    _Atomic uint64_t key, ns;
};
struct device {
    _Atomic uint64_t busy_until_ns; /* the turn of a thread, which expires by itself */
    _Atomic uint64_t in_flight;
    _Atomic uint64_t done_at_ns;
    _Atomic uint64_t cost_ns; /* estimated, of all work in flight */
    _Atomic uint32_t batches_taken;
    _Atomic uint64_t base_ns; /* when the work in flight began to run */
    /* When the last batch was done, if that is known with little error, and when it was last found not done. */
    _Atomic uint64_t last_done_ns, last_unready_ns;
    struct lane lanes[LANES];
    struct batch batches[BATCHES];
    struct guess guesses[GUESSES];
};

HIDDEN struct guess *fgpu_guess_of(struct device *device, uint64_t key);
HIDDEN struct lane *fgpu_lane_of(struct device *device,
                                 const struct fgpu_launch *launch);     /* afterwards the lane is the stream's own */
HIDDEN void fgpu_batch_close(struct device *device, struct lane *lane); /* the lane's context must be current */
HIDDEN void fgpu_batches_complete(struct device *device); /* record an event after each launch without one */
HIDDEN void fgpu_batches_look(struct device *device);     /* query the events, and count finished batches as done */
HIDDEN void fgpu_batches_rest(struct device *device, struct fgpu_mark mark, uint64_t undone_ns, uint64_t now);
HIDDEN void fgpu_batches_forget(struct device *device, CUcontext context);
HIDDEN void fgpu_batches_leave(struct device *device, CUcontext context);
HIDDEN void fgpu_batches_finish(struct device *device, uint64_t key, bool ends);

#endif
