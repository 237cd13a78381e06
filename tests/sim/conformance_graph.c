/* Graphs: nodes, instantiation, launches, and above all their memory. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static CUDA_MEM_ALLOC_NODE_PARAMS want(size_t size)
{
    CUDA_MEM_ALLOC_NODE_PARAMS params;
    memset(&params, 0, sizeof params);
    params.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    params.poolProps.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    params.bytesize = size;
    return params;
}

static void attributes(const char *when)
{
    static const char *const names[] = {"used", "used.high", "reserved", "reserved.high"};
    for (int i = 0; i < 4; i++) {
        char name[96];
        cuuint64_t value = 0;
        snprintf(name, sizeof name, "%s.%s", when, names[i]);
        say(name, CALL(cuDeviceGetGraphMemAttribute, 0, (CUgraphMem_attribute)i, &value) ? -1 : (long long)value);
    }
    char name[96];
    snprintf(name, sizeof name, "%s.taken.mib", when);
    say(name, taken_mib());
}

static void check_nodes(void)
{
    CUgraph graph = NULL, clone = NULL;
    CUgraphNode a = NULL, b = NULL, c = NULL, list[8];
    CUgraphExec exec = NULL;
    CUgraphNodeType type;
    size_t n = 0;
    TRY("create.null", cuGraphCreate, NULL, 0);
    TRY("create.flags", cuGraphCreate, &graph, 1);
    TRY("create", cuGraphCreate, &graph, 0);
    TRY("empty", cuGraphAddEmptyNode, &a, graph, NULL, 0);
    TRY("empty.needs", cuGraphAddEmptyNode, &b, graph, &a, 1);
    CUgraphNode twice[2] = {a, a};
    TRY("empty.needs.twice", cuGraphAddEmptyNode, &c, graph, twice, 2);
    TRY("empty.needs.null", cuGraphAddEmptyNode, &c, graph, NULL, 1);
    TRY("empty.null", cuGraphAddEmptyNode, NULL, graph, NULL, 0);
    TRY("edge.twice", cuGraphAddDependencies, graph, &a, &b, 1);
    TRY("edge.self", cuGraphAddDependencies, graph, &a, &a, 1);
    TRY("nodes", cuGraphGetNodes, graph, NULL, &n);
    say("nodes.n", (long long)n);
    n = 8;
    TRY("nodes.list", cuGraphGetNodes, graph, list, &n);
    say("nodes.list.n", (long long)n);
    say("nodes.list.past", list[2] == NULL);
    n = 1;
    TRY("nodes.short", cuGraphGetNodes, graph, list, &n);
    say("nodes.short.n", (long long)n);
    TRY("nodes.null", cuGraphGetNodes, graph, list, NULL);
    n = 8;
    TRY("roots", cuGraphGetRootNodes, graph, list, &n);
    say("roots.n", (long long)n);
    TRY("type", cuGraphNodeGetType, a, &type);
    say("type.value", type);
    TRY("clone", cuGraphClone, &clone, graph);
    n = 8;
    CALL(cuGraphGetNodes, clone, list, &n);
    say("clone.n", (long long)n);
    TRY("cycle.edge", cuGraphAddDependencies, graph, &b, &a, 1);
    TRY("cycle.instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("instantiate", cuGraphInstantiateWithFlags, &exec, clone, 0);
    TRY("instantiate.flags", cuGraphInstantiateWithFlags, &exec, clone, 0x1000);
    TRY("instantiate.upload", cuGraphInstantiateWithFlags, &exec, clone, CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD);
    TRY("launch", cuGraphLaunch, exec, NULL);
    TRY("upload", cuGraphUpload, exec, NULL);
    TRY("destroy", cuGraphDestroy, clone);
    TRY("launch.alone", cuGraphLaunch, exec, NULL);
    TRY("wait", cuCtxSynchronize);
    TRY("exec.destroy", cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
}

static void check_kernel_node(void)
{
    CUgraph graph = NULL;
    CUgraphNode node = NULL;
    CUgraphExec exec = NULL;
    CUmodule module = NULL;
    CUfunction function = NULL;
    CUDA_KERNEL_NODE_PARAMS params;
    memset(&params, 0, sizeof params);
    CALL(cuModuleLoadData, &module, image);
    CALL(cuModuleGetFunction, &function, module, "spin_0us");
    CALL(cuGraphCreate, &graph, 0);
    params.func = function;
    params.gridDimX = params.gridDimY = params.gridDimZ = params.blockDimX = params.blockDimY = params.blockDimZ = 1;
    TRY("kernel", cuGraphAddKernelNode_v2, &node, graph, NULL, 0, &params);
    params.gridDimX = 0;
    TRY("kernel.grid0", cuGraphAddKernelNode_v2, &node, graph, NULL, 0, &params);
    TRY("kernel.null", cuGraphAddKernelNode_v2, &node, graph, NULL, 0, NULL);
    TRY("kernel.instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("kernel.launch", cuGraphLaunch, exec, NULL);
    TRY("kernel.launch.again", cuGraphLaunch, exec, NULL);
    TRY("kernel.wait", cuCtxSynchronize);
    CALL(cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
    CALL(cuModuleUnload, module);
}

static void check_copies(void)
{
    CUgraph graph = NULL;
    CUgraphNode set = NULL, copy = NULL;
    CUgraphExec exec = NULL;
    CUcontext context = NULL;
    CUdeviceptr memory = 0;
    static char out[256];
    CUDA_MEMSET_NODE_PARAMS fill = {.value = 7, .elementSize = 1, .width = sizeof out, .height = 1};
    CUDA_MEMCPY3D back;
    CALL(cuCtxGetCurrent, &context);
    CALL(cuMemAlloc_v2, &memory, 4096);
    fill.dst = memory;
    memset(&back, 0, sizeof back);
    back.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    back.srcDevice = memory;
    back.dstMemoryType = CU_MEMORYTYPE_HOST;
    back.dstHost = out;
    back.WidthInBytes = sizeof out;
    back.Height = back.Depth = 1;
    CALL(cuGraphCreate, &graph, 0);
    TRY("set", cuGraphAddMemsetNode, &set, graph, NULL, 0, &fill, context);
    TRY("copy", cuGraphAddMemcpyNode, &copy, graph, &set, 1, &back, context);
    fill.elementSize = 3;
    TRY("set.element", cuGraphAddMemsetNode, &set, graph, NULL, 0, &fill, context);
    fill.elementSize = 1;
    fill.width = 0;
    TRY("set.width0", cuGraphAddMemsetNode, &set, graph, NULL, 0, &fill, context);
    TRY("set.null", cuGraphAddMemsetNode, &set, graph, NULL, 0, NULL, context);
    back.WidthInBytes = 0;
    TRY("copy.width0", cuGraphAddMemcpyNode, &copy, graph, NULL, 0, &back, context);
    TRY("copy.null", cuGraphAddMemcpyNode, &copy, graph, NULL, 0, NULL, context);
    TRY("copy.instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("copy.launch", cuGraphLaunch, exec, NULL);
    TRY("copy.wait", cuStreamSynchronize, NULL);
    say("copy.value", out[0] + out[255]);
    CALL(cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
    CALL(cuMemFree_v2, memory);
}

/* Returns a graph that allocates memory and, with `frees`, frees it. */
static CUgraph allocating(size_t size, int frees, CUdeviceptr *at)
{
    CUgraph graph = NULL;
    CUgraphNode a = NULL, f = NULL;
    CUDA_MEM_ALLOC_NODE_PARAMS params = want(size);
    CALL(cuGraphCreate, &graph, 0);
    CALL(cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    if (frees) CALL(cuGraphAddMemFreeNode, &f, graph, &a, 1, params.dptr);
    *at = params.dptr;
    return graph;
}

static void check_memory_nodes(void)
{
    CUgraph graph = NULL, clone = NULL, second = NULL;
    CUgraphNode a = NULL, f = NULL;
    CUgraphExec exec = NULL, again = NULL;
    CUdeviceptr at = 0, base = 0;
    size_t size = 0;
    CUDA_MEM_ALLOC_NODE_PARAMS params = want(0);
    CALL(cuGraphCreate, &graph, 0);
    TRY("memory.0", cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    params = want(1000);
    params.poolProps.location.id = 99;
    TRY("memory.device", cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    params = want(1000);
    params.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_INVALID;
    TRY("memory.type", cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    params = want((size_t)1 << 44);
    TRY("memory.huge", cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    TRY("memory.null", cuGraphAddMemAllocNode, &a, graph, NULL, 0, NULL);
    params = want(1000);
    TRY("memory", cuGraphAddMemAllocNode, &a, graph, NULL, 0, &params);
    say("memory.dptr", params.dptr != 0);
    TRY("memory.free.unknown", cuGraphAddMemFreeNode, &f, graph, &a, 1, 0x1000);
    TRY("memory.range", cuMemGetAddressRange_v2, &base, &size, params.dptr);
    TRY("memory.free.unlaunched", cuMemFree_v2, params.dptr);
    TRY("memory.clone", cuGraphClone, &clone, graph);
    TRY("memory.free", cuGraphAddMemFreeNode, &f, graph, &a, 1, params.dptr);
    TRY("memory.free.twice", cuGraphAddMemFreeNode, &f, graph, &a, 1, params.dptr);
    second = allocating(1000, 0, &at);
    TRY("memory.free.foreign", cuGraphAddMemFreeNode, &f, graph, NULL, 0, at);
    TRY("memory.free.owner.after", cuGraphAddMemFreeNode, &f, second, NULL, 0, at);
    CALL(cuGraphDestroy, graph);
    CALL(cuGraphDestroy, second);
    graph = allocating(1000, 1, &at);
    TRY("memory.instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("memory.instantiate.again", cuGraphInstantiateWithFlags, &again, graph, 0);
    TRY("memory.exec.destroy", cuGraphExecDestroy, exec);
    TRY("memory.instantiate.after", cuGraphInstantiateWithFlags, &again, graph, 0);
    CALL(cuGraphExecDestroy, again);
    CALL(cuGraphDestroy, graph);
}

static void check_footprint(void)
{
    CUdeviceptr at[3];
    CUgraph graphs[3];
    CUgraphExec execs[3];
    CALL(cuDeviceGraphMemTrim, 0);
    mark();
    attributes("footprint.before");
    for (int i = 0; i < 3; i++) graphs[i] = allocating((size_t)(i + 1) * 20 * MIB, 1, &at[i]);
    attributes("footprint.nodes");
    for (int i = 0; i < 3; i++) CALL(cuGraphInstantiateWithFlags, &execs[i], graphs[i], 0);
    attributes("footprint.instantiated");
    TRY("footprint.upload", cuGraphUpload, execs[0], NULL);
    CALL(cuCtxSynchronize);
    attributes("footprint.uploaded");
    for (int i = 0; i < 3; i++) {
        char name[48];
        CALL(cuGraphLaunch, execs[i], NULL);
        CALL(cuCtxSynchronize);
        snprintf(name, sizeof name, "footprint.launched.%d", i);
        attributes(name);
    }
    CALL(cuGraphExecDestroy, execs[2]);
    CALL(cuGraphDestroy, graphs[2]);
    attributes("footprint.destroyed");
    TRY("footprint.trim", cuDeviceGraphMemTrim, 0);
    attributes("footprint.trimmed");
    TRY("footprint.trim.device", cuDeviceGraphMemTrim, 99);
    for (int i = 0; i < 2; i++) {
        CALL(cuGraphExecDestroy, execs[i]);
        CALL(cuGraphDestroy, graphs[i]);
    }
    cuuint64_t zero = 0, one = 1;
    TRY("footprint.reset", cuDeviceSetGraphMemAttribute, 0, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH, &zero);
    TRY("footprint.reset.one", cuDeviceSetGraphMemAttribute, 0, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH, &one);
    TRY("footprint.reset.current", cuDeviceSetGraphMemAttribute, 0, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, &zero);
    CALL(cuDeviceSetGraphMemAttribute, 0, CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH, &zero);
    attributes("footprint.after");
}

static void check_unfreed(void)
{
    CUdeviceptr at = 0;
    CUgraphExec exec = NULL;
    CUgraph graph = allocating(40 * MIB, 0, &at);
    char byte = 0;
    mark();
    CALL(cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("unfreed.launch", cuGraphLaunch, exec, NULL);
    TRY("unfreed.wait", cuCtxSynchronize);
    attributes("unfreed.launched");
    TRY("unfreed.use", cuMemsetD8_v2, at, 5, 1);
    CALL(cuMemcpyDtoH_v2, &byte, at, 1);
    say("unfreed.value", byte);
    TRY("unfreed.launch.again", cuGraphLaunch, exec, NULL);
    TRY("unfreed.exec.destroy", cuGraphExecDestroy, exec);
    TRY("unfreed.graph.destroy", cuGraphDestroy, graph);
    CALL(cuDeviceGraphMemTrim, 0);
    attributes("unfreed.destroyed");
    TRY("unfreed.free", cuMemFree_v2, at);
    attributes("unfreed.freed");
    TRY("unfreed.free.twice", cuMemFree_v2, at);
    CALL(cuDeviceGraphMemTrim, 0);
    attributes("unfreed.trimmed");
    graph = allocating(40 * MIB, 0, &at);
    TRY("auto.instantiate", cuGraphInstantiateWithFlags, &exec, graph, CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    TRY("auto.launch", cuGraphLaunch, exec, NULL);
    TRY("auto.launch.again", cuGraphLaunch, exec, NULL);
    CALL(cuCtxSynchronize);
    attributes("auto.launched");
    TRY("auto.free.async", cuMemFreeAsync, at, NULL);
    CALL(cuCtxSynchronize);
    CALL(cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
    CALL(cuDeviceGraphMemTrim, 0);
    attributes("auto.trimmed");
}

static void check_huge_launch(void)
{
    CUdeviceptr at = 0;
    CUgraphExec exec = NULL;
    CUgraph graph = allocating((size_t)1 << 40, 1, &at);
    say("huge.dptr", at != 0);
    TRY("huge.instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    if (exec) TRY("huge.launch", cuGraphLaunch, exec, NULL);
    TRY("huge.wait", cuCtxSynchronize);
    if (exec) CALL(cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
}

void check_graphs(void)
{
    section("graph");
    use_primary();
    mark();
    check_nodes();
    check_kernel_node();
    check_copies();
    check_memory_nodes();
    check_footprint();
    check_unfreed();
    check_huge_launch();
}
