/* Graphs as programs build and read them: nodes, edges, and queries of them. */
#include "cuda/graph/graph.h"

#include <stdlib.h>
#include <string.h>

static struct graph *graphs;
static uint64_t last_mark;

uint64_t graph_mark(void) { return ++last_mark; }

struct graph *graph_new(void)
{
    struct graph *graph = calloc(1, sizeof *graph);
    if (!graph) return NULL;
    graph->next = graphs;
    graphs = graph;
    return graph;
}

struct graph *graph_find(CUgraph handle)
{
    for (struct graph *g = graphs; g; g = g->next)
        if (g == (struct graph *)handle) return g;
    return NULL;
}

void node_drop(struct node *node)
{
    node->graph->nodes = node->next;
    node->graph->n_nodes--;
    if (node->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC && node->memory) {
        node->memory->owner = NULL;
        graph_memory_drop(node->memory);
    }
    free(node->needs);
    free(node);
}

void graph_free(struct graph *graph)
{
    while (graph->nodes) node_drop(graph->nodes);
    struct graph **at = &graphs;
    while (*at != graph) at = &(*at)->next;
    *at = graph->next;
    free(graph);
}

struct node *node_new(struct graph *graph, CUgraphNodeType type, struct node *const *needs, size_t n_needs)
{
    struct node *node = calloc(1, sizeof *node);
    if (!node) return NULL;
    node->needs = n_needs ? malloc(n_needs * sizeof *needs) : NULL;
    if (n_needs && !node->needs) {
        free(node);
        return NULL;
    }
    if (n_needs) memcpy(node->needs, needs, n_needs * sizeof *needs);
    node->n_needs = n_needs;
    node->type = type;
    node->graph = graph;
    node->next = graph->nodes;
    graph->nodes = node;
    graph->n_nodes++;
    return node;
}

API cuGraphCreate(CUgraph *phGraph, unsigned int flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!phGraph || flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct graph *graph = graph_new();
    if (graph) *phGraph = (CUgraph)graph;
    return sim_leave(graph ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult graph_enter(CUgraph handle, struct graph **graph)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    *graph = graph_find(handle);
    return *graph ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_VALUE);
}

/* Copies oldest nodes first, so that a node's needs are copied before it. `until` holds the index meanwhile. */
static CUresult copy_nodes(const struct graph *graph, struct graph *clone)
{
    struct node **from = calloc(graph->n_nodes + 1, sizeof *from), **to = calloc(graph->n_nodes + 1, sizeof *to);
    CUresult result = from && to ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    size_t at = graph->n_nodes;
    for (struct node *n = graph->nodes; !result && n; n = n->next) {
        n->until = --at;
        from[at] = n;
    }
    for (size_t i = 0; !result && i < graph->n_nodes; i++) {
        to[i] = node_new(clone, from[i]->type, from[i]->needs, from[i]->n_needs);
        if (!to[i]) {
            result = CUDA_ERROR_OUT_OF_MEMORY;
            break;
        }
        struct node made = *to[i];
        *to[i] = *from[i];
        to[i]->graph = clone;
        to[i]->needs = made.needs;
        to[i]->next = made.next;
    }
    for (size_t i = 0; !result && i < graph->n_nodes; i++)
        for (size_t k = 0; k < to[i]->n_needs; k++) to[i]->needs[k] = to[to[i]->needs[k]->until];
    free(from);
    free(to);
    return result;
}

API cuGraphClone(CUgraph *phGraphClone, CUgraph originalGraph)
{
    struct graph *graph;
    CUresult result = graph_enter(originalGraph, &graph);
    if (result) return result;
    if (!phGraphClone) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (graph->has_memory) return sim_leave(CUDA_ERROR_NOT_SUPPORTED);
    struct graph *clone = graph_new();
    result = clone ? copy_nodes(graph, clone) : CUDA_ERROR_OUT_OF_MEMORY;
    if (!result)
        *phGraphClone = (CUgraph)clone;
    else if (clone)
        graph_free(clone);
    return sim_leave(result);
}

/* Queries. A node is searched for in all graphs, since the program gives only its handle. */

static struct node *find_node(CUgraphNode handle)
{
    for (struct graph *g = graphs; g; g = g->next)
        for (struct node *n = g->nodes; n; n = n->next)
            if (n == (struct node *)handle) return n;
    return NULL;
}

static CUresult enter_node(CUgraphNode handle, const void *out, struct node **node)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    *node = find_node(handle);
    return *node && out ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_VALUE);
}

/* Without an array, returns only the number of nodes. Fills an array oldest first, as far as it goes, and sets the
 * rest to NULL. */
static void list_nodes(const struct graph *graph, CUgraphNode *nodes, size_t *count, bool roots)
{
    size_t total = 0;
    for (const struct node *n = graph->nodes; n; n = n->next) total += !roots || !n->n_needs;
    size_t room = nodes ? *count : 0, at = total;
    for (struct node *n = graph->nodes; n; n = n->next) {
        if (roots && n->n_needs) continue;
        if (--at < room) nodes[at] = (CUgraphNode)n;
    }
    for (size_t i = total; i < room; i++) nodes[i] = NULL;
    *count = nodes && room < total ? room : total;
}

static CUresult get_nodes(CUgraph handle, CUgraphNode *nodes, size_t *count, bool roots)
{
    struct graph *graph;
    CUresult result = graph_enter(handle, &graph);
    if (result) return result;
    if (!count) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    list_nodes(graph, nodes, count, roots);
    return sim_leave(CUDA_SUCCESS);
}

API cuGraphGetNodes(CUgraph hGraph, CUgraphNode *nodes, size_t *numNodes)
{
    return get_nodes(hGraph, nodes, numNodes, false);
}

API cuGraphGetRootNodes(CUgraph hGraph, CUgraphNode *rootNodes, size_t *numRootNodes)
{
    return get_nodes(hGraph, rootNodes, numRootNodes, true);
}

API cuGraphNodeGetType(CUgraphNode hNode, CUgraphNodeType *type)
{
    struct node *node;
    CUresult result = enter_node(hNode, type, &node);
    if (result) return result;
    *type = node->type;
    return sim_leave(CUDA_SUCCESS);
}

static CUresult get_needs(CUgraphNode handle, CUgraphNode *needs, CUgraphEdgeData *edges, size_t *count)
{
    struct node *node;
    CUresult result = enter_node(handle, count, &node);
    if (result) return result;
    size_t room = needs ? *count : 0;
    for (size_t i = 0; i < room; i++) needs[i] = i < node->n_needs ? (CUgraphNode)node->needs[i] : NULL;
    for (size_t i = 0; edges && i < room; i++) edges[i] = (CUgraphEdgeData){0};
    *count = needs && room < node->n_needs ? room : node->n_needs;
    return sim_leave(CUDA_SUCCESS);
}

API cuGraphNodeGetDependencies(CUgraphNode hNode, CUgraphNode *dependencies, size_t *numDependencies)
{
    return get_needs(hNode, dependencies, NULL, numDependencies);
}

API cuGraphNodeGetDependencies_v2(CUgraphNode hNode, CUgraphNode *dependencies, CUgraphEdgeData *edgeData,
                                  size_t *numDependencies)
{
    return get_needs(hNode, dependencies, edgeData, numDependencies);
}

static CUresult get_edges(CUgraph handle, CUgraphNode *from, CUgraphNode *to, CUgraphEdgeData *edges, size_t *count)
{
    struct graph *graph;
    CUresult result = graph_enter(handle, &graph);
    if (result) return result;
    if (!count || !from != !to) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    size_t room = from ? *count : 0, total = 0;
    for (struct node *n = graph->nodes; n; n = n->next) {
        for (size_t i = 0; i < n->n_needs; i++, total++) {
            if (total >= room) continue;
            from[total] = (CUgraphNode)n->needs[i];
            to[total] = (CUgraphNode)n;
            if (edges) edges[total] = (CUgraphEdgeData){0};
        }
    }
    *count = from && room < total ? room : total;
    return sim_leave(CUDA_SUCCESS);
}

API cuGraphGetEdges(CUgraph hGraph, CUgraphNode *from, CUgraphNode *to, size_t *numEdges)
{
    return get_edges(hGraph, from, to, NULL, numEdges);
}

API cuGraphGetEdges_v2(CUgraph hGraph, CUgraphNode *from, CUgraphNode *to, CUgraphEdgeData *edgeData, size_t *numEdges)
{
    return get_edges(hGraph, from, to, edgeData, numEdges);
}

API cuGraphMemAllocNodeGetParams(CUgraphNode hNode, CUDA_MEM_ALLOC_NODE_PARAMS *params_out)
{
    struct node *node;
    CUresult result = enter_node(hNode, params_out, &node);
    if (result) return result;
    if (node->type != CU_GRAPH_NODE_TYPE_MEM_ALLOC) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *params_out = node->alloc;
    return sim_leave(CUDA_SUCCESS);
}

API cuGraphMemFreeNodeGetParams(CUgraphNode hNode, CUdeviceptr *dptr_out)
{
    struct node *node;
    CUresult result = enter_node(hNode, dptr_out, &node);
    if (result) return result;
    if (node->type != CU_GRAPH_NODE_TYPE_MEM_FREE) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *dptr_out = node->alloc.dptr;
    return sim_leave(CUDA_SUCCESS);
}

/* Edges. */

static bool is_in(const struct graph *graph, const struct node *node)
{
    for (const struct node *n = graph->nodes; n; n = n->next)
        if (n == node) return true;
    return false;
}

static CUresult add_edge(struct node *from, struct node *to)
{
    for (size_t i = 0; i < to->n_needs; i++)
        if (to->needs[i] == from) return CUDA_ERROR_INVALID_VALUE;
    struct node **needs = realloc(to->needs, (to->n_needs + 1) * sizeof *needs);
    if (!needs) return CUDA_ERROR_OUT_OF_MEMORY;
    to->needs = needs;
    needs[to->n_needs++] = from;
    return CUDA_SUCCESS;
}

static CUresult add_edges(CUgraph handle, const CUgraphNode *from, const CUgraphNode *to, size_t count)
{
    struct graph *graph;
    CUresult result = graph_enter(handle, &graph);
    if (result) return result;
    if (count && (!from || !to)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < count; i++)
        if (from[i] == to[i] || !is_in(graph, (struct node *)from[i]) || !is_in(graph, (struct node *)to[i]))
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < count && !result; i++) result = add_edge((struct node *)from[i], (struct node *)to[i]);
    return sim_leave(result);
}

API cuGraphAddDependencies(CUgraph hGraph, const CUgraphNode *from, const CUgraphNode *to, size_t numDependencies)
{
    return add_edges(hGraph, from, to, numDependencies);
}

API cuGraphAddDependencies_v2(CUgraph hGraph, const CUgraphNode *from, const CUgraphNode *to,
                              const CUgraphEdgeData *edgeData, size_t numDependencies)
{
    (void)edgeData;
    return add_edges(hGraph, from, to, numDependencies);
}
