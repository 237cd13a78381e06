/*
 * graph_reading.c: computes how much memory the allocation nodes of a graph hold at the same time. Owns nothing.
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "account/graph_memory.h"

#define NODES 128 /* read on the stack; longer graphs are read into a mapping of their own */
#define DEPTH 4

static void read_alloc(struct fgpu_graph_reading *r, CUgraphNode node)
{
    CUDA_MEM_ALLOC_NODE_PARAMS params;
    __typeof__(&cuGraphMemAllocNodeGetParams) get = REAL(cuGraphMemAllocNodeGetParams);
    if (!get || get(node, &params) != CUDA_SUCCESS) return;
    if (params.poolProps.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return;
    uint64_t bytes = fgpu_taken(params.bytesize, fgpu_granule(params.poolProps.location.id));
    r->ordinal = params.poolProps.location.id;
    r->live = r->live + bytes > FGPU_MOST_BYTES ? TOO_MUCH : r->live + bytes;
    if (r->live > r->peak) r->peak = r->live;
    if (r->known == FGPU_GRAPH_LIVE) return; /* its free node is ignored: the memory counts as held until the end */
    r->nodes[r->known].pointer = params.dptr;
    r->nodes[r->known++].bytes = bytes;
}

static void read_free(struct fgpu_graph_reading *r, CUgraphNode node)
{
    CUdeviceptr pointer = 0;
    __typeof__(&cuGraphMemFreeNodeGetParams) get = REAL(cuGraphMemFreeNodeGetParams);
    if (!get || get(node, &pointer) != CUDA_SUCCESS) return;
    for (unsigned i = 0; i < r->known; i++) {
        if (r->nodes[i].pointer != pointer) continue;
        r->live -= r->nodes[i].bytes < r->live ? r->nodes[i].bytes : r->live;
        r->nodes[i] = r->nodes[--r->known];
        return;
    }
}

static void read_graph(struct fgpu_graph_reading *r, CUgraph graph, int depth);

static void read_nodes(struct fgpu_graph_reading *r, const CUgraphNode *nodes, size_t count, int depth)
{
    __typeof__(&cuGraphNodeGetType) type_of = REAL(cuGraphNodeGetType);
    __typeof__(&cuGraphChildGraphNodeGetGraph) child_of = REAL(cuGraphChildGraphNodeGetGraph);
    for (size_t i = 0; type_of && i < count; i++) {
        CUgraphNodeType type;
        CUgraph child;
        if (type_of(nodes[i], &type) != CUDA_SUCCESS) continue;
        if (type == CU_GRAPH_NODE_TYPE_MEM_ALLOC) read_alloc(r, nodes[i]);
        if (type == CU_GRAPH_NODE_TYPE_MEM_FREE) read_free(r, nodes[i]);
        if (type == CU_GRAPH_NODE_TYPE_GRAPH && child_of && child_of(nodes[i], &child) == CUDA_SUCCESS)
            read_graph(r, child, depth + 1);
    }
}

/* Read a graph in the order in which its nodes were created. For a captured graph that is an order in which they may
 * run. */
static void read_graph(struct fgpu_graph_reading *r, CUgraph graph, int depth)
{
    __typeof__(&cuGraphGetNodes) get = REAL(cuGraphGetNodes);
    CUgraphNode some[NODES], *nodes = some;
    size_t count = 0, room = 0;
    if (!get || depth > DEPTH || get(graph, NULL, &count) != CUDA_SUCCESS || !count) return;
    if (count > NODES) {
        room = count * sizeof *nodes;
        nodes = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (nodes == MAP_FAILED) {
            nodes = some;
            count = NODES;
            room = 0;
        }
    }
    if (get(graph, nodes, &count) == CUDA_SUCCESS) read_nodes(r, nodes, count, depth);
    if (room) munmap(nodes, room);
}

void fgpu_graph_read(struct fgpu_graph_reading *reading, CUgraph graph)
{
    reading->live = reading->peak = reading->known = 0;
    reading->ordinal = -1;
    read_graph(reading, graph, 0);
}
