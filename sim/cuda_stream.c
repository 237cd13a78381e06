/* Streams and events. Work is a moment in the future at which it will be done: nothing runs, but waiting takes as long
 * as it should. */
#include "cuda_state.h"

#include <stdlib.h>
#include <time.h>

uint64_t stream_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* NULL means the legacy or the per-thread default stream, depending on which twin of a function was called. */
struct stream *stream_find(struct context *context, CUstream handle, bool per_thread)
{
    if (!handle) return per_thread ? &context->per_thread : &context->legacy;
    if (handle == CU_STREAM_LEGACY) return &context->legacy;
    if (handle == CU_STREAM_PER_THREAD) return &context->per_thread;
    for (struct stream *s = context->streams; s; s = s->next)
        if (s == (struct stream *)handle) return s;
    return NULL;
}

/* The context may be destroyed by another thread meanwhile: whoever waits looks again afterwards. */
void stream_wait(uint64_t until_ns)
{
    if (until_ns <= stream_now()) return;
    struct timespec ts = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    sim_unlock();
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL))
        ;
    sim_lock();
}

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* When all work of a context will be done, if no more is added. */
uint64_t context_done_ns(const struct context *context)
{
    uint64_t done = later(context->legacy.done_ns, context->per_thread.done_ns);
    for (const struct stream *s = context->streams; s; s = s->next) done = later(done, s->done_ns);
    return done;
}

void stream_work(struct context *context, struct stream *stream, uint64_t ns)
{
    uint64_t start = later(stream_now(), stream->done_ns);
    bool blocking = !(stream->flags & CU_STREAM_NON_BLOCKING);
    /* The legacy stream waits for every blocking stream of its context, and they for it. */
    if (stream == &context->legacy) {
        for (const struct stream *s = context->streams; s; s = s->next)
            if (!(s->flags & CU_STREAM_NON_BLOCKING)) start = later(start, s->done_ns);
    } else if (blocking) {
        start = later(start, context->legacy.done_ns);
    }
    stream->done_ns = start + ns;
}

/* Destroying a context does not wait for its work: the driver kills it. */
void streams_end(struct context *context)
{
    captures_end(context);
    while (context->streams) {
        struct stream *stream = context->streams;
        context->streams = stream->next;
        tail_clear(&stream->tail);
        free(stream);
    }
    events_end(context);
}

/* A named stream, or the default one of the current context, with the lock held. */
CUresult stream_enter(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    *stream = stream_find(*context, handle, per_thread);
    return *stream ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_HANDLE);
}

/* With the lock held: a stream to give work to, or the reason why it takes none while something captures. */
CUresult stream_enter_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = stream_enter(handle, per_thread, context, stream);
    if (result) return result;
    result = capture_permits_use(*stream);
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

static CUresult create(CUstream *out, unsigned flags, int priority)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!out || flags & ~(unsigned)CU_STREAM_NON_BLOCKING) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    stream->flags = flags;
    stream->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    stream->id = ++driver.next_id + 2;
    stream->context = context;
    stream->next = context->streams;
    context->streams = stream;
    *out = (CUstream)stream;
    return sim_leave(CUDA_SUCCESS);
}

API cuStreamCreate(CUstream *phStream, unsigned int flags) { return create(phStream, flags, 0); }

API cuStreamCreateWithPriority(CUstream *phStream, unsigned int flags, int priority)
{
    return create(phStream, flags, priority);
}

API cuStreamDestroy_v2(CUstream hStream)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(hStream, false, &context, &stream);
    if (result) return result;
    if (stream == &context->legacy || stream == &context->per_thread) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture) capture_abandon(stream);
    /* Work in flight goes on to its end: the context must still wait for it. */
    context->legacy.done_ns = later(context->legacy.done_ns, stream->done_ns);
    struct stream **at = &context->streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    free(stream);
    return sim_leave(CUDA_SUCCESS);
}

/* Waiting and asking are for streams whose work is done, not recorded; and potentially unsafe even then. */
static CUresult enter_done(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = stream_enter_work(handle, per_thread, context, stream);
    if (result) return result;
    if ((*stream)->capture) {
        capture_break((*stream)->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    result = capture_permits();
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

static CUresult synchronize(CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_done(handle, per_thread, &context, &stream);
    if (result) return result;
    int device = context->device;
    stream_wait(stream == &context->legacy ? context_done_ns(context) : stream->done_ns);
    pools_settle(device);
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamSynchronize, (CUstream hStream), synchronize(hStream, per_thread))

static CUresult query(CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_done(handle, per_thread, &context, &stream);
    if (result) return result;
    return sim_leave(stream->done_ns > stream_now() ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamQuery, (CUstream hStream), query(hStream, per_thread))
