/* Functions that newer ones have replaced, every way to create a context, green contexts, and the lists of NVML. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static void check_created(void)
{
    CUcontext context = NULL, other = NULL;
    CUexecAffinityParam affinity;
    CUctxCreateParams params;
    memset(&affinity, 0, sizeof affinity);
    memset(&params, 0, sizeof params);
    affinity.type = CU_EXEC_AFFINITY_TYPE_SM_COUNT;
    affinity.param.smCount.val = 8;
    TRY("v3", cuCtxCreate_v3, &context, NULL, 0, 0, 0);
    TRY("v3.destroy", cuCtxDestroy, context);
    TRY("v3.destroy.twice", cuCtxDestroy, context);
    TRY("v3.null", cuCtxCreate_v3, NULL, NULL, 0, 0, 0);
    TRY("v3.flags", cuCtxCreate_v3, &context, NULL, 0, 0x8000, 0);
    TRY("v3.device", cuCtxCreate_v3, &context, NULL, 0, 0, 99);
    TRY("v3.affinity", cuCtxCreate_v3, &context, &affinity, 1, 0, 0);
    TRY("v3.affinity.null", cuCtxCreate_v3, &context, NULL, 1, 0, 0);
    TRY("v4", cuCtxCreate_v4, &other, NULL, 0, 0);
    TRY("v4.synchronize", cuCtxSynchronize_v2, other);
    TRY("v4.destroy", cuCtxDestroy_v2, other);
    TRY("v4.synchronize.destroyed", cuCtxSynchronize_v2, other);
    TRY("v4.empty", cuCtxCreate_v4, &other, &params, 0, 0);
    TRY("v4.empty.destroy", cuCtxDestroy_v2, other);
    TRY("v4.null", cuCtxCreate_v4, NULL, NULL, 0, 0);
    TRY("v4.flags", cuCtxCreate_v4, &other, NULL, 0x8000, 0);
    TRY("v4.device", cuCtxCreate_v4, &other, NULL, 0, 99);
    TRY("destroy.null", cuCtxDestroy, NULL);
    use_primary();
    CALL(cuCtxGetCurrent, &context);
    TRY("destroy.primary", cuCtxDestroy, context);
    TRY("synchronize", cuCtxSynchronize_v2, context);
    TRY("synchronize.null", cuCtxSynchronize_v2, NULL);
}

static void check_primary(void)
{
    CUcontext context = NULL;
    TRY("release", cuDevicePrimaryCtxRelease, 0);
    TRY("release.past", cuDevicePrimaryCtxRelease, 99);
    TRY("reset", cuDevicePrimaryCtxReset, 0);
    TRY("reset.past", cuDevicePrimaryCtxReset, 99);
    while (!CALL(cuDevicePrimaryCtxRelease_v2, 0))
        ;
    TRY("release.unheld", cuDevicePrimaryCtxRelease, 0);
    TRY("retain", cuDevicePrimaryCtxRetain, &context, 0);
    TRY("release.last", cuDevicePrimaryCtxRelease, 0);
    TRY("alloc.released", cuMemAlloc_v2, &(CUdeviceptr){0}, 1);
    CALL(cuCtxSetCurrent, NULL);
    use_primary();
}

void check_older(void)
{
    section("older");
    use_primary();
    CUDA_ARRAY_DESCRIPTOR_v1 flat = {64, 64, CU_AD_FORMAT_FLOAT, 1};
    CUDA_ARRAY3D_DESCRIPTOR_v1 deep = {64, 64, 4, CU_AD_FORMAT_FLOAT, 1, 0};
    CUarray array = NULL;
    CUdeviceptr_v1 at = 0;
    CUstream stream = NULL;
    unsigned pitch = 0;
    TRY("pitch", cuMemAllocPitch, &at, &pitch, 1000, 10, 4);
    TRY("array", cuArrayCreate, &array, &flat);
    TRY("array.3d", cuArray3DCreate, &array, &deep);
    TRY("stream", cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    TRY("stream.destroy", cuStreamDestroy, stream);
    TRY("stream.destroy.default", cuStreamDestroy, NULL);
    check_created();
    check_primary();
}

/* No section requests a description of 0 parts: the real driver reads the first part nevertheless, and crashes. */
void check_green(void)
{
    section("green");
    CUdevResource all, part, rest;
    CUdevResourceDesc description = NULL;
    unsigned n = 0;
    memset(&all, 0, sizeof all);
    memset(&part, 0, sizeof part);
    memset(&rest, 0, sizeof rest);
    TRY("resource", cuDeviceGetDevResource, 0, &all, CU_DEV_RESOURCE_TYPE_SM);
    say("resource.count", all.sm.smCount);
    TRY("resource.null", cuDeviceGetDevResource, 0, NULL, CU_DEV_RESOURCE_TYPE_SM);
    TRY("resource.device", cuDeviceGetDevResource, 99, &part, CU_DEV_RESOURCE_TYPE_SM);
    TRY("resource.type", cuDeviceGetDevResource, 0, &part, CU_DEV_RESOURCE_TYPE_INVALID);
    TRY("split.count", cuDevSmResourceSplitByCount, NULL, &n, &all, NULL, 0, 16);
    say("split.count.n", n);
    n = 1;
    TRY("split", cuDevSmResourceSplitByCount, &part, &n, &all, &rest, 0, 16);
    say("split.part", part.sm.smCount);
    say("split.rest", rest.sm.smCount);
    TRY("description", cuDevResourceGenerateDesc, &description, &part, 1);
    TRY("description.null", cuDevResourceGenerateDesc, NULL, &part, 1);
}

void check_green_contexts(void)
{
    section("green_context");
    CUdevResource all, part;
    CUdevResourceDesc description = NULL;
    CUgreenCtx green = NULL;
    unsigned n = 1, flags = 0;
    int active = 0;
    memset(&all, 0, sizeof all);
    memset(&part, 0, sizeof part);
    CALL(cuDeviceGetDevResource, 0, &all, CU_DEV_RESOURCE_TYPE_SM);
    CALL(cuDevSmResourceSplitByCount, &part, &n, &all, NULL, 0, 16);
    CALL(cuDevResourceGenerateDesc, &description, &part, 1);
    TRY("create.flags0", cuGreenCtxCreate, &green, description, 0, 0);
    TRY("create.device", cuGreenCtxCreate, &green, description, 99, CU_GREEN_CTX_DEFAULT_STREAM);
    TRY("create.null", cuGreenCtxCreate, NULL, description, 0, CU_GREEN_CTX_DEFAULT_STREAM);
    CALL(cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("primary.before", active);
    TRY("create", cuGreenCtxCreate, &green, description, 0, CU_GREEN_CTX_DEFAULT_STREAM);
    CALL(cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("primary.with", active);
    TRY("destroy", cuGreenCtxDestroy, green);
    CALL(cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("primary.after", active);
    use_primary();
}

/* Makes the same three calls for each list: without a place for the length, for the length alone, and with enough room.
 * No call has a handle of NULL, because the real library dereferences it once it is initialized, and crashes. */
#define LIST(name, function, type)                                                                                     \
    do {                                                                                                               \
        type lines[64];                                                                                                \
        unsigned n = 0;                                                                                                \
        memset(lines, 0, sizeof lines);                                                                                \
        TRY(name ".null", function, device, NULL, NULL);                                                               \
        TRY(name ".count", function, device, &n, NULL);                                                                \
        say(name ".count.n", n);                                                                                       \
        n = 64;                                                                                                        \
        TRY(name, function, device, &n, lines);                                                                        \
        say(name ".n", n);                                                                                             \
    } while (0)

static void check_process_lists(nvmlDevice_t device)
{
    LIST("compute.v2", nvmlDeviceGetComputeRunningProcesses_v2, nvmlProcessInfo_v2_t);
    LIST("compute.v3", nvmlDeviceGetComputeRunningProcesses_v3, nvmlProcessInfo_t);
    LIST("graphics.v1", nvmlDeviceGetGraphicsRunningProcesses, nvmlProcessInfo_v1_t);
    LIST("graphics.v2", nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlProcessInfo_v2_t);
    LIST("graphics.v3", nvmlDeviceGetGraphicsRunningProcesses_v3, nvmlProcessInfo_t);
    LIST("mps.v1", nvmlDeviceGetMPSComputeRunningProcesses, nvmlProcessInfo_v1_t);
    LIST("mps.v2", nvmlDeviceGetMPSComputeRunningProcesses_v2, nvmlProcessInfo_v2_t);
    LIST("mps.v3", nvmlDeviceGetMPSComputeRunningProcesses_v3, nvmlProcessInfo_t);
    LIST("encoder", nvmlDeviceGetEncoderSessions, nvmlEncoderSessionInfo_t);
    LIST("capture", nvmlDeviceGetFBCSessions, nvmlFBCSessionInfo_t);
    LIST("accounting", nvmlDeviceGetAccountingPids, unsigned);
}

static void check_details(nvmlDevice_t device)
{
    nvmlProcessDetail_v1_t lines[64];
    nvmlProcessDetailList_t list;
    nvmlProcessUtilizationInfo_v1_t samples[128];
    nvmlProcessesUtilizationInfo_t info;
    memset(&list, 0, sizeof list);
    memset(&info, 0, sizeof info);
    TRY("details.version", nvmlDeviceGetRunningProcessDetailList, device, &list);
    list.version = nvmlProcessDetailList_v1;
    list.mode = 9;
    TRY("details.mode", nvmlDeviceGetRunningProcessDetailList, device, &list);
    for (unsigned mode = 0; mode < 3; mode++) {
        char name[32];
        list = (nvmlProcessDetailList_t){.version = nvmlProcessDetailList_v1, .mode = mode};
        list.numProcArrayEntries = 64;
        list.procArray = lines;
        snprintf(name, sizeof name, "details.%u", mode);
        TRY(name, nvmlDeviceGetRunningProcessDetailList, device, &list);
        snprintf(name, sizeof name, "details.%u.n", mode);
        say(name, list.numProcArrayEntries);
    }
    TRY("utilization.version", nvmlDeviceGetProcessesUtilizationInfo, device, &info);
    info.version = nvmlProcessesUtilizationInfo_v1;
    TRY("utilization.count", nvmlDeviceGetProcessesUtilizationInfo, device, &info);
    info.processSamplesCount = 128;
    info.procUtilArray = samples;
    TRY("utilization", nvmlDeviceGetProcessesUtilizationInfo, device, &info);
    unsigned n = 0;
    TRY("utilization.v1.null", nvmlDeviceGetProcessUtilization, device, NULL, NULL, 0);
    TRY("utilization.v1.count", nvmlDeviceGetProcessUtilization, device, NULL, &n, 0);
}

void check_lists(void)
{
    section("lists");
    nvmlDevice_t device = NULL;
    TRY("before", nvmlDeviceGetComputeRunningProcesses, NULL, &(unsigned){0}, NULL);
    TRY("init", nvmlInit);
    TRY("init.flags", nvmlInitWithFlags, NVML_INIT_FLAG_NO_GPUS);
    TRY("init.flags.unknown", nvmlInitWithFlags, 0x1000);
    TRY("index", nvmlDeviceGetHandleByIndex_v2, 0, &device);
    use_primary(); /* so that the list has a process */
    LIST("compute.v1", nvmlDeviceGetComputeRunningProcesses, nvmlProcessInfo_v1_t);
}

void check_accounts(void)
{
    section("accounts");
    nvmlDevice_t device = NULL;
    nvmlMemory_t memory;
    nvmlAccountingStats_t stats;
    CALL(nvmlInit);
    CALL(nvmlDeviceGetHandleByIndex_v2, 0, &device);
    use_primary();
    check_process_lists(device);
    check_details(device);
    TRY("stats.nobody", nvmlDeviceGetAccountingStats, device, 0x3ffffff, &stats);
    TRY("stats.null", nvmlDeviceGetAccountingStats, device, 1, NULL);
    TRY("protected", nvmlDeviceGetConfComputeProtectedMemoryUsage, device, &memory);
    TRY("protected.null", nvmlDeviceGetConfComputeProtectedMemoryUsage, device, NULL);
}
