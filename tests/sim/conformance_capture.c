/* Stream capture: which calls are allowed while a stream captures, in each mode, and how the capture ends. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static CUstream stream, other;
static CUevent event, unrecorded;
static CUmodule module;
static CUfunction kernel;
static CUdeviceptr memory, pooled;
static CUgraph graph;
static CUgraphExec exec;
static char host[64];

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static CUresult launch_in(CUstream where)
{
    return CALL(cuLaunchKernel, kernel, 1, 1, 1, 32, 1, 1, 0, where, NULL, NULL);
}

static CUresult do_nothing(void) { return CUDA_SUCCESS; }
static CUresult do_alloc(void) { return CALL(cuMemAlloc_v2, &(CUdeviceptr){0}, 1000); }
static CUresult do_pitch(void) { return CALL(cuMemAllocPitch_v2, &(CUdeviceptr){0}, &(size_t){0}, 100, 10, 4); }
static CUresult do_managed(void) { return CALL(cuMemAllocManaged, &(CUdeviceptr){0}, 1000, CU_MEM_ATTACH_GLOBAL); }
static CUresult do_host(void) { return CALL(cuMemAllocHost_v2, &(void *){NULL}, 1000); }
static CUresult do_register(void)
{
    static char page[8192] __attribute__((aligned(4096)));
    CUresult result = CALL(cuMemHostRegister_v2, page, sizeof page, 0);
    if (!result) CALL(cuMemHostUnregister, page);
    return result;
}
static CUresult do_array(void)
{
    CUDA_ARRAY_DESCRIPTOR shape = {64, 64, CU_AD_FORMAT_FLOAT, 1};
    return CALL(cuArrayCreate_v2, &(CUarray){NULL}, &shape);
}
static CUresult do_create(void)
{
    CUmemAllocationProp prop;
    CUmemGenericAllocationHandle handle = 0;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CUresult result = CALL(cuMemCreate, &handle, 2 * MIB, &prop, 0);
    if (!result) CALL(cuMemRelease, handle);
    return result;
}
static CUresult do_free(void) { return CALL(cuMemFree_v2, 0x1000); }
static CUresult do_free_null(void) { return CALL(cuMemFree_v2, 0); }
static CUresult do_info(void) { return CALL(cuMemGetInfo_v2, &(size_t){0}, &(size_t){0}); }
static CUresult do_copy(void) { return CALL(cuMemcpyHtoD_v2, memory, host, sizeof host); }
static CUresult do_set(void) { return CALL(cuMemsetD8_v2, memory, 1, 64); }
static CUresult do_copy_async(void) { return CALL(cuMemcpyHtoDAsync_v2, memory, host, sizeof host, stream); }
static CUresult do_set_async(void) { return CALL(cuMemsetD8Async, memory, 1, 64, stream); }
static CUresult do_set_unknown(void) { return CALL(cuMemsetD8Async, 0x1000, 1, 64, stream); }
static CUresult do_alloc_async(void) { return CALL(cuMemAllocAsync, &(CUdeviceptr){0}, 1000, stream); }
static CUresult do_alloc_async_0(void) { return CALL(cuMemAllocAsync, &(CUdeviceptr){0}, 0, stream); }
static CUresult do_alloc_other(void) { return CALL(cuMemAllocAsync, &(CUdeviceptr){0}, 1000, other); }
static CUresult do_free_pooled(void) { return CALL(cuMemFreeAsync, pooled, stream); }
static CUresult do_free_plain(void) { return CALL(cuMemFreeAsync, memory, stream); }
static CUresult do_pair(void)
{
    CUdeviceptr at = 0;
    CUresult result = CALL(cuMemAllocAsync, &at, 1000, stream);
    return result ? result : CALL(cuMemFreeAsync, at, stream);
}
static CUresult do_launch(void) { return launch_in(stream); }
static CUresult do_launch_other(void) { return launch_in(other); }
static CUresult do_launch_legacy(void) { return launch_in(NULL); }
static CUresult do_query(void) { return CALL(cuStreamQuery, stream); }
static CUresult do_query_other(void) { return CALL(cuStreamQuery, other); }
static CUresult do_query_legacy(void) { return CALL(cuStreamQuery, NULL); }
static CUresult do_wait(void) { return CALL(cuStreamSynchronize, stream); }
static CUresult do_wait_other(void) { return CALL(cuStreamSynchronize, other); }
static CUresult do_wait_legacy(void) { return CALL(cuStreamSynchronize, NULL); }
static CUresult do_wait_context(void) { return CALL(cuCtxSynchronize); }
static CUresult do_event_query(void) { return CALL(cuEventQuery, event); }
static CUresult do_event_wait(void) { return CALL(cuEventSynchronize, event); }
static CUresult do_event_elapsed(void) { return CALL(cuEventElapsedTime, &(float){0}, event, event); }
static CUresult do_event_create(void) { return CALL(cuEventCreate, &(CUevent){NULL}, 0); }
static CUresult do_stream_create(void) { return CALL(cuStreamCreate, &(CUstream){NULL}, CU_STREAM_NON_BLOCKING); }
static CUresult do_depend(void) { return CALL(cuStreamWaitEvent, stream, event, 0); }
static CUresult do_depend_external(void) { return CALL(cuStreamWaitEvent, stream, event, 1); }
static CUresult do_depend_unrecorded(void) { return CALL(cuStreamWaitEvent, stream, unrecorded, 0); }
static CUresult do_record(void)
{
    CUevent marked = NULL;
    CALL(cuEventCreate, &marked, 0);
    return CALL(cuEventRecord, marked, stream);
}
static CUresult do_record_query(void)
{
    CUevent marked = NULL;
    CALL(cuEventCreate, &marked, 0);
    CALL(cuEventRecord, marked, stream);
    return CALL(cuEventQuery, marked);
}
static CUresult do_legacy_depend(void)
{
    CUevent marked = NULL;
    CALL(cuEventCreate, &marked, 0);
    launch_in(stream);
    CALL(cuEventRecord, marked, stream);
    return CALL(cuStreamWaitEvent, NULL, marked, 0);
}
static CUresult do_load(void)
{
    CUmodule loaded = NULL;
    CUresult result = CALL(cuModuleLoadData, &loaded, image);
    if (!result) CALL(cuModuleUnload, loaded);
    return result;
}
static CUresult do_function(void) { return CALL(cuModuleGetFunction, &(CUfunction){NULL}, module, "spin_0us"); }
static CUresult do_trim(void)
{
    CUmemoryPool pool = NULL;
    CALL(cuDeviceGetDefaultMemPool, &pool, 0);
    return CALL(cuMemPoolTrimTo, pool, 0);
}
static CUresult do_again(void) { return CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED); }
static CUresult do_instantiate(void)
{
    CUgraphExec made = NULL;
    CUresult result = CALL(cuGraphInstantiateWithFlags, &made, graph, 0);
    if (!result) CALL(cuGraphExecDestroy, made);
    return result;
}
static CUresult do_graph(void) { return CALL(cuGraphLaunch, exec, stream); }
static CUresult do_graph_other(void) { return CALL(cuGraphLaunch, exec, other); }
static CUresult do_upload(void) { return CALL(cuGraphUpload, exec, stream); }
static CUresult do_capturing_legacy(void) { return CALL(cuStreamIsCapturing, NULL, &(CUstreamCaptureStatus){0}); }

static const struct {
    const char *name;
    CUresult (*run)(void);
} acts[] = {{"nothing", do_nothing},
            {"alloc", do_alloc},
            {"alloc.pitch", do_pitch},
            {"alloc.managed", do_managed},
            {"alloc.host", do_host},
            {"register", do_register},
            {"array", do_array},
            {"create", do_create},
            {"free", do_free},
            {"free.null", do_free_null},
            {"info", do_info},
            {"copy", do_copy},
            {"set", do_set},
            {"copy.async", do_copy_async},
            {"set.async", do_set_async},
            {"set.unknown", do_set_unknown},
            {"alloc.async", do_alloc_async},
            {"alloc.async.0", do_alloc_async_0},
            {"alloc.async.other", do_alloc_other},
            {"free.async.pooled", do_free_pooled},
            {"free.async.plain", do_free_plain},
            {"alloc.free.async", do_pair},
            {"launch", do_launch},
            {"launch.other", do_launch_other},
            {"launch.legacy", do_launch_legacy},
            {"query", do_query},
            {"query.other", do_query_other},
            {"query.legacy", do_query_legacy},
            {"wait", do_wait},
            {"wait.other", do_wait_other},
            {"wait.legacy", do_wait_legacy},
            {"wait.context", do_wait_context},
            {"event.query", do_event_query},
            {"event.wait", do_event_wait},
            {"event.elapsed", do_event_elapsed},
            {"event.create", do_event_create},
            {"stream.create", do_stream_create},
            {"depend", do_depend},
            {"depend.external", do_depend_external},
            {"depend.unrecorded", do_depend_unrecorded},
            {"record", do_record},
            {"record.query", do_record_query},
            {"depend.legacy", do_legacy_depend},
            {"module", do_load},
            {"function", do_function},
            {"trim", do_trim},
            {"again", do_again},
            {"instantiate", do_instantiate},
            {"graph", do_graph},
            {"graph.other", do_graph_other},
            {"upload", do_upload},
            {"capturing.legacy", do_capturing_legacy}};

/* Captures once for each act. Prints the act's result, the stream's status then, the result of the capture's end, and
 * the number of its nodes. */
static void each_act(const char *how, CUstreamCaptureMode mode, CUstreamCaptureMode thread, unsigned flags)
{
    for (size_t i = 0; i < sizeof acts / sizeof *acts; i++) {
        char name[96];
        CUstreamCaptureStatus status = 77;
        CUgraph captured = NULL;
        size_t n = 0;
        CALL(cuStreamCreate, &stream, flags);
        CUresult began = CALL(cuStreamBeginCapture_v2, stream, mode);
        CUstreamCaptureMode swapped = thread;
        CALL(cuThreadExchangeStreamCaptureMode, &swapped);
        CUresult result = acts[i].run();
        CALL(cuThreadExchangeStreamCaptureMode, &swapped);
        CALL(cuStreamIsCapturing, stream, &status);
        CUresult end = CALL(cuStreamEndCapture, stream, &captured);
        if (captured) CALL(cuGraphGetNodes, captured, NULL, &n);
        snprintf(name, sizeof name, "capture.%s.%s", how, acts[i].name);
        printf("%s %d %d %d %d %d %zu\n", name, (int)began, (int)result, (int)status, (int)end, captured != NULL, n);
        fflush(stdout);
        if (captured) CALL(cuGraphDestroy, captured);
        CALL(cuStreamDestroy_v2, stream);
    }
}

static void set_up(void)
{
    use_primary();
    CUgraphNode node = NULL;
    CALL(cuStreamCreate, &other, CU_STREAM_NON_BLOCKING);
    CALL(cuEventCreate, &event, 0);
    CALL(cuEventCreate, &unrecorded, 0);
    CALL(cuMemAlloc_v2, &memory, 4096);
    CALL(cuMemAllocAsync, &pooled, 4096, NULL);
    TRY("setup.module", cuModuleLoadData, &module, image);
    CALL(cuModuleGetFunction, &kernel, module, "spin_0us");
    say("setup.launch", launch_in(NULL));
    CALL(cuEventRecord, event, NULL);
    CALL(cuGraphCreate, &graph, 0);
    CALL(cuGraphAddEmptyNode, &node, graph, NULL, 0);
    TRY("setup.graph", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("setup.wait", cuCtxSynchronize);
}

static void check_ends(void)
{
    CUgraph captured = (CUgraph)1;
    CUstreamCaptureStatus status = 77;
    CUevent fork = NULL, join = NULL;
    CALL(cuEventCreate, &fork, CU_EVENT_DISABLE_TIMING);
    CALL(cuEventCreate, &join, CU_EVENT_DISABLE_TIMING);
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    TRY("begin.legacy", cuStreamBeginCapture_v2, NULL, CU_STREAM_CAPTURE_MODE_GLOBAL);
    TRY("begin.mode", cuStreamBeginCapture_v2, stream, (CUstreamCaptureMode)77);
    TRY("end.none", cuStreamEndCapture, stream, &captured);
    TRY("end.null", cuStreamEndCapture, stream, NULL);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    launch_in(stream);
    TRY("fork.record", cuEventRecord, fork, stream);
    TRY("fork.wait", cuStreamWaitEvent, other, fork, 0);
    CALL(cuStreamIsCapturing, other, &status);
    say("fork.status", status);
    say("fork.launch", launch_in(other));
    TRY("fork.end.other", cuStreamEndCapture, other, &captured);
    TRY("fork.end", cuStreamEndCapture, stream, &captured);
    say("fork.end.isnull", !captured);
    CALL(cuStreamIsCapturing, other, &status);
    say("fork.after.status", status);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    launch_in(stream);
    CALL(cuEventRecord, fork, stream);
    CALL(cuStreamWaitEvent, other, fork, 0);
    launch_in(other);
    TRY("unjoined.end", cuStreamEndCapture, stream, &captured);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    launch_in(stream);
    CALL(cuEventRecord, fork, stream);
    CALL(cuStreamWaitEvent, other, fork, 0);
    launch_in(other);
    CALL(cuEventRecord, join, other);
    TRY("join.wait", cuStreamWaitEvent, stream, join, 0);
    launch_in(stream);
    TRY("join.end", cuStreamEndCapture, stream, &captured);
    size_t n = 0, edges = 0;
    CALL(cuGraphGetNodes, captured, NULL, &n);
    CALL(cuGraphGetEdges, captured, NULL, NULL, &edges);
    say("join.nodes", (long long)n);
    say("join.edges", (long long)edges);
    TRY("late.query", cuEventQuery, join);
    TRY("late.wait", cuStreamWaitEvent, other, join, 0);
    CALL(cuGraphDestroy, captured);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("late.depend", cuStreamWaitEvent, stream, join, 0);
    TRY("late.end", cuStreamEndCapture, stream, &captured);
}

static void check_merge(void)
{
    CUgraph captured = NULL;
    CUevent fork = NULL;
    CALL(cuEventCreate, &fork, CU_EVENT_DISABLE_TIMING);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    CALL(cuStreamBeginCapture_v2, other, CU_STREAM_CAPTURE_MODE_RELAXED);
    launch_in(stream);
    CALL(cuEventRecord, fork, stream);
    TRY("merge", cuStreamWaitEvent, other, fork, 0);
    TRY("merge.end", cuStreamEndCapture, stream, &captured);
    TRY("merge.end.other", cuStreamEndCapture, other, &captured);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CUresult destroyed = CALL(cuStreamDestroy_v2, stream);
    say("destroy", destroyed);
    if (!destroyed) return;
    TRY("destroy.end", cuStreamEndCapture, stream, &captured);
    TRY("destroy.again", cuStreamDestroy_v2, stream);
}

static void check_info(void)
{
    CUstreamCaptureStatus status = 77;
    CUgraph captured = NULL, told = NULL;
    const CUgraphNode *needs = NULL;
    cuuint64_t id = 0;
    size_t n = 77;
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    TRY("info.none", cuStreamGetCaptureInfo_v2, stream, &status, &id, &told, &needs, &n);
    say("info.none.status", status);
    TRY("info.null", cuStreamGetCaptureInfo_v2, stream, NULL, NULL, NULL, NULL, NULL);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("info", cuStreamGetCaptureInfo_v2, stream, &status, &id, &told, &needs, &n);
    say("info.status", status);
    say("info.n", (long long)n);
    say("info.id", id != 0);
    launch_in(stream);
    TRY("info.launched", cuStreamGetCaptureInfo_v2, stream, &status, &id, &told, &needs, &n);
    say("info.launched.n", (long long)n);
    TRY("info.destroy", cuGraphDestroy, told);
    TRY("info.end", cuStreamEndCapture, stream, &captured);
    say("info.graph.same", captured == told);
    CALL(cuGraphDestroy, captured);
    CALL(cuStreamDestroy_v2, stream);
}

void check_capture(void)
{
    section("capture");
    set_up();
    each_act("global", CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_NON_BLOCKING);
    each_act("blocking", CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL, 0);
    each_act("local", CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_NON_BLOCKING);
    each_act("relaxed", CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_NON_BLOCKING);
    each_act("exchanged", CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_NON_BLOCKING);
    check_ends();
    check_merge();
    check_info();
    CALL(cuMemFree_v2, memory);
    CALL(cuMemFreeAsync, pooled, NULL);
    CALL(cuCtxSynchronize);
}
