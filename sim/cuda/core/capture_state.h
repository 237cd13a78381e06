/* The captures of the process, and what they forbid. graph/capture.c records nodes. Files that only check
 * whether a stream captures, or break a capture, use this header. */
#ifndef FGPU_SIM_CUDA_CORE_CAPTURE_STATE_H
#define FGPU_SIM_CUDA_CORE_CAPTURE_STATE_H

#include "cuda/core/driver.h"

struct capture {
    uint64_t id, thread; /* thread: the value of capture_thread() in the thread that began the capture */
    CUstreamCaptureMode mode;
    bool broken;
    struct graph *graph;
    void (*discard)(struct graph *graph); /* frees the graph of a capture that ends without a result */
    struct stream *origin;
    struct capture *next;
};

/* Returns a number of the calling thread that no other thread gets. */
uint64_t capture_thread(void);
/* Adds a capture to the list. Its stream `origin` becomes a capturing stream. */
void capture_begin(struct capture *capture);
/* Takes all streams out of the capture and frees it. Its graph remains. */
void capture_stop(struct capture *capture);
/* Does the same, and frees the graph. */
void capture_discard(struct capture *capture);
/* Invalidates a capture; NULL: does nothing. */
void capture_break(struct capture *capture);
/* Takes a stream that is about to be destroyed out of its capture. */
void capture_abandon(struct stream *stream);
/* Discards the captures that began in streams of the context. */
void captures_end(struct context *context);
bool capture_is_alive(const struct capture *capture, uint64_t id);
/* Returns the id of a capture; NULL: 0. */
uint64_t capture_id(const struct capture *capture);
/* Returns a capture in a stream for which the context's legacy stream waits, or NULL. */
struct capture *capture_of_blocking(const struct context *context);

/* Checks a potentially unsafe call. If captures forbid it, breaks them and returns
 * CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED. */
CUresult capture_permits(void);
/* Checks the use of a stream for work, or for a query of its work. */
CUresult capture_permits_use(struct stream *stream);
/* Checks a wait for all work of a context. */
CUresult capture_permits_waiting(struct context *context);

/* Adds nodes to a tail, without duplicates. */
CUresult tail_join(struct tail *tail, const struct tail *more);
CUresult tail_copy(struct tail *tail, const struct tail *from);
void tail_clear(struct tail *tail);

#endif
