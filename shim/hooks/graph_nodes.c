/*
 * graph_nodes.c: kernels that become nodes of graphs, without a launch of their own. Owns nothing.
 *
 * The driver allocates their local memory when the graph is launched, and then no single node can be refused. So the
 * shim requests it when the node is created or changed.
 */
#include "code/local_memory.h"

/* Return true if the driver may be called; fgpu_first_ends then takes its result. */
static bool begins(struct fgpu_first *first, CUfunction function, CUresult *refusal)
{
    bool is_known = !function || fgpu_function_is_known(function);
    *refusal = fgpu_first_begins(first, is_known ? NULL : function);
    return *refusal == CUDA_SUCCESS;
}

#define NODE(name, function, ...)                                                                                      \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct fgpu_first first;                                                                                       \
        CUresult refusal = CUDA_ERROR_NOT_SUPPORTED;                                                                   \
        if (!driver || !begins(&first, function, &refusal)) return refusal;                                            \
        return fgpu_first_ends(&first, driver(__VA_ARGS__));                                                           \
    } while (0)

static CUfunction of_old(const CUDA_KERNEL_NODE_PARAMS_v1 *params) { return params ? params->func : NULL; }

/* A kernel's handle may be passed instead of a function's. */
static CUfunction of_new(const CUDA_KERNEL_NODE_PARAMS_v2 *params)
{
    if (!params) return NULL;
    return params->func ? params->func : (CUfunction)params->kern;
}

static CUfunction of_any(const CUgraphNodeParams *params)
{
    if (!params || params->type != CU_GRAPH_NODE_TYPE_KERNEL) return NULL;
    return params->kernel.func ? params->kernel.func : (CUfunction)params->kernel.kern;
}

EXPORT CUresult cuGraphAddKernelNode(CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies,
                                     size_t numDependencies, const CUDA_KERNEL_NODE_PARAMS_v1 *nodeParams)
{
    NODE(cuGraphAddKernelNode, of_old(nodeParams), phGraphNode, hGraph, dependencies, numDependencies, nodeParams);
}

EXPORT CUresult cuGraphAddKernelNode_v2(CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies,
                                        size_t numDependencies, const CUDA_KERNEL_NODE_PARAMS_v2 *nodeParams)
{
    NODE(cuGraphAddKernelNode_v2, of_new(nodeParams), phGraphNode, hGraph, dependencies, numDependencies, nodeParams);
}

EXPORT CUresult cuGraphAddNode(CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies,
                               size_t numDependencies, CUgraphNodeParams *nodeParams)
{
    NODE(cuGraphAddNode, of_any(nodeParams), phGraphNode, hGraph, dependencies, numDependencies, nodeParams);
}

EXPORT CUresult cuGraphAddNode_v2(CUgraphNode *phGraphNode, CUgraph hGraph, const CUgraphNode *dependencies,
                                  const CUgraphEdgeData *dependencyData, size_t numDependencies,
                                  CUgraphNodeParams *nodeParams)
{
    NODE(cuGraphAddNode_v2, of_any(nodeParams), phGraphNode, hGraph, dependencies, dependencyData, numDependencies,
         nodeParams);
}

EXPORT CUresult cuGraphKernelNodeSetParams(CUgraphNode hNode, const CUDA_KERNEL_NODE_PARAMS_v1 *nodeParams)
{
    NODE(cuGraphKernelNodeSetParams, of_old(nodeParams), hNode, nodeParams);
}

EXPORT CUresult cuGraphKernelNodeSetParams_v2(CUgraphNode hNode, const CUDA_KERNEL_NODE_PARAMS_v2 *nodeParams)
{
    NODE(cuGraphKernelNodeSetParams_v2, of_new(nodeParams), hNode, nodeParams);
}

EXPORT CUresult cuGraphNodeSetParams(CUgraphNode hNode, CUgraphNodeParams *nodeParams)
{
    NODE(cuGraphNodeSetParams, of_any(nodeParams), hNode, nodeParams);
}

EXPORT CUresult cuGraphExecKernelNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode,
                                               const CUDA_KERNEL_NODE_PARAMS_v1 *nodeParams)
{
    NODE(cuGraphExecKernelNodeSetParams, of_old(nodeParams), hGraphExec, hNode, nodeParams);
}

EXPORT CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec hGraphExec, CUgraphNode hNode,
                                                  const CUDA_KERNEL_NODE_PARAMS_v2 *nodeParams)
{
    NODE(cuGraphExecKernelNodeSetParams_v2, of_new(nodeParams), hGraphExec, hNode, nodeParams);
}

EXPORT CUresult cuGraphExecNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode, CUgraphNodeParams *nodeParams)
{
    NODE(cuGraphExecNodeSetParams, of_any(nodeParams), hGraphExec, hNode, nodeParams);
}
