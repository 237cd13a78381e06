/* flight.h: between flight.c (whose turn it is) and marks.c (what is under way). */
#ifndef FGPU_FLIGHT_H
#define FGPU_FLIGHT_H

#include "gate.h"

#define LANES 32
#define MARKS 64
#define GUESSES 64

/* All of it atomics: a turn may run out, and then two are in here. */
struct lane { /* a stream, between two marks */
    _Atomic uint64_t key;
    _Atomic(CUstream) stream;
    _Atomic(CUcontext) context;
    _Atomic uint64_t open;    /* launches */
    _Atomic uint64_t cost_ns; /* what they should take */
    _Atomic uint64_t first_ns, last_ns;
};
struct mark { /* a batch */
    _Atomic(CUevent) event;
    _Atomic(CUcontext) context;
    _Atomic uint64_t key, guess_key;
    _Atomic uint64_t launches; /* 0: free */
    _Atomic uint64_t cost_ns;
    _Atomic uint64_t first_ns, recorded_ns;
    _Atomic uint64_t unready_ns; /* when it was last seen not to be done */
};
struct guess {
    _Atomic uint64_t key, ns;
};
struct device {
    _Atomic uint64_t busy_until_ns; /* the turn of a thread; runs out by itself */
    _Atomic uint64_t in_flight;
    _Atomic uint64_t done_at_ns;
    _Atomic uint64_t cost_ns; /* of all that is in flight, as guessed */
    _Atomic uint32_t marks_taken;
    _Atomic uint64_t base_ns;      /* what is in flight has run since then */
    _Atomic uint64_t last_done_ns; /* of the last batch, where that is known closely, and when it was not done yet */
    _Atomic uint64_t last_unready_ns;
    struct lane lanes[LANES];
    struct mark marks[MARKS];
    struct guess guesses[GUESSES];
};

HIDDEN struct guess *fgpu_guess_of(struct device *device, uint64_t key);
HIDDEN struct lane *fgpu_lane_of(struct device *device, const struct fgpu_launch *launch); /* its own from now on */
HIDDEN void fgpu_mark(struct device *device, struct lane *lane, uint64_t guess_key);       /* its context is current */
HIDDEN void fgpu_marks_complete(struct device *device); /* one behind every launch that has none */
HIDDEN void fgpu_marks_look(struct device *device);     /* which are done */
HIDDEN void fgpu_marks_rest(struct device *device, uint64_t key, CUcontext context, uint64_t began_ns, uint64_t now);
HIDDEN void fgpu_marks_forget(struct device *device, CUcontext context);
HIDDEN void fgpu_marks_leave(struct device *device, CUcontext context);
HIDDEN void fgpu_marks_finish(struct device *device, uint64_t key, bool ends);

#endif
