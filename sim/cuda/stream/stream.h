/* Streams: when their work will be done, and waiting for it. */
#ifndef FGPU_SIM_CUDA_STREAM_STREAM_H
#define FGPU_SIM_CUDA_STREAM_STREAM_H

#include "cuda/core/capture_state.h"
#include "cuda/core/driver.h"

/* stream.c */

struct stream *stream_find(struct context *context, CUstream stream, bool per_thread);
/* Returns when all work of the context will be done, by its clock. */
uint64_t context_done_ns(const struct context *context);
/* Adds a kernel that takes `ns`. */
CUresult stream_work(struct context *context, struct stream *stream, uint64_t ns, const struct party *party);
/* Adds a copy that takes `ns`. */
CUresult stream_copy(struct context *context, struct stream *stream, uint64_t ns, enum engine engine);
/* Waits for all work in the stream. Releases the lock while it sleeps. */
void stream_wait(struct context *context, struct stream *stream);
/* Returns the earliest time at which work that is given to the stream now can begin. */
uint64_t stream_ready(const struct context *context, const struct stream *stream);
/* Takes the lock, and finds a stream of the current context. */
CUresult stream_enter(CUstream handle, bool per_thread, struct context **context, struct stream **stream);
/* Does the same, and fails if captures forbid the use of the stream. */
CUresult stream_enter_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream);
/* Does the same for calls that accept a stream of any context, and returns that context: calls that allocate and free
 * in the stream's order, wait for it, or query it. */
CUresult stream_enter_any(CUstream handle, bool per_thread, struct context **context, struct stream **stream);
CUresult stream_enter_any_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream);
/* Frees the streams of a context. */
void streams_end(struct context *context);

/* queue.c: streams whose work the server does */

/* Returns whether the work with this index is done, and when it was, by the context's clock. `done_ns` may be NULL. */
bool queue_reached(struct context *context, uint64_t queue, uint64_t index, uint64_t *done_ns);
/* Waits until the work with this index is done. Releases the lock while it sleeps, and so does queues_wait. */
void queue_wait(struct context *context, uint64_t queue, uint64_t index);
/* Waits until no stream of the context is a queue with work. */
void queues_wait(struct context *context);
/* Returns whether the stream is a queue with work. */
bool queue_is_used(struct context *context, struct stream *stream);
/* Sends work to the server, which does it after all earlier work of the stream. */
CUresult queue_add(struct context *context, struct stream *stream, uint64_t ns, const struct party *party);

#endif
