/* Executable graphs. Instantiation copies the nodes in an order that satisfies every edge; a launch does what they say
 * at once, as far as anybody could see it, and keeps its stream busy for as long as the longest chain of kernels takes.
 */
#include "cuda_graph.h"

#include <stdlib.h>

#define AUTO_FREE CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
#define KNOWN_FLAGS 15u

struct exec {
    struct graph *graph; /* NULL: destroyed before */
    cuuint64_t flags;
    struct node *ops; /* copies, in order */
    size_t n_ops;
    struct plan plan;
    uint64_t shared[SIM_MAX_DEVICES]; /* the most that is live at once, without what a launch leaves behind */
    uint64_t left[SIM_MAX_DEVICES];   /* which is this */
    struct context *home;             /* where it was made, if that context is still there by its id */
    uint64_t home_id;
    uint64_t stream;  /* of the last launch; 0: none yet */
    uint64_t done_ns; /* by the clock of the context in which it was launched */
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

void exec_forget_graph(struct exec *exec) { exec->graph = NULL; }

/* Launches in one stream follow each other and share their memory; those in different streams do not. */
static bool holds(const struct exec *exec)
{
    if (!exec->stream || !exec->done_ns) return false;
    return exec->done_ns == UINT64_MAX || !context_reached(exec->context, exec->done_ns);
}

uint64_t execs_need(int device)
{
    uint64_t sum = 0;
    for (const struct exec *e = execs; e; e = e->next) {
        const struct exec *first = execs;
        uint64_t most = 0;
        while (!holds(first) || first->stream != e->stream) {
            first = first->next;
            if (!first) break;
        }
        if (first != e) continue; /* holds nothing, or another one of its stream has spoken for it */
        for (const struct exec *other = e; other; other = other->next)
            if (holds(other) && other->stream == e->stream && other->shared[device] > most)
                most = other->shared[device];
        sum += most;
    }
    return sum;
}

/* In what order: what a node needs first. False: a cycle. Marks say who was seen, `until` who is done. */
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
        exec->n_ops = 0; /* none of them holds its memory yet */
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

/* The oldest form tells of a failure in words, which nobody here writes. */
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
    /* Uploading needs to know where, which only the form with parameters says. */
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

/* While it runs it keeps what it was launched with: destroying it then is what frees it at its end. */
API cuGraphExecDestroy(CUgraphExec hGraphExec)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct exec *exec = find(hGraphExec);
    if (!exec) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    exec_free(exec);
    return sim_leave(CUDA_SUCCESS);
}

/* Launching. */

static CUresult reserve_all(const struct exec *exec)
{
    bool devices[SIM_MAX_DEVICES] = {false};
    for (size_t i = 0; i < exec->n_ops; i++)
        if (is_memory(&exec->ops[i])) devices[exec->ops[i].memory->device] = true;
    for (int d = 0; d < SIM_MAX_DEVICES; d++) {
        CUresult result = devices[d] ? graph_memory_reserve(d) : CUDA_SUCCESS;
        if (result) return result;
    }
    return CUDA_SUCCESS;
}

/* Takes the memory for a launch in this stream, without launching. */
static CUresult reserve_for(struct exec *exec, const struct stream *stream)
{
    struct exec before = *exec;
    exec->stream = stream->id;
    exec->done_ns = UINT64_MAX; /* for the length of the question */
    CUresult result = reserve_all(exec);
    exec->done_ns = before.done_ns;
    if (result) exec->stream = before.stream;
    return result;
}

/* What a launch will leave behind is not live yet, and must have room all the same. */
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
        if (allocates && op->memory->live && live && !(exec->flags & AUTO_FREE)) return CUDA_ERROR_INVALID_VALUE;
    }
    for (size_t i = 0; i < exec->n_ops; i++) {
        struct node *op = &exec->ops[i];
        if (op->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC) op->memory->live = live && !op->memory->freed_inside;
        if (op->type == CU_GRAPH_NODE_TYPE_MEM_FREE && live) op->memory->live = false;
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
    /* On a device this would be an error at the next synchronisation, and the end of the context. */
    return result ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

/* An executable graph and a stream that does what it is given: a capturing one takes none. */
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
    if (before > stream->done_ns) stream->done_ns = before; /* one launch of it at a time */
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
