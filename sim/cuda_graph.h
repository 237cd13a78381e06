/* What graphs and stream capture know. A node holds what it will do; an executable graph holds copies of its nodes in
 * an order that satisfies every edge. All of it is guarded by the lock of cuda_init.c. */
#ifndef FGPU_SIM_CUDA_GRAPH_H
#define FGPU_SIM_CUDA_GRAPH_H

#include "cuda_state.h"

#define MAX_SPANS 16 /* in which kernels run; more become one */

/* Rows of rows: what a copy is when it is not done at once. A height or depth of 0 counts as 1. */
struct transfer {
    uintptr_t to, from;
    enum side to_side, from_side;
    size_t width, height, depth;
    size_t to_pitch, from_pitch, to_slice, from_slice;
};

struct fill {
    CUdeviceptr at;
    uint32_t value;
    size_t element, width, height, pitch;
};

struct kernel {
    CUfunction function;
    struct shape shape;
    struct kernel_run run;
};

/* Memory of an allocation node: its address is fixed when the node is made, there is memory behind it between a launch
 * and a free. Lives while a graph, an executable graph or the program holds it. */
struct graph_memory {
    struct range *range;
    size_t size; /* physical */
    int device;
    unsigned refs;
    bool live;
    bool freed_inside, freed_elsewhere; /* by a node of the owning graph, of another one */
    struct graph *owner;                /* NULL: destroyed */
    struct graph_memory *next;
};

struct node {
    CUgraphNodeType type;
    struct graph *graph;
    struct node **needs;
    size_t n_needs;
    uint64_t mark;  /* of the last walk that came by */
    uint64_t until; /* during instantiation: when it is done, counted from the launch */
    union {
        struct kernel kernel;
        struct transfer copy;
        struct fill fill;
        struct graph_memory *memory;
    };
    CUDA_MEM_ALLOC_NODE_PARAMS alloc; /* as given, for the question after it */
    struct node *next;                /* the one made before it */
};

/* When kernels run, counted from the launch: copies between them leave the device to others. */
struct plan {
    uint64_t ns; /* from the first to the last */
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
    struct exec *exec; /* where there are memory nodes: the only one */
    struct graph *next;
};

/* cuda_graph.c */
struct graph *graph_new(void);
struct graph *graph_find(CUgraph handle);
void graph_free(struct graph *graph);
struct node *node_new(struct graph *graph, CUgraphNodeType type, struct node *const *needs, size_t n_needs);
void node_drop(struct node *node); /* the newest of its graph */
uint64_t graph_mark(void);         /* a value that no walk had yet */

/* cuda_graph_memory.c */
CUresult graph_memory_new(struct graph *owner, int device, size_t size, struct graph_memory **out);
CUresult graph_memory_node_free(struct graph *graph, uintptr_t at, struct graph_memory **out);
struct graph_memory *graph_memory_find(uintptr_t at);
void graph_memory_drop(struct graph_memory *memory);
uint64_t graph_memory_live(int device);
CUresult graph_memory_reserve(int device);

/* cuda_graph_exec.c */
uint64_t execs_need(int device); /* bytes that running ones share by stream */
void exec_forget_graph(struct exec *exec);

/* cuda_graph_time.c */
uint64_t node_ns(const struct node *node);
CUresult plan_make(struct plan *plan, const struct node *ops, size_t n_ops); /* ops: in order, `until` known */
CUresult plan_run(const struct plan *plan, struct context *context, struct stream *stream);

/* cuda_capture.c */
struct graph *capture_graph(const struct stream *stream);
CUresult capture_node(struct stream *stream, CUgraphNodeType type, struct node **out);

/* cuda_copy.c */
CUresult transfer_run(const struct transfer *transfer);
uint64_t transfer_ns(const struct transfer *transfer);
CUresult fill_run(const struct fill *fill);
uint64_t fill_ns(const struct fill *fill);

#endif
