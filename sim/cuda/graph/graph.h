/* Graphs and stream capture. A node holds what it will do. An executable graph holds copies of its nodes in an order
 * that satisfies every edge. */
#ifndef FGPU_SIM_CUDA_GRAPH_GRAPH_H
#define FGPU_SIM_CUDA_GRAPH_GRAPH_H

#include "cuda/code/code.h"
#include "cuda/core/capture_state.h"
#include "cuda/memory/memory.h"

#define MAX_SPANS 16 /* the number of spans in a plan; more kernels share the last */

struct kernel {
    CUfunction function;
    struct shape shape;
    struct kernel_run run;
};

/* Memory of an allocation node. Its address is fixed when the node is made. range->is_live: there is memory at the
 * address. The structure exists while a graph, an executable graph or the program holds it. */
struct graph_memory {
    struct range *range;
    size_t size; /* physical */
    int device;
    unsigned refs;
    bool freed_inside, freed_elsewhere; /* a node of the owning graph frees it; a node of another graph does */
    struct graph *owner;                /* NULL: the graph is destroyed */
    struct graph_memory *next;
};

struct node {
    CUgraphNodeType type;
    struct graph *graph;
    struct node **needs;
    size_t n_needs;
    uint64_t mark;  /* of the last walk that visited the node */
    uint64_t until; /* during instantiation: when the node is done, counted from the launch */
    union {
        struct kernel kernel;
        struct transfer copy;
        struct fill fill;
        struct graph_memory *memory;
    };
    CUDA_MEM_ALLOC_NODE_PARAMS alloc; /* as given, for cuGraphMemAllocNodeGetParams */
    struct node *next;                /* the node made before this one */
};

/* The times of kernels, counted from the launch. Between them, during copies, other contexts have the device. */
struct plan {
    uint64_t ns; /* from the start of the first node to the end of the last */
    struct span {
        uint64_t from, until;
    } spans[MAX_SPANS];
    size_t n;
};

struct exec;

struct graph {
    struct node *nodes; /* newest first */
    size_t n_nodes;
    bool has_memory, capturing;
    struct exec *exec; /* of a graph with memory nodes: its only executable graph */
    struct graph *next;
};

/* graph.c */
struct graph *graph_new(void);
struct graph *graph_find(CUgraph handle);
/* Takes the lock, and finds a graph. */
CUresult graph_enter(CUgraph handle, struct graph **graph);
/* Frees a graph that has no executable graph; graph_destroy frees any graph. */
void graph_free(struct graph *graph);
struct node *node_new(struct graph *graph, CUgraphNodeType type, struct node *const *needs, size_t n_needs);
/* Frees the newest node of its graph. */
void node_drop(struct node *node);
/* Returns a mark that no walk has used. */
uint64_t graph_mark(void);

/* memory.c: the memory of allocation nodes. `running` is the number of bytes of the executable graphs that run. */
CUresult graph_memory_new(struct graph *owner, int device, size_t size, struct graph_memory **out);
/* Finds the memory that a new node of the graph may free at this address. */
CUresult graph_memory_node_free(struct graph *graph, uintptr_t at, struct graph_memory **out);
/* Removes a reference. */
void graph_memory_drop(struct graph_memory *memory);
/* Takes from the device the missing part of the memory that is live or in use. */
CUresult graph_memory_reserve(int device, uint64_t running);
/* Releases memory that is not live and not in use. */
void graph_memory_trim(int device, uint64_t running);
/* Releases everything after the end of the device's last context. */
void graph_memory_end(int device);

/* exec.c */

/* Frees a graph. Its executable graph remains. */
void graph_destroy(struct graph *graph);

/* plan.c */

/* Returns how long the node takes. */
uint64_t node_ns(const struct node *node);
/* Plans the kernels among `ops`, which are in order and whose `until` is known. */
CUresult plan_make(struct plan *plan, const struct node *ops, size_t n_ops);
CUresult plan_run(const struct plan *plan, struct context *context, struct stream *stream);

/* capture.c */

/* Adds a node after the tail of a capturing stream. */
CUresult capture_node(struct stream *stream, CUgraphNodeType type, struct node **out);

#endif
