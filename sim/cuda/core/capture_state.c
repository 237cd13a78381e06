/* The captures of the process: what they forbid, and their end. */
#include "cuda/core/capture_state.h"

#include <stdlib.h>

static struct capture *captures;
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static __thread uint64_t thread_id;

/* The kernel's thread ids cannot be used, because later threads get the same ids. */
uint64_t capture_thread(void)
{
    if (!thread_id) thread_id = ++driver.next_id;
    return thread_id;
}

void tail_clear(struct tail *tail)
{
    free(tail->nodes);
    *tail = (struct tail){0};
}

CUresult tail_join(struct tail *tail, const struct tail *more)
{
    if (!more->n) return CUDA_SUCCESS;
    struct node **nodes = realloc(tail->nodes, (tail->n + more->n) * sizeof *nodes);
    if (!nodes) return CUDA_ERROR_OUT_OF_MEMORY;
    tail->nodes = nodes;
    for (size_t i = 0; i < more->n; i++) {
        size_t known = 0;
        while (known < tail->n && nodes[known] != more->nodes[i]) known++;
        if (known == tail->n) nodes[tail->n++] = more->nodes[i];
    }
    return CUDA_SUCCESS;
}

CUresult tail_copy(struct tail *tail, const struct tail *from)
{
    tail_clear(tail);
    return tail_join(tail, from);
}

void capture_break(struct capture *capture)
{
    if (capture) capture->broken = true;
}

bool capture_is_alive(const struct capture *capture, uint64_t id)
{
    for (const struct capture *c = captures; c; c = c->next)
        if (c == capture) return c->id == id;
    return false;
}

uint64_t capture_id(const struct capture *capture) { return capture ? capture->id : 0; }

static bool forbids(const struct capture *capture)
{
    bool own = capture->thread == capture_thread();
    if (own) return capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    return capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

CUresult capture_permits(void)
{
    CUresult result = CUDA_SUCCESS;
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return result;
    for (struct capture *c = captures; c; c = c->next) {
        if (!forbids(c)) continue;
        capture_break(c);
        result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return result;
}

struct capture *capture_of_blocking(const struct context *context)
{
    if (context->per_thread.capture) return context->per_thread.capture;
    for (const struct stream *s = context->streams; s; s = s->next)
        if (s->capture && !(s->flags & CU_STREAM_NON_BLOCKING)) return s->capture;
    return NULL;
}

/* The legacy stream waits for every blocking stream. Its work would have to be part of their captures, which is
 * impossible. */
CUresult capture_permits_use(struct stream *stream)
{
    struct capture *blocking = stream == &stream->context->legacy ? capture_of_blocking(stream->context) : NULL;
    if (blocking) {
        capture_break(blocking);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    return stream->capture && stream->capture->broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

CUresult capture_permits_waiting(struct context *context)
{
    CUresult result = CUDA_SUCCESS;
    for (struct capture *c = captures; c; c = c->next) {
        if (c->origin->context != context) continue;
        capture_break(c);
        result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return result ? result : capture_permits();
}

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!mode) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    CUstreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return sim_leave(CUDA_SUCCESS);
}

static void leave_stream(struct stream *stream, const struct capture *capture)
{
    if (stream->capture != capture) return;
    stream->capture = NULL;
    tail_clear(&stream->tail);
}

void capture_begin(struct capture *capture)
{
    capture->next = captures;
    captures = capture;
    capture->origin->capture = capture;
}

void capture_stop(struct capture *capture)
{
    for (struct context *c = driver.contexts; c; c = c->next) {
        leave_stream(&c->legacy, capture);
        leave_stream(&c->per_thread, capture);
        for (struct stream *s = c->streams; s; s = s->next) leave_stream(s, capture);
    }
    struct capture **at = &captures;
    while (*at != capture) at = &(*at)->next;
    *at = capture->next;
    free(capture);
}

void capture_discard(struct capture *capture)
{
    capture->discard(capture->graph);
    capture_stop(capture);
}

/* A capture ends with the stream in which it began. The loss of another stream breaks it. */
void capture_abandon(struct stream *stream)
{
    struct capture *capture = stream->capture;
    if (capture->origin == stream) {
        capture_discard(capture);
    } else {
        capture_break(capture);
        leave_stream(stream, capture);
    }
}

void captures_end(struct context *context)
{
    for (struct capture *next, *c = captures; c; c = next) {
        next = c->next;
        if (c->origin->context != context) continue;
        capture_discard(c);
    }
}
