/* Variants of stream-ordered calls for the per-thread default stream; every way to instantiate a graph; captures into
 * an existing graph; the pool from which a device allocates. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static CUmemoryPool new_pool(void)
{
    CUmemoryPool pool = NULL;
    CUmemPoolProps props;
    memset(&props, 0, sizeof props);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CALL(cuMemPoolCreate, &pool, &props);
    return pool;
}

static void check_allocations(void)
{
    CUdeviceptr at = 0, other = 0;
    CUmemoryPool pool = new_pool();
    TRY("alloc", cuMemAllocAsync_ptsz, &at, MIB, NULL);
    TRY("alloc.0", cuMemAllocAsync_ptsz, &other, 0, NULL);
    TRY("alloc.null", cuMemAllocAsync_ptsz, NULL, 10, NULL);
    TRY("alloc.huge", cuMemAllocAsync_ptsz, &other, (size_t)1 << 44, NULL);
    TRY("pool", cuMemAllocFromPoolAsync_ptsz, &other, MIB, pool, NULL);
    TRY("pool.null", cuMemAllocFromPoolAsync_ptsz, NULL, MIB, pool, NULL);
    TRY("pool.huge", cuMemAllocFromPoolAsync_ptsz, &other, (size_t)1 << 44, pool, NULL);
    TRY("pool.none", cuMemAllocFromPoolAsync_ptsz, &other, MIB, NULL, NULL);
    TRY("pool.legacy.none", cuMemAllocFromPoolAsync, &other, MIB, NULL, NULL);
    TRY("pool.legacy.null", cuMemAllocFromPoolAsync, NULL, MIB, pool, NULL);
    TRY("pool.legacy.huge", cuMemAllocFromPoolAsync, &other, (size_t)1 << 44, pool, NULL);
    TRY("free", cuMemFreeAsync_ptsz, at, NULL);
    TRY("free.twice", cuMemFreeAsync_ptsz, at, NULL);
    TRY("free.0", cuMemFreeAsync_ptsz, 0, NULL);
    TRY("free.unknown", cuMemFreeAsync_ptsz, 0x1000, NULL);
    TRY("wait", cuStreamSynchronize_ptsz, NULL);
    TRY("query", cuStreamQuery_ptsz, NULL);
    TRY("trim", cuMemPoolTrimTo, pool, 0);
    TRY("destroy", cuMemPoolDestroy, pool);
}

/* Captures in the per-thread default stream, which is allowed, unlike in the legacy stream, and calls during a capture.
 */
static void check_capture_of_own(void)
{
    CUgraph graph = NULL;
    CUdeviceptr at = 0;
    TRY("begin", cuStreamBeginCapture_ptsz, NULL);
    TRY("begin.again", cuStreamBeginCapture_ptsz, NULL);
    TRY("captured.alloc", cuMemAllocAsync_ptsz, &at, MIB, NULL);
    TRY("captured.free", cuMemFreeAsync_ptsz, at, NULL);
    TRY("end", cuStreamEndCapture_ptsz, NULL, &graph);
    CALL(cuGraphDestroy, graph);
    TRY("begin2.mode", cuStreamBeginCapture_v2_ptsz, NULL, (CUstreamCaptureMode)77);
    TRY("begin2", cuStreamBeginCapture_v2_ptsz, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("captured.query", cuStreamQuery_ptsz, NULL);
    TRY("captured.after", cuMemAllocAsync_ptsz, &at, MIB, NULL);
    TRY("end.broken", cuStreamEndCapture_ptsz, NULL, &graph);
    CALL(cuStreamBeginCapture_v2_ptsz, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("captured.wait", cuStreamSynchronize_ptsz, NULL);
    CALL(cuStreamEndCapture_ptsz, NULL, &graph);
    CUstream stream = NULL;
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    TRY("plain.begin.legacy", cuStreamBeginCapture, NULL);
    TRY("plain.begin", cuStreamBeginCapture, stream);
    TRY("plain.begin.again", cuStreamBeginCapture, stream);
    TRY("plain.end", cuStreamEndCapture, stream, &graph);
    CALL(cuGraphDestroy, graph);
    CALL(cuStreamDestroy_v2, stream);
}

static CUgraph one_kernel(CUfunction kernel)
{
    CUgraph graph = NULL;
    CUgraphNode node = NULL;
    CUDA_KERNEL_NODE_PARAMS params;
    memset(&params, 0, sizeof params);
    params.func = kernel;
    params.gridDimX = params.gridDimY = params.gridDimZ = params.blockDimX = params.blockDimY = params.blockDimZ = 1;
    CALL(cuGraphCreate, &graph, 0);
    CALL(cuGraphAddKernelNode_v2, &node, graph, NULL, 0, &params);
    return graph;
}

static CUfunction get_kernel(void)
{
    CUmodule module = NULL;
    CUfunction kernel = NULL;
    CALL(cuModuleLoadData, &module, image);
    CALL(cuModuleGetFunction, &kernel, module, "spin_0us");
    return kernel;
}

void check_twins(void)
{
    section("twin");
    use_primary();
    check_allocations();
    check_capture_of_own();
    CUgraphExec exec = NULL;
    CUgraph graph = one_kernel(get_kernel());
    CALL(cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("upload", cuGraphUpload_ptsz, exec, NULL);
    TRY("launch", cuGraphLaunch_ptsz, exec, NULL);
    CALL(cuStreamBeginCapture_v2_ptsz, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("captured.upload", cuGraphUpload_ptsz, exec, NULL);
    CALL(cuStreamEndCapture_ptsz, NULL, &graph);
    CALL(cuStreamBeginCapture_v2_ptsz, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("captured.launch", cuGraphLaunch_ptsz, exec, NULL);
    TRY("captured.launch.end", cuStreamEndCapture_ptsz, NULL, &graph);
    TRY("graph.wait", cuCtxSynchronize);
    TRY("exec.destroy", cuGraphExecDestroy, exec);
}

static void check_parameters(CUgraph graph)
{
    CUgraphExec exec = NULL;
    CUDA_GRAPH_INSTANTIATE_PARAMS params;
    memset(&params, 0, sizeof params);
    params.result_out = 77;
    TRY("params", cuGraphInstantiateWithParams, &exec, graph, &params);
    say("params.result", params.result_out);
    CALL(cuGraphExecDestroy, exec);
    TRY("params.null", cuGraphInstantiateWithParams, NULL, graph, &params);
    params.flags = 0x1000;
    TRY("params.flags", cuGraphInstantiateWithParams, &exec, graph, &params);
    TRY("params.flags.ptsz", cuGraphInstantiateWithParams_ptsz, &exec, graph, &params);
    params.flags = CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD;
    TRY("params.upload", cuGraphInstantiateWithParams, &exec, graph, &params);
    CALL(cuGraphExecDestroy, exec);
    TRY("params.upload.ptsz", cuGraphInstantiateWithParams_ptsz, &exec, graph, &params);
    say("params.upload.result", params.result_out);
    TRY("params.launch", cuGraphLaunch_ptsz, exec, NULL);
    CALL(cuCtxSynchronize);
    CALL(cuGraphExecDestroy, exec);
}

/* Instantiates a graph with a cycle, and a graph with memory a second time, by calls other than
 * cuGraphInstantiateWithFlags. conformance_graph.c does the same by that call. */
static void check_refusals(void)
{
    CUgraph circle = NULL, memory = NULL;
    CUgraphNode a = NULL, b = NULL;
    CUgraphExec exec = NULL, second = NULL;
    CUDA_GRAPH_INSTANTIATE_PARAMS params;
    CUDA_MEM_ALLOC_NODE_PARAMS want;
    char log[64] = "";
    memset(&params, 0, sizeof params);
    memset(&want, 0, sizeof want);
    want.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    want.poolProps.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    want.bytesize = MIB;
    CALL(cuGraphCreate, &circle, 0);
    CALL(cuGraphAddEmptyNode, &a, circle, NULL, 0);
    CALL(cuGraphAddEmptyNode, &b, circle, &a, 1);
    CALL(cuGraphAddDependencies, circle, &b, &a, 1);
    TRY("circle", cuGraphInstantiate, &exec, circle, &a, log, sizeof log);
    TRY("circle.v2", cuGraphInstantiate_v2, &exec, circle, &a, log, sizeof log);
    TRY("circle.params", cuGraphInstantiateWithParams, &exec, circle, &params);
    say("circle.params.result", params.result_out);
    CALL(cuGraphDestroy, circle);
    CALL(cuGraphCreate, &memory, 0);
    CALL(cuGraphAddMemAllocNode, &a, memory, NULL, 0, &want);
    CALL(cuGraphAddMemFreeNode, &b, memory, &a, 1, want.dptr);
    TRY("memory", cuGraphInstantiate, &exec, memory, NULL, NULL, 0);
    TRY("memory.again", cuGraphInstantiate_v2, &second, memory, NULL, NULL, 0);
    TRY("memory.again.params", cuGraphInstantiateWithParams, &second, memory, &params);
    say("memory.again.result", params.result_out);
    TRY("memory.destroy", cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, memory);
}

void check_instantiation(void)
{
    section("instantiate");
    use_primary();
    CUgraphExec exec = NULL;
    CUgraph graph = one_kernel(get_kernel());
    char log[64] = "";
    TRY("old", cuGraphInstantiate, &exec, graph, NULL, NULL, 0);
    TRY("old.launch", cuGraphLaunch, exec, NULL);
    TRY("old.destroy", cuGraphExecDestroy, exec);
    TRY("old.null", cuGraphInstantiate, NULL, graph, NULL, NULL, 0);
    TRY("v2", cuGraphInstantiate_v2, &exec, graph, NULL, log, sizeof log);
    TRY("v2.destroy", cuGraphExecDestroy, exec);
    TRY("v2.null", cuGraphInstantiate_v2, NULL, graph, NULL, NULL, 0);
    TRY("flags.null", cuGraphInstantiateWithFlags, NULL, graph, 0);
    TRY("wait", cuCtxSynchronize);
    check_parameters(graph);
    check_refusals();
    CALL(cuGraphDestroy, graph);
}

/* Ends a capture. Prints the result, whether the graph is the expected one, and the number of that graph's nodes. */
static void end_and_count(const char *name, CUstream stream, CUgraph expected)
{
    CUgraph graph = NULL;
    size_t n = 0;
    CUresult result = CALL(cuStreamEndCapture, stream, &graph);
    CALL(cuGraphGetNodes, expected, NULL, &n);
    printf("tograph.%s %d %d %zu\n", name, (int)result, graph == expected, n);
    fflush(stdout);
}

void check_to_graph(void)
{
    section("tograph");
    use_primary();
    CUfunction kernel = get_kernel();
    CUgraph graph = one_kernel(kernel), other = one_kernel(kernel), got = NULL;
    CUgraphNode first = NULL, foreign = NULL;
    CUstream stream = NULL;
    CUgraphExec exec = NULL;
    size_t n = 1;
    CALL(cuGraphGetNodes, graph, &first, &n);
    CALL(cuGraphGetNodes, other, &foreign, &n);
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    TRY("mode", cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 0, (CUstreamCaptureMode)77);
    TRY("legacy", cuStreamBeginCaptureToGraph, NULL, graph, NULL, NULL, 0, mode);
    TRY("null", cuStreamBeginCaptureToGraph, stream, NULL, NULL, NULL, 0, mode);
    TRY("needs.null", cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 1, mode);
    TRY("needs.foreign", cuStreamBeginCaptureToGraph, stream, graph, &foreign, NULL, 1, mode);
    TRY("begin", cuStreamBeginCaptureToGraph, stream, graph, &first, NULL, 1, mode);
    TRY("begin.again", cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 0, mode);
    CALL(cuLaunchKernel, kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL);
    end_and_count("end", stream, graph);
    size_t edges = 0;
    CALL(cuGraphGetEdges, graph, NULL, NULL, &edges);
    say("edges", (long long)edges);
    TRY("own", cuStreamBeginCaptureToGraph_ptsz, NULL, graph, NULL, NULL, 0, mode);
    CALL(cuLaunchKernel_ptsz, kernel, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
    TRY("own.end", cuStreamEndCapture_ptsz, NULL, &got);
    CALL(cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 0, mode);
    TRY("broken.query", cuStreamQuery, stream);
    end_and_count("broken.end", stream, graph);
    TRY("instantiate", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("launch", cuGraphLaunch, exec, stream);
    TRY("wait", cuStreamSynchronize, stream);
    CALL(cuGraphExecDestroy, exec);
    CALL(cuGraphDestroy, graph);
    CALL(cuGraphDestroy, other);
    CALL(cuStreamDestroy_v2, stream);
}

/* A graph into which a stream captures, after the capture ends with unjoined work or with its stream. */
void check_lost_graphs(void)
{
    section("lost");
    use_primary();
    CUfunction kernel = get_kernel();
    CUgraph graph = one_kernel(kernel), got = NULL;
    CUstream stream = NULL, fork = NULL;
    CUevent event = NULL;
    size_t n = 77;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    CALL(cuStreamCreate, &fork, CU_STREAM_NON_BLOCKING);
    CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    TRY("begin", cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 0, mode);
    CALL(cuEventRecord, event, stream);
    CALL(cuStreamWaitEvent, fork, event, 0);
    CALL(cuLaunchKernel, kernel, 1, 1, 1, 1, 1, 1, 0, fork, NULL, NULL);
    TRY("unjoined", cuStreamEndCapture, stream, &got);
    TRY("unjoined.nodes", cuGraphGetNodes, graph, NULL, &n);
    say("unjoined.n", (long long)n);
    graph = one_kernel(kernel);
    TRY("begin.again", cuStreamBeginCaptureToGraph, stream, graph, NULL, NULL, 0, mode);
    TRY("stream", cuStreamDestroy_v2, stream);
    TRY("stream.nodes", cuGraphGetNodes, graph, NULL, &n);
    say("stream.n", (long long)n);
    CALL(cuStreamDestroy_v2, fork);
    CALL(cuEventDestroy_v2, event);
}

void check_current_pool(void)
{
    section("place");
    use_primary();
    CUmemoryPool pool = new_pool(), normal = NULL, now = NULL;
    CUmemLocation place = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}, past = place, none = place;
    CUdeviceptr at = 0;
    past.id = 99;
    none.type = CU_MEM_LOCATION_TYPE_INVALID;
    CALL(cuDeviceGetDefaultMemPool, &normal, 0);
    TRY("set", cuDeviceSetMemPool, 0, pool);
    CALL(cuDeviceGetMemPool, &now, 0);
    say("set.now", now == pool);
    TRY("set.device", cuDeviceSetMemPool, 99, pool);
    TRY("set.null", cuDeviceSetMemPool, 0, NULL);
    TRY("alloc", cuMemAllocAsync, &at, MIB, NULL);
    TRY("back", cuDeviceSetMemPool, 0, normal);
    TRY("free", cuMemFreeAsync, at, NULL);
    TRY("place", cuMemSetMemPool, &place, CU_MEM_ALLOCATION_TYPE_PINNED, pool);
    CALL(cuDeviceGetMemPool, &now, 0);
    say("place.now", now == pool);
    TRY("place.null", cuMemSetMemPool, NULL, CU_MEM_ALLOCATION_TYPE_PINNED, pool);
    TRY("place.none", cuMemSetMemPool, &none, CU_MEM_ALLOCATION_TYPE_PINNED, pool);
    TRY("place.past", cuMemSetMemPool, &past, CU_MEM_ALLOCATION_TYPE_PINNED, pool);
    TRY("place.type", cuMemSetMemPool, &place, CU_MEM_ALLOCATION_TYPE_INVALID, pool);
    TRY("trim", cuMemPoolTrimTo, pool, 0);
    TRY("trim.more", cuMemPoolTrimTo, pool, (size_t)1 << 44);
    TRY("destroy.current", cuMemPoolDestroy, pool);
    CALL(cuDeviceGetMemPool, &now, 0);
    say("destroy.now", now == normal);
    TRY("destroy.null", cuMemPoolDestroy, NULL);
    TRY("trim.null", cuMemPoolTrimTo, NULL, 0);
    CALL(cuCtxSynchronize);
}
