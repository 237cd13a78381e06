/* Calls the hooked functions of the driver in states in which most of them fail: before cuInit, in a forked child,
 * without a context, and in a destroyed context. Except for handles, the arguments would be valid in other states. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static CUdeviceptr at;
static size_t size, pitch;
static unsigned small, narrow;
static CUarray array;
static CUmipmappedArray levels;
static CUmemoryPool pool;
static CUmemGenericAllocationHandle handle;
static CUgraph graph;
static CUgraphExec exec;
static CUcontext context;
static void *found;

static void ask_memory(void)
{
    CUDA_ARRAY_DESCRIPTOR flat = {64, 64, CU_AD_FORMAT_FLOAT, 1};
    CUDA_ARRAY3D_DESCRIPTOR deep = {64, 64, 1, CU_AD_FORMAT_FLOAT, 1, 0};
    CUDA_ARRAY_DESCRIPTOR_v1 flat_v1 = {64, 64, CU_AD_FORMAT_FLOAT, 1};
    CUDA_ARRAY3D_DESCRIPTOR_v1 deep_v1 = {64, 64, 1, CU_AD_FORMAT_FLOAT, 1, 0};
    CUdeviceptr_v1 at_v1 = 0;
    TRY("cuMemAlloc_v2", cuMemAlloc_v2, &at, 1000);
    TRY("cuMemAllocPitch_v2", cuMemAllocPitch_v2, &at, &pitch, 1000, 10, 4);
    TRY("cuMemAllocManaged", cuMemAllocManaged, &at, 1000, CU_MEM_ATTACH_GLOBAL);
    TRY("cuMemAlloc", cuMemAlloc, &at_v1, 1000);
    TRY("cuMemAllocPitch", cuMemAllocPitch, &at_v1, &narrow, 1000, 10, 4);
    TRY("cuArrayCreate", cuArrayCreate, &array, &flat_v1);
    TRY("cuArrayCreate_v2", cuArrayCreate_v2, &array, &flat);
    TRY("cuArray3DCreate", cuArray3DCreate, &array, &deep_v1);
    TRY("cuArray3DCreate_v2", cuArray3DCreate_v2, &array, &deep);
    TRY("cuMipmappedArrayCreate", cuMipmappedArrayCreate, &levels, &deep, 2);
    TRY("cuMemGetInfo", cuMemGetInfo, &small, &narrow);
    TRY("cuMemGetInfo_v2", cuMemGetInfo_v2, &size, &pitch);
    TRY("cuMemAllocAsync", cuMemAllocAsync, &at, 1000, NULL);
    TRY("cuMemAllocAsync_ptsz", cuMemAllocAsync_ptsz, &at, 1000, NULL);
    TRY("cuMemAllocFromPoolAsync", cuMemAllocFromPoolAsync, &at, 1000, pool, NULL);
    TRY("cuMemAllocFromPoolAsync_ptsz", cuMemAllocFromPoolAsync_ptsz, &at, 1000, pool, NULL);
    TRY("cuMemFreeAsync", cuMemFreeAsync, 0x1000, NULL);
    TRY("cuMemFreeAsync_ptsz", cuMemFreeAsync_ptsz, 0x1000, NULL);
}

static void ask_streams(void)
{
    TRY("cuCtxSynchronize", cuCtxSynchronize);
    TRY("cuStreamSynchronize", cuStreamSynchronize, NULL);
    TRY("cuStreamSynchronize_ptsz", cuStreamSynchronize_ptsz, NULL);
    TRY("cuStreamQuery", cuStreamQuery, NULL);
    TRY("cuStreamQuery_ptsz", cuStreamQuery_ptsz, NULL);
    TRY("cuStreamBeginCapture", cuStreamBeginCapture, NULL);
    TRY("cuStreamBeginCapture_ptsz", cuStreamBeginCapture_ptsz, NULL);
    TRY("cuStreamBeginCapture_v2", cuStreamBeginCapture_v2, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("cuStreamBeginCapture_v2_ptsz", cuStreamBeginCapture_v2_ptsz, NULL, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("cuStreamDestroy", cuStreamDestroy, NULL);
    TRY("cuStreamDestroy_v2", cuStreamDestroy_v2, NULL);
    TRY("cuEventSynchronize", cuEventSynchronize, NULL);
    TRY("cuEventQuery", cuEventQuery, NULL);
}

static void ask_launches(void)
{
    CUlaunchConfig config;
    memset(&config, 0, sizeof config);
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimX = config.blockDimY = config.blockDimZ = 1;
    TRY("cuLaunchKernel", cuLaunchKernel, NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
    TRY("cuLaunchKernel_ptsz", cuLaunchKernel_ptsz, NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
    TRY("cuLaunchKernelEx", cuLaunchKernelEx, &config, NULL, NULL, NULL);
    TRY("cuLaunchKernelEx_ptsz", cuLaunchKernelEx_ptsz, &config, NULL, NULL, NULL);
    TRY("cuLaunchCooperativeKernel", cuLaunchCooperativeKernel, NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL);
    TRY("cuLaunchCooperativeKernel_ptsz", cuLaunchCooperativeKernel_ptsz, NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL);
    TRY("cuLaunch", cuLaunch, NULL);
    TRY("cuLaunchGrid", cuLaunchGrid, NULL, 1, 1);
    TRY("cuLaunchGridAsync", cuLaunchGridAsync, NULL, 1, 1, NULL);
    TRY("cuGraphUpload", cuGraphUpload, NULL, NULL);
    TRY("cuGraphUpload_ptsz", cuGraphUpload_ptsz, NULL, NULL);
    TRY("cuGraphLaunch", cuGraphLaunch, NULL, NULL);
    TRY("cuGraphLaunch_ptsz", cuGraphLaunch_ptsz, NULL, NULL);
}

/* Calls the functions that need no context. This is done only before cuInit and in a forked child. */
static void ask_without_context(void)
{
    CUmemAllocationProp prop;
    CUmemPoolProps props;
    CUmemLocation place = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
    CUDA_GRAPH_INSTANTIATE_PARAMS params;
    CUDA_LAUNCH_PARAMS many;
    memset(&prop, 0, sizeof prop);
    memset(&props, 0, sizeof props);
    memset(&params, 0, sizeof params);
    memset(&many, 0, sizeof many);
    prop.type = props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = props.location = place;
    TRY("cuMemCreate", cuMemCreate, &handle, 2 * MIB, &prop, 0);
    TRY("cuDeviceTotalMem", cuDeviceTotalMem, &small, 0);
    TRY("cuDeviceTotalMem_v2", cuDeviceTotalMem_v2, &size, 0);
    TRY("cuMemPoolCreate", cuMemPoolCreate, &pool, &props);
    TRY("cuMemPoolDestroy", cuMemPoolDestroy, pool);
    TRY("cuMemPoolTrimTo", cuMemPoolTrimTo, pool, 0);
    TRY("cuDeviceSetMemPool", cuDeviceSetMemPool, 0, pool);
    TRY("cuMemSetMemPool", cuMemSetMemPool, &place, CU_MEM_ALLOCATION_TYPE_PINNED, pool);
    TRY("cuGraphInstantiate", cuGraphInstantiate, &exec, graph, NULL, NULL, 0);
    TRY("cuGraphInstantiate_v2", cuGraphInstantiate_v2, &exec, graph, NULL, NULL, 0);
    TRY("cuGraphInstantiateWithFlags", cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY("cuGraphInstantiateWithParams", cuGraphInstantiateWithParams, &exec, graph, &params);
    TRY("cuGraphInstantiateWithParams_ptsz", cuGraphInstantiateWithParams_ptsz, &exec, graph, &params);
    TRY("cuGraphExecDestroy", cuGraphExecDestroy, exec);
    TRY("cuDeviceGraphMemTrim", cuDeviceGraphMemTrim, 0);
    TRY("cuStreamBeginCaptureToGraph", cuStreamBeginCaptureToGraph, NULL, graph, NULL, NULL, 0, 0);
    TRY("cuStreamBeginCaptureToGraph_ptsz", cuStreamBeginCaptureToGraph_ptsz, NULL, graph, NULL, NULL, 0, 0);
    TRY("cuLaunchCooperativeKernelMultiDevice", cuLaunchCooperativeKernelMultiDevice, &many, 1, 0);
}

static void ask_contexts(void)
{
    CUgreenCtx green = NULL;
    TRY("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, &context, 0);
    TRY("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease, 0);
    TRY("cuDevicePrimaryCtxRelease_v2", cuDevicePrimaryCtxRelease_v2, 0);
    TRY("cuDevicePrimaryCtxReset", cuDevicePrimaryCtxReset, 0);
    TRY("cuDevicePrimaryCtxReset_v2", cuDevicePrimaryCtxReset_v2, 0);
    TRY("cuCtxCreate", cuCtxCreate, &context, 0, 0);
    TRY("cuCtxCreate_v2", cuCtxCreate_v2, &context, 0, 0);
    TRY("cuCtxCreate_v3", cuCtxCreate_v3, &context, NULL, 0, 0, 0);
    TRY("cuCtxCreate_v4", cuCtxCreate_v4, &context, NULL, 0, 0);
    TRY("cuCtxDestroy", cuCtxDestroy, NULL);
    TRY("cuCtxDestroy_v2", cuCtxDestroy_v2, NULL);
    TRY("cuCtxSynchronize_v2", cuCtxSynchronize_v2, NULL);
    TRY("cuGreenCtxCreate", cuGreenCtxCreate, &green, NULL, 0, CU_GREEN_CTX_DEFAULT_STREAM);
    TRY("cuGreenCtxDestroy", cuGreenCtxDestroy, NULL);
    TRY("cuGetProcAddress", cuGetProcAddress, "cuMemAlloc", &found, 12000, 0);
    TRY("cuGetProcAddress_v2", cuGetProcAddress_v2, "cuMemAlloc", &found, 12000, 0, NULL);
}

static void ask_all(void)
{
    ask_memory();
    ask_streams();
    ask_launches();
    ask_without_context();
    ask_contexts();
}

static void ask_frees(void)
{
    TRY("cuMemFree_v2", cuMemFree_v2, 0);
    TRY("cuMemRelease", cuMemRelease, 0);
    TRY("cuMemMap", cuMemMap, 0, 2 * MIB, 0, 0, 0);
    TRY("cuMemUnmap", cuMemUnmap, 0, 2 * MIB);
    TRY("cuMemRetainAllocationHandle", cuMemRetainAllocationHandle, &handle, NULL);
    TRY("cuMemImportFromShareableHandle", cuMemImportFromShareableHandle, &handle, NULL, CU_MEM_HANDLE_TYPE_NONE);
    TRY("cuIpcCloseMemHandle", cuIpcCloseMemHandle, 0);
    TRY("cuArrayDestroy", cuArrayDestroy, NULL);
    TRY("cuMipmappedArrayDestroy", cuMipmappedArrayDestroy, NULL);
}

static void ask_growth(void)
{
    CUgraphNode node;
    CUmodule module;
    CUlibrary library;
    CUfunction function;
    CUDA_KERNEL_NODE_PARAMS_v1 old;
    CUDA_KERNEL_NODE_PARAMS_v2 params;
    CUgraphNodeParams any;
    memset(&old, 0, sizeof old);
    memset(&params, 0, sizeof params);
    memset(&any, 0, sizeof any);
    TRY("cuCtxSetLimit", cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 2048);
    TRY("cuModuleLoad", cuModuleLoad, &module, "/proc/self/exe");
    TRY("cuModuleLoadData", cuModuleLoadData, &module, ".version 7.0\n");
    TRY("cuModuleLoadDataEx", cuModuleLoadDataEx, &module, ".version 7.0\n", 0, NULL, NULL);
    TRY("cuModuleLoadFatBinary", cuModuleLoadFatBinary, &module, ".version 7.0\n");
    TRY("cuLibraryLoadData", cuLibraryLoadData, &library, ".version 7.0\n", NULL, NULL, 0, NULL, NULL, 0);
    TRY("cuLibraryLoadFromFile", cuLibraryLoadFromFile, &library, "/proc/self/exe", NULL, NULL, 0, NULL, NULL, 0);
    TRY("cuLibraryGetModule", cuLibraryGetModule, &module, NULL);
    TRY("cuLibraryGetGlobal", cuLibraryGetGlobal, &at, &size, NULL, "none");
    TRY("cuKernelGetFunction", cuKernelGetFunction, &function, NULL);
    TRY("cuModuleUnload", cuModuleUnload, NULL);
    TRY("cuLibraryUnload", cuLibraryUnload, NULL);
    TRY("cuGraphAddKernelNode", cuGraphAddKernelNode, &node, graph, NULL, 0, &old);
    TRY("cuGraphAddKernelNode_v2", cuGraphAddKernelNode_v2, &node, graph, NULL, 0, &params);
    TRY("cuGraphAddNode", cuGraphAddNode, &node, graph, NULL, 0, &any);
    TRY("cuGraphAddNode_v2", cuGraphAddNode_v2, &node, graph, NULL, NULL, 0, &any);
}

static void ask_records(CUevent event)
{
    TRY("cuEventRecord", cuEventRecord, event, NULL);
    TRY("cuEventRecord_ptsz", cuEventRecord_ptsz, event, NULL);
    TRY("cuEventRecordWithFlags", cuEventRecordWithFlags, event, NULL, CU_EVENT_RECORD_DEFAULT);
    TRY("cuEventRecordWithFlags_ptsz", cuEventRecordWithFlags_ptsz, event, NULL, CU_EVENT_RECORD_DEFAULT);
}

void check_unready(void)
{
    CUevent event;
    section("unready");
    ask_all();
    ask_records(NULL);
    TRY("cuEventCreate", cuEventCreate, &event, CU_EVENT_DEFAULT);
    ask_frees();
    ask_growth();
    TRY("cuEventElapsedTime", cuEventElapsedTime, NULL, NULL, NULL);
    TRY("cuEventElapsedTime_v2", cuEventElapsedTime_v2, NULL, NULL, NULL);
    TRY("cuDeviceGetName", cuDeviceGetName, NULL, 0, 0);
}

/* The four ways to record an event: without a context, without an event, and with an event. */
void check_records(void)
{
    section("records.none");
    CUcontext context = NULL;
    CUevent event = NULL;
    CALL(cuInit, 0);
    ask_records(NULL);
    CALL(cuDevicePrimaryCtxRetain, &context, 0);
    CALL(cuCtxSetCurrent, context);
    section("records.null");
    ask_records(NULL);
    CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    section("records.event");
    ask_records(event);
    TRY("unknown_flags", cuEventRecordWithFlags, event, NULL, 1u << 31);
    TRY("wait", cuEventSynchronize, event);
    TRY("query", cuEventQuery, event);
    CALL(cuEventDestroy_v2, event);
    CALL(cuDevicePrimaryCtxRelease_v2, 0);
}

void check_forked(void)
{
    section("forked");
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        ask_all();
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    say("status", status);
}

void check_contextless(void)
{
    section("contextless");
    while (!CALL(cuCtxPopCurrent_v2, &context))
        ;
    CALL(cuDeviceGetDefaultMemPool, &pool, 0);
    ask_memory();
    ask_streams();
    ask_launches();
}

void check_gone(void)
{
    section("gone");
    CUcontext made = NULL;
    CALL(cuDeviceGetDefaultMemPool, &pool, 0);
    TRY("create", cuCtxCreate_v2, &made, 0, 0);
    TRY("destroy", cuCtxDestroy_v2, made);
    TRY("set", cuCtxSetCurrent, made);
    ask_memory();
    ask_streams();
    ask_launches();
    TRY("cuCtxSynchronize_v2", cuCtxSynchronize_v2, made);
    TRY("cuCtxDestroy", cuCtxDestroy, made);
}
