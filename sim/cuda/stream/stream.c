/* Streams. For each work, a stream has only the time of the context's clock at which the work will be done. Nothing
 * runs, but waiting takes as long as it should. */
#include "cuda/stream/stream.h"

#include <stdlib.h>

/* NULL stands for the legacy or the per-thread default stream, depending on the variant of the function that was
 * called. */
struct stream *stream_find(struct context *context, CUstream handle, bool per_thread)
{
    if (!handle) return per_thread ? &context->per_thread : &context->legacy;
    if (handle == CU_STREAM_LEGACY) return &context->legacy;
    if (handle == CU_STREAM_PER_THREAD) return &context->per_thread;
    for (struct stream *s = context->streams; s; s = s->next)
        if (s == (struct stream *)handle) return s;
    return NULL;
}

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

uint64_t context_done_ns(const struct context *context)
{
    uint64_t done = later(context->legacy.done_ns, context->per_thread.done_ns);
    for (const struct stream *s = context->streams; s; s = s->next) done = later(done, s->done_ns);
    return done;
}

uint64_t stream_ready(const struct context *context, const struct stream *stream)
{
    uint64_t start = stream->done_ns;
    bool blocking = !(stream->flags & CU_STREAM_NON_BLOCKING);
    /* The legacy stream waits for every blocking stream of its context, and they wait for it. */
    if (stream == &context->legacy) {
        for (const struct stream *s = context->streams; s; s = s->next)
            if (!(s->flags & CU_STREAM_NON_BLOCKING)) start = later(start, s->done_ns);
    } else if (blocking) {
        start = later(start, context->legacy.done_ns);
    }
    return start;
}

CUresult stream_work(struct context *context, struct stream *stream, uint64_t ns, const struct party *party)
{
    stream->done_ns = later(stream->done_ns, stream_ready(context, stream));
    if (queue_is_used(context, stream) || (party && party->of)) return queue_add(context, stream, ns, party);
    stream->done_ns = context_work(context, ns, stream->done_ns);
    return CUDA_SUCCESS;
}

/* A copy takes none of the device's time. Copies wait for each other if one engine does them. */
CUresult stream_copy(struct context *context, struct stream *stream, uint64_t ns, enum engine engine)
{
    if (queue_is_used(context, stream)) return queue_add(context, stream, ns, NULL);
    uint64_t *engine_ns = &context->engines_ns[engine], start = stream_ready(context, stream);
    *engine_ns = stream->done_ns = context_start(context, later(start, *engine_ns)) + ns;
    return CUDA_SUCCESS;
}

/* For the default stream, waits for all work for which that stream itself waits. */
void stream_wait(struct context *context, struct stream *stream)
{
    uint64_t id = stream->id, index = stream->queue_index;
    uint64_t until = stream == &context->legacy ? context_done_ns(context) : stream->done_ns;
    if (stream == &context->legacy)
        queues_wait(context);
    else if (index)
        queue_wait(context, id, index);
    if (context->alive) context_wait(context, until);
}

/* The work of a context that is destroyed is killed, not waited for. */
void streams_end(struct context *context)
{
    while (context->streams) {
        struct stream *stream = context->streams;
        context->streams = stream->next;
        tail_clear(&stream->tail);
        free(stream);
    }
}

CUresult stream_enter(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    *stream = stream_find(*context, handle, per_thread);
    return *stream ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_HANDLE);
}

/* Finds a stream by its handle in any context. A default stream is that of the current context. */
CUresult stream_enter_any(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    *stream = stream_find(*context, handle, per_thread);
    for (struct context *c = driver.contexts; c && !*stream; c = c->next)
        if ((*stream = stream_find(c, handle, per_thread))) *context = c;
    return *stream ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_HANDLE);
}

CUresult stream_enter_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = stream_enter(handle, per_thread, context, stream);
    if (result) return result;
    result = capture_permits_use(*stream);
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

CUresult stream_enter_any_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = stream_enter_any(handle, per_thread, context, stream);
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
    result = stream ? growth_stream(context) : CUDA_ERROR_OUT_OF_MEMORY;
    if (result) {
        free(stream);
        return sim_leave(result);
    }
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

static CUresult destroy(CUstream hStream)
{
    if (!hStream) return CUDA_ERROR_INVALID_HANDLE;
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(hStream, false, &context, &stream);
    if (result) return result;
    if (stream == &context->legacy || stream == &context->per_thread) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture) capture_abandon(stream);
    /* Work in flight is still done, and the context must wait for it. */
    context->legacy.done_ns = later(context->legacy.done_ns, stream->done_ns);
    struct stream **at = &context->streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    free(stream);
    growth_stream_ends(context);
    return sim_leave(CUDA_SUCCESS);
}

API cuStreamDestroy_v2(CUstream hStream) { return destroy(hStream); }

API cuStreamDestroy(CUstream hStream) { return destroy(hStream); }
