/* Stream capture: work that is pushed into a capturing stream becomes nodes of a graph. Events carry a capture from one
 * stream into another. What a capture cannot record breaks it: the call that did it is refused with the reason, every
 * later one with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, until the capture is ended. */
#include "cuda_graph.h"

#include <stdlib.h>
#include <string.h>

struct capture {
    uint64_t id, thread;
    CUstreamCaptureMode mode;
    bool broken;
    struct graph *graph;
    struct stream *origin;
    struct capture *next;
};

static struct capture *captures;
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static __thread uint64_t thread_id;

/* Not the kernel's: those are given again to another thread. */
static uint64_t this_thread(void)
{
    if (!thread_id) thread_id = ++driver.next_id;
    return thread_id;
}

/* Sets of nodes. */

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

/* Who may do what while a capture is going on. */

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
    bool own = capture->thread == this_thread();
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

static struct capture *capture_beside(const struct context *context)
{
    if (context->per_thread.capture) return context->per_thread.capture;
    for (const struct stream *s = context->streams; s; s = s->next)
        if (s->capture && !(s->flags & CU_STREAM_NON_BLOCKING)) return s->capture;
    return NULL;
}

/* The legacy stream waits for every blocking stream, so what it is asked for would have to be captured and cannot be.
 */
CUresult capture_permits_use(struct stream *stream)
{
    struct capture *beside = stream == &stream->context->legacy ? capture_beside(stream->context) : NULL;
    if (beside) {
        capture_break(beside);
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

/* Captured work. */

struct graph *capture_graph(const struct stream *stream) { return stream->capture->graph; }

CUresult capture_node(struct stream *stream, CUgraphNodeType type, struct node **out)
{
    struct node *node = node_new(stream->capture->graph, type, stream->tail.nodes, stream->tail.n);
    if (!node) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = tail_copy(&stream->tail, &(struct tail){&node, 1});
    if (result) {
        node_drop(node);
        return result;
    }
    *out = node;
    return CUDA_SUCCESS;
}

/* Beginning and end. */

/* Where captured nodes go: after which others, in a graph that is there; NULL: in a new one. */
struct place {
    CUgraph graph;
    const CUgraphNode *needs;
    size_t n;
};

static bool is_in(const struct graph *graph, CUgraphNode handle)
{
    for (const struct node *n = graph->nodes; n; n = n->next)
        if (n == (struct node *)handle) return true;
    return false;
}

static CUresult settle(const struct place *place, struct stream *stream, struct graph **out)
{
    struct graph *graph = *out = place ? graph_find(place->graph) : graph_new();
    if (!place) return graph ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    if (!graph || graph->capturing || (place->n && !place->needs)) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < place->n; i++)
        if (!is_in(graph, place->needs[i])) return CUDA_ERROR_INVALID_VALUE;
    return tail_copy(&stream->tail, &(struct tail){(struct node **)place->needs, place->n});
}

static CUresult begin(CUstream handle, CUstreamCaptureMode mode, const struct place *place, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
    if (result) return result;
    if ((unsigned)mode > CU_STREAM_CAPTURE_MODE_RELAXED) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (stream == &context->legacy) return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream->capture) return sim_leave(CUDA_ERROR_ILLEGAL_STATE);
    struct capture *capture = calloc(1, sizeof *capture);
    struct graph *graph = NULL;
    result = capture ? settle(place, stream, &graph) : CUDA_ERROR_OUT_OF_MEMORY;
    if (result) {
        free(capture);
        return sim_leave(result);
    }
    graph->capturing = true;
    *capture = (struct capture){.id = ++driver.next_id,
                                .thread = this_thread(),
                                .mode = mode,
                                .graph = graph,
                                .origin = stream,
                                .next = captures};
    captures = capture;
    stream->capture = capture;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamBeginCapture, (CUstream hStream), begin(hStream, CU_STREAM_CAPTURE_MODE_GLOBAL, NULL, per_thread))
TWICE(_ptsz, cuStreamBeginCapture_v2, (CUstream hStream, CUstreamCaptureMode mode),
      begin(hStream, mode, NULL, per_thread))
TWICE(_ptsz, cuStreamBeginCaptureToGraph,
      (CUstream hStream, CUgraph hGraph, const CUgraphNode *dependencies, const CUgraphEdgeData *edges, size_t n,
       CUstreamCaptureMode mode),
      ((void)edges,
       hGraph ? begin(hStream, mode, &(struct place){hGraph, dependencies, n}, per_thread) : CUDA_ERROR_INVALID_VALUE))

static void leave_stream(struct stream *stream, const struct capture *capture)
{
    if (stream->capture != capture) return;
    stream->capture = NULL;
    tail_clear(&stream->tail);
}

/* Also one that the program made itself, and captured into: its handle names nothing afterwards. */
static void graph_discard(const struct capture *capture)
{
    capture->graph->capturing = false;
    graph_free(capture->graph);
}

static void capture_stop(struct capture *capture)
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

/* A capture ends with the stream that it began in, and is broken by the loss of another. */
void capture_abandon(struct stream *stream)
{
    struct capture *capture = stream->capture;
    if (capture->origin == stream) {
        graph_discard(capture);
        capture_stop(capture);
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
        graph_discard(c);
        capture_stop(c);
    }
}

/* Everything that the nodes of a tail depend on. Newest first, one pass is enough but for edges that a program added to
 * the graph by hand. */
static void walk(const struct graph *graph, const struct tail *tail, uint64_t mark)
{
    bool changed = true;
    for (size_t i = 0; i < tail->n; i++) tail->nodes[i]->mark = mark;
    while (changed) {
        changed = false;
        for (const struct node *n = graph->nodes; n; n = n->next) {
            for (size_t i = 0; n->mark == mark && i < n->n_needs; i++) {
                changed = changed || n->needs[i]->mark != mark;
                n->needs[i]->mark = mark;
            }
        }
    }
}

static bool is_joined(const struct stream *stream, const struct capture *capture, uint64_t mark)
{
    for (size_t i = 0; stream->capture == capture && i < stream->tail.n; i++)
        if (stream->tail.nodes[i]->mark != mark) return false;
    return true;
}

/* Work that was forked into other streams must have come back by an event. */
static bool all_joined(const struct capture *capture)
{
    uint64_t mark = graph_mark();
    walk(capture->graph, &capture->origin->tail, mark);
    for (const struct context *c = driver.contexts; c; c = c->next) {
        if (!is_joined(&c->per_thread, capture, mark)) return false;
        for (const struct stream *s = c->streams; s; s = s->next)
            if (!is_joined(s, capture, mark)) return false;
    }
    return true;
}

static CUresult end(CUstream handle, CUgraph *out, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
    if (result) return result;
    struct capture *capture = stream->capture;
    if (!capture) return sim_leave(CUDA_ERROR_ILLEGAL_STATE);
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (capture->origin != stream) {
        capture_break(capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    }
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != this_thread())
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    if (capture->broken)
        result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    else if (!all_joined(capture))
        result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    capture->graph->capturing = false;
    *out = result ? NULL : (CUgraph)capture->graph;
    if (result) graph_discard(capture);
    capture_stop(capture);
    return sim_leave(result);
}

TWICE(_ptsz, cuStreamEndCapture, (CUstream hStream, CUgraph *phGraph), end(hStream, phGraph, per_thread))

/* Questions. */

static CUresult enter_question(CUstream handle, const void *out, bool per_thread, struct stream **stream)
{
    struct context *context;
    CUresult result = stream_enter(handle, per_thread, &context, stream);
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    /* Asking breaks nothing. */
    bool implicit = *stream == &context->legacy && capture_beside(context);
    return implicit ? sim_leave(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) : CUDA_SUCCESS;
}

static CUstreamCaptureStatus status_of(const struct stream *stream)
{
    return !stream->capture          ? CU_STREAM_CAPTURE_STATUS_NONE
           : stream->capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                     : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

static CUresult is_capturing(CUstream handle, CUstreamCaptureStatus *status, bool per_thread)
{
    struct stream *stream;
    CUresult result = enter_question(handle, status, per_thread, &stream);
    if (result) return result;
    *status = status_of(stream);
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamIsCapturing, (CUstream hStream, CUstreamCaptureStatus *captureStatus),
      is_capturing(hStream, captureStatus, per_thread))

/* Where the answers go besides the status; what is not asked for is NULL. */
struct info {
    cuuint64_t *id;
    CUgraph *graph;
    const CUgraphNode **dependencies;
    const CUgraphEdgeData **edges;
    size_t *count;
};

static CUresult get_info(CUstream handle, CUstreamCaptureStatus *status, struct info info, bool per_thread)
{
    struct stream *stream;
    CUresult result = enter_question(handle, status, per_thread, &stream);
    if (result) return result;
    if (info.edges && !info.dependencies) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *status = status_of(stream);
    if (*status != CU_STREAM_CAPTURE_STATUS_ACTIVE) {
        if (*status == CU_STREAM_CAPTURE_STATUS_NONE && info.id) *info.id = 0;
        return sim_leave(CUDA_SUCCESS);
    }
    if (info.id) *info.id = stream->capture->id;
    if (info.graph) *info.graph = (CUgraph)stream->capture->graph;
    if (info.dependencies) *info.dependencies = (const CUgraphNode *)stream->tail.nodes;
    if (info.edges) *info.edges = NULL; /* no edge here carries data */
    if (info.count) *info.count = stream->tail.n;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetCaptureInfo, (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id),
      get_info(hStream, captureStatus, (struct info){.id = id}, per_thread))

TWICE(_ptsz, cuStreamGetCaptureInfo_v2,
      (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, size_t *count),
      get_info(hStream, captureStatus, (struct info){id, graph, dependencies, NULL, count}, per_thread))

TWICE(_ptsz, cuStreamGetCaptureInfo_v3,
      (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, const CUgraphEdgeData **edges, size_t *count),
      get_info(hStream, captureStatus, (struct info){id, graph, dependencies, edges, count}, per_thread))
