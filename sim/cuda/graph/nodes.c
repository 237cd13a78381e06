/* Adding nodes to a graph, by the call for each kind or by the call for all kinds. */
#include "cuda/graph/graph.h"

#define MAX_SIZE (1ull << 46)

/* The place of a node: the arguments that all these calls share. */
struct place {
    CUgraphNode *out;
    CUgraph graph;
    const CUgraphNode *needs;
    size_t n_needs;
};

/* Makes the checks that all these calls share. Takes the lock, and needs a current context. */
static CUresult enter_place(const struct place *place, struct context **context, struct graph **graph)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    *graph = graph_find(place->graph);
    if (!*graph || !place->out || (place->n_needs && !place->needs)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < place->n_needs; i++) {
        const struct node *node = (*graph)->nodes;
        while (node && node != (struct node *)place->needs[i]) node = node->next;
        for (size_t k = 0; k < i; k++)
            if (place->needs[k] == place->needs[i]) node = NULL;
        if (!node) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    }
    return CUDA_SUCCESS;
}

static struct node *add(const struct place *place, struct graph *graph, CUgraphNodeType type)
{
    struct node *node = node_new(graph, type, (struct node *const *)place->needs, place->n_needs);
    if (node) *place->out = (CUgraphNode)node;
    return node;
}

static CUresult add_empty(struct place place)
{
    struct context *context;
    struct graph *graph;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    return sim_leave(add(&place, graph, CU_GRAPH_NODE_TYPE_EMPTY) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

static CUresult add_kernel(struct place place, struct kernel kernel)
{
    struct context *context;
    struct graph *graph;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    result = kernel_check(context, kernel.function, &kernel.shape, false, &kernel.run);
    if (result) return sim_leave(result);
    struct node *node = add(&place, graph, CU_GRAPH_NODE_TYPE_KERNEL);
    if (node) node->kernel = kernel;
    return sim_leave(node ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

static bool is_fill(const CUDA_MEMSET_NODE_PARAMS *p)
{
    size_t row;
    return p && (p->elementSize == 1 || p->elementSize == 2 || p->elementSize == 4) && p->width && p->height &&
           !__builtin_mul_overflow(p->width, (size_t)p->elementSize, &row) && (p->height == 1 || p->pitch >= row);
}

static CUresult add_memset(struct place place, const CUDA_MEMSET_NODE_PARAMS *params)
{
    struct context *context;
    struct graph *graph;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    if (!is_fill(params) || !range_find(params->dst)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct node *node = add(&place, graph, CU_GRAPH_NODE_TYPE_MEMSET);
    if (!node) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    node->fill = (struct fill){.at = params->dst,
                               .value = params->value,
                               .element = params->elementSize,
                               .width = params->width,
                               .height = params->height,
                               .pitch = params->pitch};
    return sim_leave(CUDA_SUCCESS);
}

static bool read_end(CUmemorytype type, const void *host, CUdeviceptr device, uintptr_t *at, enum side *side)
{
    *side = type == CU_MEMORYTYPE_HOST ? HOST : type == CU_MEMORYTYPE_UNIFIED ? EITHER : DEVICE;
    *at = type == CU_MEMORYTYPE_HOST ? (uintptr_t)host : device;
    return type != CU_MEMORYTYPE_ARRAY && *at; /* arrays have no contents here */
}

static size_t or_else(size_t wanted, size_t otherwise) { return wanted ? wanted : otherwise; }

static bool read_transfer(const CUDA_MEMCPY3D *p, struct transfer *t)
{
    if (!p || !p->WidthInBytes || !p->Height || !p->Depth || p->WidthInBytes > MAX_SIZE || p->Height > MAX_SIZE ||
        p->Depth > MAX_SIZE || p->reserved0 || p->reserved1)
        return false;
    if (!read_end(p->dstMemoryType, p->dstHost, p->dstDevice, &t->to, &t->to_side) ||
        !read_end(p->srcMemoryType, p->srcHost, p->srcDevice, &t->from, &t->from_side))
        return false;
    t->width = p->WidthInBytes;
    t->height = p->Height;
    t->depth = p->Depth;
    t->to_pitch = or_else(p->dstPitch, p->WidthInBytes);
    t->from_pitch = or_else(p->srcPitch, p->WidthInBytes);
    if ((p->Height > 1 || p->Depth > 1) && (t->to_pitch < t->width || t->from_pitch < t->width)) return false;
    t->to_slice = t->to_pitch * or_else(p->dstHeight, p->Height);
    t->from_slice = t->from_pitch * or_else(p->srcHeight, p->Height);
    t->to += p->dstXInBytes + p->dstY * t->to_pitch + p->dstZ * t->to_slice;
    t->from += p->srcXInBytes + p->srcY * t->from_pitch + p->srcZ * t->from_slice;
    return true;
}

static CUresult add_memcpy(struct place place, const CUDA_MEMCPY3D *params)
{
    struct context *context;
    struct graph *graph;
    struct transfer transfer;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    if (!read_transfer(params, &transfer)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct node *node = add(&place, graph, CU_GRAPH_NODE_TYPE_MEMCPY);
    if (node) node->copy = transfer;
    return sim_leave(node ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

/* The address exists at once. The memory exists from the graph's launch on. */
static CUresult add_alloc(struct place place, CUDA_MEM_ALLOC_NODE_PARAMS *params)
{
    struct context *context;
    struct graph *graph;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    if (!params || !params->bytesize || params->poolProps.allocType != CU_MEM_ALLOCATION_TYPE_PINNED ||
        params->poolProps.handleTypes != CU_MEM_HANDLE_TYPE_NONE ||
        params->poolProps.location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        !sim_is_device(params->poolProps.location.id) || (params->accessDescCount && !params->accessDescs) ||
        params->accessDescCount > driver.n_devices)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct node *node = add(&place, graph, CU_GRAPH_NODE_TYPE_MEM_ALLOC);
    if (!node) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = graph_memory_new(graph, params->poolProps.location.id, params->bytesize, &node->memory);
    if (result) {
        node_drop(node);
        return sim_leave(result);
    }
    params->dptr = node->memory->range->start;
    node->alloc = *params;
    node->alloc.accessDescs = NULL; /* memory of the program, which may have freed it before the query */
    node->alloc.accessDescCount = 0;
    graph->has_memory = true;
    return sim_leave(CUDA_SUCCESS);
}

static CUresult add_free(struct place place, CUdeviceptr at)
{
    struct context *context;
    struct graph *graph;
    struct graph_memory *memory;
    CUresult result = enter_place(&place, &context, &graph);
    if (result) return result;
    result = graph_memory_node_free(graph, at, &memory);
    if (result) return sim_leave(result);
    struct node *node = add(&place, graph, CU_GRAPH_NODE_TYPE_MEM_FREE);
    if (!node) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    node->memory = memory;
    node->alloc.dptr = at;
    graph->has_memory = true;
    return sim_leave(CUDA_SUCCESS);
}

#define PLACE                                                                                                          \
    (struct place) { phGraphNode, hGraph, dependencies, numDependencies }
#define PARAMS CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies, size_t numDependencies
#define KERNEL(p, f)                                                                                                   \
    (struct kernel)                                                                                                    \
    {                                                                                                                  \
        f,                                                                                                             \
            {{(p)->gridDimX, (p)->gridDimY, (p)->gridDimZ},                                                            \
             {(p)->blockDimX, (p)->blockDimY, (p)->blockDimZ},                                                         \
             (p)->sharedMemBytes},                                                                                     \
        {                                                                                                              \
            0                                                                                                          \
        }                                                                                                              \
    }

API cuGraphAddEmptyNode(PARAMS) { return add_empty(PLACE); }

API cuGraphAddKernelNode(PARAMS, const CUDA_KERNEL_NODE_PARAMS_v1 *nodeParams)
{
    return nodeParams ? add_kernel(PLACE, KERNEL(nodeParams, nodeParams->func)) : CUDA_ERROR_INVALID_VALUE;
}

/* The kernel of a library may take the place of a function: both are looked up alike. */
API cuGraphAddKernelNode_v2(PARAMS, const CUDA_KERNEL_NODE_PARAMS *nodeParams)
{
    if (!nodeParams) return CUDA_ERROR_INVALID_VALUE;
    CUfunction function = nodeParams->func ? nodeParams->func : (CUfunction)nodeParams->kern;
    return add_kernel(PLACE, KERNEL(nodeParams, function));
}

API cuGraphAddMemsetNode(PARAMS, const CUDA_MEMSET_NODE_PARAMS *memsetParams, CUcontext ctx)
{
    (void)ctx;
    return add_memset(PLACE, memsetParams);
}

API cuGraphAddMemcpyNode(PARAMS, const CUDA_MEMCPY3D *copyParams, CUcontext ctx)
{
    (void)ctx;
    return add_memcpy(PLACE, copyParams);
}

API cuGraphAddMemAllocNode(PARAMS, CUDA_MEM_ALLOC_NODE_PARAMS *nodeParams) { return add_alloc(PLACE, nodeParams); }

API cuGraphAddMemFreeNode(PARAMS, CUdeviceptr dptr) { return add_free(PLACE, dptr); }

static CUresult add_any_alloc(struct place place, CUDA_MEM_ALLOC_NODE_PARAMS_v2 *params)
{
    CUDA_MEM_ALLOC_NODE_PARAMS old = {params->poolProps, params->accessDescs, params->accessDescCount, params->bytesize,
                                      0};
    CUresult result = add_alloc(place, &old);
    if (!result) params->dptr = old.dptr;
    return result;
}

static CUresult add_any(struct place place, CUgraphNodeParams *params)
{
    if (!params) return CUDA_ERROR_INVALID_VALUE;
    switch (params->type) {
    case CU_GRAPH_NODE_TYPE_KERNEL: {
        const CUDA_KERNEL_NODE_PARAMS_v3 *p = &params->kernel;
        return add_kernel(place, KERNEL(p, p->func ? p->func : (CUfunction)p->kern));
    }
    case CU_GRAPH_NODE_TYPE_MEMCPY:
        return add_memcpy(place, &params->memcpy.copyParams);
    case CU_GRAPH_NODE_TYPE_MEMSET: {
        const CUDA_MEMSET_NODE_PARAMS_v2 *p = &params->memset;
        CUDA_MEMSET_NODE_PARAMS old = {p->dst, p->pitch, p->value, p->elementSize, p->width, p->height};
        return add_memset(place, &old);
    }
    case CU_GRAPH_NODE_TYPE_EMPTY:
        return add_empty(place);
    case CU_GRAPH_NODE_TYPE_MEM_ALLOC:
        return add_any_alloc(place, &params->alloc);
    case CU_GRAPH_NODE_TYPE_MEM_FREE:
        return add_free(place, params->free.dptr);
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
}

API cuGraphAddNode(PARAMS, CUgraphNodeParams *nodeParams) { return add_any(PLACE, nodeParams); }

API cuGraphAddNode_v2(CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies,
                      const CUgraphEdgeData *dependencyData, size_t numDependencies, CUgraphNodeParams *nodeParams)
{
    (void)dependencyData;
    return add_any(PLACE, nodeParams);
}
