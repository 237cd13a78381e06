/* Events. */
#include "cuda/async/async.h"
#include "cuda/core/gate.h"
#include "cuda/graph/graph.h"

#include <stdlib.h>

struct event {
    unsigned flags;
    bool recorded;
    uint64_t done_ns;            /* by the clock of the context in which the event was recorded */
    uint64_t queue, queue_index; /* index not 0: done when the queue has done this work, at an unknown time */
    struct context *context;
    struct capture *capture; /* not NULL: the event was last recorded in a capturing stream; the capture may be over */
    uint64_t capture_id;
    struct tail tail;
    struct event *next;
};

static void event_free(struct event *event)
{
    tail_clear(&event->tail);
    free(event);
}

void events_end(struct context *context)
{
    while (context->events) {
        struct event *event = context->events;
        context->events = event->next;
        event_free(event);
    }
}

/* Searches all contexts, since a program may use an event while another context is current. */
static struct event **find(CUevent handle)
{
    for (struct context *c = driver.contexts; c; c = c->next)
        for (struct event **at = &c->events; *at; at = &(*at)->next)
            if (*at == (struct event *)handle) return at;
    return NULL;
}

static CUresult enter_event(CUevent handle, struct event **event)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct event **at = handle ? find(handle) : NULL;
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *event = *at;
    return CUDA_SUCCESS;
}

API cuEventCreate(CUevent *phEvent, unsigned int flags)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!phEvent || flags & ~7u || (flags & CU_EVENT_INTERPROCESS && !(flags & CU_EVENT_DISABLE_TIMING)))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct event *event = calloc(1, sizeof *event);
    if (!event) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    event->flags = flags;
    event->next = context->events;
    context->events = event;
    *phEvent = (CUevent)event;
    return sim_leave(CUDA_SUCCESS);
}

API cuEventDestroy_v2(CUevent hEvent)
{
    struct event *event;
    CUresult result = enter_event(hEvent, &event);
    if (result) return result;
    *find(hEvent) = event->next;
    event_free(event);
    return sim_leave(CUDA_SUCCESS);
}

/* In a capturing stream an event marks a place in the graph. */
static CUresult record_captured(struct event *event, const struct stream *stream)
{
    event->recorded = false;
    event->capture = stream->capture;
    event->capture_id = capture_id(stream->capture);
    return tail_copy(&event->tail, &stream->tail);
}

/* An event is the time at which the work before it will be done. Recording it again moves it. */
static CUresult record(CUevent handle, unsigned flags, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    struct event **at = find(handle);
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (flags & ~1u) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (stream->capture) return sim_leave(record_captured(*at, stream));
    uint64_t now = context_now(context);
    (*at)->context = context;
    (*at)->capture = NULL;
    tail_clear(&(*at)->tail);
    (*at)->recorded = true;
    (*at)->done_ns = stream->done_ns > now ? stream->done_ns : now;
    (*at)->queue = stream->id;
    (*at)->queue_index = stream->queue_index;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuEventRecord, (CUevent hEvent, CUstream hStream), record(hEvent, 0, hStream, per_thread))
TWICE(_ptsz, cuEventRecordWithFlags, (CUevent hEvent, CUstream hStream, unsigned int flags),
      record(hEvent, flags, hStream, per_thread))

/* Enters a query of an event. An event that marks a place in a graph has no state, and its capture may be over. A
 * query of any other event is potentially unsafe while something captures. */
static CUresult enter_done(CUevent handle, struct event **event)
{
    gate_read_completion();
    if (!handle) return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = enter_event(handle, event);
    if (result) return result;
    struct capture *capture = (*event)->capture;
    if (capture) {
        bool alive = capture_is_alive(capture, (*event)->capture_id);
        if (alive) capture_break(capture);
        return sim_leave(alive ? CUDA_ERROR_CAPTURED_EVENT : CUDA_ERROR_INVALID_VALUE);
    }
    result = capture_permits();
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

static bool is_done(struct event *event)
{
    if (!event->recorded) return true;
    if (event->queue_index) {
        uint64_t done_ns;
        if (!queue_reached(event->context, event->queue, event->queue_index, &done_ns)) return false;
        event->queue_index = 0;
        event->done_ns = done_ns;
    }
    return context_reached(event->context, event->done_ns);
}

API cuEventQuery(CUevent hEvent)
{
    struct event *event;
    CUresult result = enter_done(hEvent, &event);
    if (result) return result;
    return sim_leave(is_done(event) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY);
}

API cuEventSynchronize(CUevent hEvent)
{
    struct event *event;
    CUresult result = enter_done(hEvent, &event);
    if (result) return result;
    struct event is = *event; /* another thread may destroy the event during the wait */
    if (is.recorded && is.queue_index) queue_wait(is.context, is.queue, is.queue_index);
    if (is.recorded && is.context->alive) context_wait(is.context, is.done_ns);
    if (is.recorded && is.context->alive) memory_settle(is.context, NULL);
    return sim_leave(CUDA_SUCCESS);
}

/* Returns the same error if an event is not recorded, not timed or unknown, and if there is no place for the result. */
static CUresult elapsed(float *ms, CUevent hStart, CUevent hEnd)
{
    struct event *end;
    if (!hEnd) return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = enter_event(hEnd, &end);
    if (result) return result;
    struct event **start = hStart ? find(hStart) : NULL;
    if (end->capture || (start && (*start)->capture)) return sim_leave(CUDA_ERROR_CAPTURED_EVENT);
    if (!ms || !start || !(*start)->recorded || !end->recorded ||
        ((*start)->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!is_done(*start) || !is_done(end)) return sim_leave(CUDA_ERROR_NOT_READY);
    uint64_t from = context_real((*start)->context, (*start)->done_ns), to = context_real(end->context, end->done_ns);
    *ms = (float)((double)(int64_t)(to - from) / 1e6);
    return sim_leave(CUDA_SUCCESS);
}

API cuEventElapsedTime(float *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    gate_read_completion();
    return elapsed(pMilliseconds, hStart, hEnd);
}

API cuEventElapsedTime_v2(float *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    gate_read_completion();
    return elapsed(pMilliseconds, hStart, hEnd);
}

/* A wait for an event of a capture adds the stream to the capture. A capture can wait for an event outside it only
 * by a node, which takes no time here when it is launched. */
static CUresult wait_captured(struct stream *stream, const struct event *event, unsigned flags)
{
    struct node *node;
    if (!event->capture && flags) return capture_node(stream, CU_GRAPH_NODE_TYPE_WAIT_EVENT, &node);
    if (!event->capture && !event->recorded) return CUDA_SUCCESS;
    bool alive = event->capture && capture_is_alive(event->capture, event->capture_id);
    if (!alive) {
        capture_break(stream->capture);
        return event->capture ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (stream->capture && stream->capture != event->capture) {
        capture_break(stream->capture);
        capture_break(event->capture);
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (stream == &stream->context->legacy) {
        capture_break(event->capture);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    stream->capture = event->capture;
    return tail_join(&stream->tail, &event->tail);
}

/* The wait is for the event as it is now. Recording it again later has no effect on the wait. */
static CUresult wait_event(CUstream handle, CUevent event, unsigned flags, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(handle, per_thread, &context, &stream);
    if (result) return result;
    struct event **at = event ? find(event) : NULL;
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (flags & ~1u) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (stream->capture || (*at)->capture) return sim_leave(wait_captured(stream, *at, flags));
    if ((*at)->recorded && (*at)->queue_index && (*at)->queue != stream->id) {
        struct event is = **at; /* the real driver waits on the device; here the program waits */
        queue_wait(is.context, is.queue, is.queue_index);
        return sim_leave(CUDA_SUCCESS);
    }
    uint64_t done = (*at)->recorded ? context_translate((*at)->context, context, (*at)->done_ns) : 0;
    if (done > stream->done_ns) stream->done_ns = done;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamWaitEvent, (CUstream hStream, CUevent hEvent, unsigned int flags),
      wait_event(hStream, hEvent, flags, per_thread))
