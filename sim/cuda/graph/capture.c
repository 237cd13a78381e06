/* Stream capture: work in a capturing stream becomes nodes of a graph. Events carry a capture from one stream into
 * another. Work that cannot be recorded breaks the capture: the call fails with the reason, and every later one with
 * CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, until the program ends the capture. */
#include "cuda/graph/graph.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

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

/* The place of captured nodes: after these nodes of an existing graph. NULL stands for a new graph. */
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

/* Also frees a graph that the program created and then captured into. The program's handle is invalid afterwards. */
static void discard(struct graph *graph)
{
    graph->capturing = false;
    graph_destroy(graph);
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
                                .thread = capture_thread(),
                                .mode = mode,
                                .graph = graph,
                                .discard = discard,
                                .origin = stream};
    capture_begin(capture);
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

/* Marks all nodes on which the nodes of a tail depend. Since nodes are listed newest first, one pass is enough,
 * unless the program added edges by hand. */
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

/* Work that was forked into other streams must have been joined by an event. */
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
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != capture_thread())
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    if (capture->broken)
        result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    else if (!all_joined(capture))
        result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    capture->graph->capturing = false;
    *out = result ? NULL : (CUgraph)capture->graph;
    if (result)
        capture_discard(capture);
    else
        capture_stop(capture);
    return sim_leave(result);
}

TWICE(_ptsz, cuStreamEndCapture, (CUstream hStream, CUgraph *phGraph), end(hStream, phGraph, per_thread))

static CUresult enter_question(CUstream handle, const void *out, bool per_thread, struct stream **stream)
{
    struct context *context;
    CUresult result = stream_enter(handle, per_thread, &context, stream);
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    /* A query breaks nothing. */
    bool implicit = *stream == &context->legacy && capture_of_blocking(context);
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

/* Pointers to the results besides the status. NULL: the program does not request that result. */
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
    if (info.edges) *info.edges = NULL; /* edges carry no data here */
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
