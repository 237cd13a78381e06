/* Executable graphs. Instantiation copies the nodes in an order that satisfies every edge. A launch has all
 * observable effects of its nodes at once, and keeps its stream busy for as long as the longest chain of kernels takes.
 */
#include "cuda/graph/graph.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

#define AUTO_FREE CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
#define KNOWN_FLAGS 15u

struct exec {
    struct graph *graph; /* NULL: the graph is destroyed */
    cuuint64_t flags;
    struct node *ops; /* copies of the nodes, in order */
    size_t n_ops;
    struct plan plan;
    uint64_t shared[SIM_MAX_DEVICES]; /* the most bytes that are live at once, without those in left */
    uint64_t left[SIM_MAX_DEVICES];   /* the bytes that a launch leaves behind */
    struct context *home;             /* the context in which it was made, if that still has this id */
    uint64_t home_id;
    uint64_t stream;  /* the stream of the last launch; 0: there was none */
    uint64_t done_ns; /* when the last launch is done, by the clock of its context */
    struct context *context;
    struct exec *next;
};

static struct exec *execs;

static struct exec *find(CUgraphExec handle)
{
    for (struct exec *e = execs; e; e = e->next)
        if (e == (struct exec *)handle) return e;
    return NULL;
}

/* Launches in one stream follow each other and share their memory. Launches in different streams do not. */
static bool holds(const struct exec *exec)
{
    if (!exec->stream || !exec->done_ns) return false;
    return exec->done_ns == UINT64_MAX || !context_reached(exec->context, exec->done_ns);
}

static uint64_t execs_need(int device)
{
    uint64_t sum = 0;
    for (const struct exec *e = execs; e; e = e->next) {
        const struct exec *first = execs;
        uint64_t most = 0;
        while (!holds(first) || first->stream != e->stream) {
            first = first->next;
            if (!first) break;
        }
        if (first != e) continue; /* holds nothing, or an earlier graph of its stream was counted for it */
        for (const struct exec *other = e; other; other = other->next)
            if (holds(other) && other->stream == e->stream && other->shared[device] > most)
                most = other->shared[device];
        sum += most;
    }
    return sum;
}

/* Adds the node after all nodes that it needs. Returns false if there is a cycle. `mark` marks visited nodes;
 * nodes that are added have a valid `until`. */
static bool visit(struct node *node, uint64_t mark, struct exec *exec)
{
    if (node->mark == mark) return node->until != UINT64_MAX;
    node->mark = mark;
    node->until = UINT64_MAX;
    uint64_t start = 0;
    for (size_t i = 0; i < node->n_needs; i++) {
        if (!visit(node->needs[i], mark, exec)) return false;
        if (node->needs[i]->until > start) start = node->needs[i]->until;
    }
    node->until = start + node_ns(node);
    if (node->until > exec->plan.ns) exec->plan.ns = node->until;
    exec->ops[exec->n_ops++] = *node;
    return true;
}

static CUresult order(struct graph *graph, struct exec *exec)
{
    struct node **nodes = calloc(graph->n_nodes + 1, sizeof *nodes);
    exec->ops = calloc(graph->n_nodes + 1, sizeof *exec->ops);
    CUresult result = nodes && exec->ops ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    size_t at = graph->n_nodes;
    for (struct node *n = graph->nodes; !result && n; n = n->next) nodes[--at] = n;
    uint64_t mark = graph_mark();
    for (size_t i = 0; !result && i < graph->n_nodes; i++)
        if (!visit(nodes[i], mark, exec)) result = CUDA_ERROR_INVALID_VALUE;
    free(nodes);
    return result ? result : plan_make(&exec->plan, exec->ops, exec->n_ops);
}

static bool is_memory(const struct node *op)
{
    return op->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC || op->type == CU_GRAPH_NODE_TYPE_MEM_FREE;
}

static void measure(struct exec *exec)
{
    uint64_t now[SIM_MAX_DEVICES] = {0};
    for (size_t i = 0; i < exec->n_ops; i++) {
        const struct node *op = &exec->ops[i];
        if (op->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC) {
            int device = op->memory->device;
            op->memory->refs++;
            now[device] += op->memory->size;
            if (!op->memory->freed_inside) exec->left[device] += op->memory->size;
            if (now[device] > exec->shared[device]) exec->shared[device] = now[device];
        } else if (op->type == CU_GRAPH_NODE_TYPE_MEM_FREE) {
            op->memory->refs++;
            uint64_t *bytes = &now[op->memory->device];
            if (op->memory->freed_inside && *bytes >= op->memory->size) *bytes -= op->memory->size;
        }
    }
    for (int d = 0; d < SIM_MAX_DEVICES; d++) exec->shared[d] -= exec->left[d];
}

static void exec_free(struct exec *exec)
{
    struct exec **at = &execs;
    while (*at && *at != exec) at = &(*at)->next;
    if (*at) *at = exec->next;
    if (exec->graph) exec->graph->exec = NULL;
    if (exec->home && exec->home->id == exec->home_id) growth_nodes_end(exec->home, exec->n_ops);
    for (size_t i = 0; i < exec->n_ops; i++)
        if (is_memory(&exec->ops[i])) graph_memory_drop(exec->ops[i].memory);
    free(exec->ops);
    free(exec);
}

static CUresult reserve_for(struct exec *exec, const struct stream *stream);
static CUresult upload_to(struct exec *exec, const struct stream *stream);

static CUresult instantiate(CUgraphExec *out, CUgraph handle, CUDA_GRAPH_INSTANTIATE_PARAMS *params, bool per_thread)
{
    struct context *context;
    params->hErrNode_out = NULL;
    params->result_out = CUDA_GRAPH_INSTANTIATE_ERROR;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct graph *graph = graph_find(handle);
    cuuint64_t flags = params->flags;
    const struct stream *upload = flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD
                                      ? stream_find(context, params->hUploadStream, per_thread)
                                      : &context->legacy;
    bool launches_itself = flags & CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH;
    if (!out || !graph || flags & ~(cuuint64_t)KNOWN_FLAGS || (launches_itself && flags & AUTO_FREE))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!upload) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (graph->has_memory && graph->exec) return sim_leave(CUDA_ERROR_NOT_SUPPORTED);
    result = capture_permits();
    if (result) return sim_leave(result);
    struct exec *exec = calloc(1, sizeof *exec);
    if (!exec) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    exec->flags = flags;
    result = order(graph, exec);
    if (!result) result = growth_nodes(context, exec->n_ops);
    if (result) {
        if (result == CUDA_ERROR_INVALID_VALUE) params->result_out = CUDA_GRAPH_INSTANTIATE_INVALID_STRUCTURE;
        exec->n_ops = 0; /* no node holds its memory yet */
        exec_free(exec);
        return sim_leave(result);
    }
    exec->home = context;
    exec->home_id = context->id;
    measure(exec);
    if (graph->has_memory) {
        exec->graph = graph;
        graph->exec = exec;
    }
    exec->next = execs;
    execs = exec;
    if (flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD) result = upload_to(exec, upload);
    if (result) {
        exec_free(exec);
        return sim_leave(result);
    }
    params->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    *out = (CUgraphExec)exec;
    return sim_leave(CUDA_SUCCESS);
}

static CUresult instantiate_plain(CUgraphExec *out, CUgraph graph, cuuint64_t flags)
{
    return instantiate(out, graph, &(CUDA_GRAPH_INSTANTIATE_PARAMS){.flags = flags}, false);
}

/* The oldest version also returns a text about a failure. There is none here. */
static CUresult instantiate_old(CUgraphExec *out, CUgraph graph, CUgraphNode *error, char *log, size_t size)
{
    if (error) *error = NULL;
    if (log && size) *log = 0;
    return instantiate_plain(out, graph, 0);
}

API cuGraphInstantiate(CUgraphExec *phGraphExec, CUgraph hGraph, CUgraphNode *phErrorNode, char *log, size_t size)
{
    return instantiate_old(phGraphExec, hGraph, phErrorNode, log, size);
}

API cuGraphInstantiate_v2(CUgraphExec *phGraphExec, CUgraph hGraph, CUgraphNode *phErrorNode, char *log, size_t size)
{
    return instantiate_old(phGraphExec, hGraph, phErrorNode, log, size);
}

API cuGraphInstantiateWithFlags(CUgraphExec *phGraphExec, CUgraph hGraph, unsigned long long flags)
{
    /* An upload needs a stream, which only the version with parameters has. */
    return flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD ? CUDA_ERROR_INVALID_VALUE
                                                      : instantiate_plain(phGraphExec, hGraph, flags);
}

TWICE(_ptsz, cuGraphInstantiateWithParams,
      (CUgraphExec * phGraphExec, CUgraph hGraph, CUDA_GRAPH_INSTANTIATE_PARAMS *params),
      params ? instantiate(phGraphExec, hGraph, params, per_thread) : CUDA_ERROR_INVALID_VALUE)

API cuGraphExecGetFlags(CUgraphExec hGraphExec, cuuint64_t *flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct exec *exec = find(hGraphExec);
    if (!exec || !flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *flags = exec->flags;
    return sim_leave(CUDA_SUCCESS);
}

void graph_destroy(struct graph *graph)
{
    if (graph->exec) graph->exec->graph = NULL;
    graph_free(graph);
}

API cuGraphDestroy(CUgraph hGraph)
{
    struct graph *graph;
    CUresult result = graph_enter(hGraph, &graph);
    if (result) return result;
    if (graph->capturing) return sim_leave(CUDA_ERROR_ILLEGAL_STATE);
    graph_destroy(graph);
    return sim_leave(CUDA_SUCCESS);
}

/* With the real driver, a graph that runs keeps its memory until it ends, even if it is destroyed before. Here the
 * memory does not count as in use any more after the call. */
API cuGraphExecDestroy(CUgraphExec hGraphExec)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct exec *exec = find(hGraphExec);
    if (!exec) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    exec_free(exec);
    return sim_leave(CUDA_SUCCESS);
}

/* Launches. */

static CUresult reserve_all(const struct exec *exec)
{
    bool devices[SIM_MAX_DEVICES] = {false};
    for (size_t i = 0; i < exec->n_ops; i++)
        if (is_memory(&exec->ops[i])) devices[exec->ops[i].memory->device] = true;
    for (int d = 0; d < SIM_MAX_DEVICES; d++) {
        CUresult result = devices[d] ? graph_memory_reserve(d, execs_need(d)) : CUDA_SUCCESS;
        if (result) return result;
    }
    return CUDA_SUCCESS;
}

/* Takes the memory for a launch in this stream, without launching. */
static CUresult reserve_for(struct exec *exec, const struct stream *stream)
{
    struct exec before = *exec;
    exec->stream = stream->id;
    exec->done_ns = UINT64_MAX; /* only while execs_need counts */
    CUresult result = reserve_all(exec);
    exec->done_ns = before.done_ns;
    if (result) exec->stream = before.stream;
    return result;
}

/* The memory that a launch will leave is not live yet, but needs room too. */
static CUresult upload_to(struct exec *exec, const struct stream *stream)
{
    for (int d = 0; d < SIM_MAX_DEVICES; d++) exec->shared[d] += exec->left[d];
    CUresult result = reserve_for(exec, stream);
    for (int d = 0; d < SIM_MAX_DEVICES; d++) exec->shared[d] -= exec->left[d];
    return result;
}

static CUresult set_live(struct exec *exec, bool live)
{
    for (size_t i = 0; i < exec->n_ops; i++) {
        struct node *op = &exec->ops[i];
        bool allocates = op->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC;
        if (allocates && op->memory->range->is_live && live && !(exec->flags & AUTO_FREE))
            return CUDA_ERROR_INVALID_VALUE;
    }
    for (size_t i = 0; i < exec->n_ops; i++) {
        struct node *op = &exec->ops[i];
        if (op->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC) op->memory->range->is_live = live && !op->memory->freed_inside;
        if (op->type == CU_GRAPH_NODE_TYPE_MEM_FREE && live) op->memory->range->is_live = false;
    }
    return CUDA_SUCCESS;
}

static CUresult run(const struct exec *exec)
{
    CUresult result = CUDA_SUCCESS;
    for (size_t i = 0; i < exec->n_ops && !result; i++) {
        const struct node *op = &exec->ops[i];
        if (op->type == CU_GRAPH_NODE_TYPE_MEMCPY) result = transfer_run(&op->copy);
        if (op->type == CU_GRAPH_NODE_TYPE_MEMSET) result = fill_run(&op->fill);
    }
    /* On a real device this would be an error at the next synchronisation, and the end of the context. */
    return result ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

/* Finds an executable graph and a stream that does not capture. */
static CUresult enter_launch(CUgraphExec handle, CUstream stream_handle, bool per_thread, struct context **context,
                             struct stream **stream, struct exec **exec)
{
    CUresult result = stream_enter_work(stream_handle, per_thread, context, stream);
    if (result) return result;
    *exec = find(handle);
    if (!*exec) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!(*stream)->capture) return CUDA_SUCCESS;
    capture_break((*stream)->capture);
    return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

static CUresult launch(CUgraphExec handle, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    struct exec *exec;
    CUresult result = enter_launch(handle, stream_handle, per_thread, &context, &stream, &exec);
    if (result) return result;
    for (size_t i = 0; !result && i < exec->n_ops; i++)
        if (exec->ops[i].type == CU_GRAPH_NODE_TYPE_KERNEL)
            result = growth_launch(context, &exec->ops[i].kernel.run.needs);
    if (!result) result = set_live(exec, true);
    if (result) return sim_leave(result);
    result = reserve_for(exec, stream);
    if (result) {
        set_live(exec, false);
        return sim_leave(result);
    }
    uint64_t before = exec->context ? context_translate(exec->context, context, exec->done_ns) : 0;
    if (before > stream->done_ns) stream->done_ns = before; /* launches of one executable graph follow each other */
    exec->context = context;
    result = plan_run(&exec->plan, context, stream);
    exec->done_ns = stream->done_ns;
    return sim_leave(result ? result : run(exec));
}

TWICE(_ptsz, cuGraphLaunch, (CUgraphExec hGraph, CUstream hStream), launch(hGraph, hStream, per_thread))

static CUresult upload(CUgraphExec handle, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    struct exec *exec;
    CUresult result = enter_launch(handle, stream_handle, per_thread, &context, &stream, &exec);
    return result ? result : sim_leave(upload_to(exec, stream));
}

TWICE(_ptsz, cuGraphUpload, (CUgraphExec hGraph, CUstream hStream), upload(hGraph, hStream, per_thread))

API cuDeviceGraphMemTrim(CUdevice device)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(device)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    graph_memory_trim(device, execs_need(device));
    return sim_leave(CUDA_SUCCESS);
}
