/* Events, and the small questions about streams. */
#include "cuda_state.h"

#include <stdlib.h>

struct event {
    unsigned flags;
    bool recorded;
    uint64_t done_ns;
    struct event *next;
};

void events_end(struct context *context)
{
    while (context->events) {
        struct event *event = context->events;
        context->events = event->next;
        free(event);
    }
}

/* An event may be used while another context is current, so all are searched. */
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
    free(event);
    return sim_leave(CUDA_SUCCESS);
}

/* An event is the moment at which the work before it will be done; recording it again moves it. */
static CUresult record(CUevent handle, unsigned flags, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    struct event **at = find(handle);
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (flags & ~1u) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    uint64_t now = stream_now();
    (*at)->recorded = true;
    (*at)->done_ns = stream->done_ns > now ? stream->done_ns : now;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuEventRecord, (CUevent hEvent, CUstream hStream), record(hEvent, 0, hStream, per_thread))
TWICE(_ptsz, cuEventRecordWithFlags, (CUevent hEvent, CUstream hStream, unsigned int flags),
      record(hEvent, flags, hStream, per_thread))

API cuEventQuery(CUevent hEvent)
{
    struct event *event;
    CUresult result = enter_event(hEvent, &event);
    if (result) return result;
    return sim_leave(event->recorded && event->done_ns > stream_now() ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

API cuEventSynchronize(CUevent hEvent)
{
    struct event *event;
    CUresult result = enter_event(hEvent, &event);
    if (result) return result;
    if (event->recorded) stream_wait(event->done_ns);
    return sim_leave(CUDA_SUCCESS);
}

/* Asking for the time between events that are not both recorded, timed and named is one error, a missing place for the
 * answer too. */
static CUresult elapsed(float *ms, CUevent hStart, CUevent hEnd)
{
    struct event *end;
    CUresult result = enter_event(hEnd, &end);
    if (result) return result;
    struct event **start = hStart ? find(hStart) : NULL;
    if (!ms || !start || !(*start)->recorded || !end->recorded ||
        ((*start)->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    uint64_t now = stream_now();
    if ((*start)->done_ns > now || end->done_ns > now) return sim_leave(CUDA_ERROR_NOT_READY);
    *ms = (float)((double)(int64_t)(end->done_ns - (*start)->done_ns) / 1e6);
    return sim_leave(CUDA_SUCCESS);
}

API cuEventElapsedTime(float *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    return elapsed(pMilliseconds, hStart, hEnd);
}

API cuEventElapsedTime_v2(float *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    return elapsed(pMilliseconds, hStart, hEnd);
}

/* The wait is for the event as it is now: recording it again later does not matter. */
static CUresult wait_event(CUstream handle, CUevent event, unsigned flags, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
    if (result) return result;
    struct event **at = event ? find(event) : NULL;
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (flags & ~1u) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if ((*at)->recorded && (*at)->done_ns > stream->done_ns) stream->done_ns = (*at)->done_ns;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamWaitEvent, (CUstream hStream, CUevent hEvent, unsigned int flags),
      wait_event(hStream, hEvent, flags, per_thread))
