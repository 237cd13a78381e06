/* cuGetProcAddress, and NVML. */
#define _GNU_SOURCE
#include "conformance.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static const char *symbol_of(void *address)
{
    Dl_info info;
    return address && dladdr(address, &info) && info.dli_saddr == address ? info.dli_sname : "none";
}

void check_lookup(void)
{
    static const char *const names[] = {"cuMemAlloc",
                                        "cuMemAlloc_v2",
                                        "cuMemFree",
                                        "cuCtxCreate",
                                        "cuGetProcAddress",
                                        "cuDeviceGetUuid",
                                        "cuMemcpyHtoD",
                                        "cuMemcpyHtoDAsync",
                                        "cuLaunchKernel",
                                        "cuStreamSynchronize",
                                        "cuMemAllocAsync",
                                        "cuStreamGetCaptureInfo",
                                        "nosuch"};
    static const int versions[] = {4000, 7000, 11000, 11040, 12000, 13000, 13010};
    section("lookup");
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        for (size_t v = 0; v < sizeof versions / sizeof *versions; v++) {
            for (int flags = 0; flags < 3; flags++) {
                void *found = (void *)1;
                CUdriverProcAddressQueryResult status = 77;
                CUresult result = CALL(cuGetProcAddress_v2, names[n], &found, versions[v], (cuuint64_t)flags, &status);
                int is_symbol = !result && found;
                printf("lookup.%s.%d.%d %d %d %s\n", names[n], versions[v], flags, (int)result, (int)status,
                       is_symbol            ? symbol_of(found)
                       : found == (void *)1 ? "untouched"
                                            : "null");
            }
        }
    }
    void *found = NULL;
    CUdriverProcAddressQueryResult status = 77;
    TRY("v1", cuGetProcAddress, "cuMemAlloc", &found, 12000, 0);
    TRY("v1.nosuch", cuGetProcAddress, "nosuch", &found, 12000, 0);
    TRY("nosuch.nostatus", cuGetProcAddress_v2, "nosuch", &found, 12000, 0, NULL);
    TRY("flags", cuGetProcAddress_v2, "cuMemAlloc", &found, 12000, 4, &status);
    TRY("flags.both", cuGetProcAddress_v2, "cuMemAlloc", &found, 12000, 3, &status);
    TRY("empty", cuGetProcAddress_v2, "", &found, 12000, 0, &status);
    CUuuid id;
    const void *table;
    memset(&id, 1, sizeof id);
    TRY("table.unknown", cuGetExportTable, &table, &id);
}

static void check_processes(nvmlDevice_t device)
{
    nvmlProcessInfo_t lines[64];
    unsigned n = 0;
    TRY("processes.none.null", nvmlDeviceGetComputeRunningProcesses_v3, device, NULL, NULL);
    TRY("processes.none", nvmlDeviceGetComputeRunningProcesses_v3, device, &n, NULL);
    CUcontext context = NULL;
    CALL(cuInit, 0);
    CALL(cuDevicePrimaryCtxRetain, &context, 0);
    n = 0;
    TRY("processes.count", nvmlDeviceGetComputeRunningProcesses_v3, device, &n, NULL);
    say("processes.count.enough", n >= 1);
    n = 64;
    TRY("processes.room.null", nvmlDeviceGetComputeRunningProcesses_v3, device, &n, NULL);
    n = 64;
    TRY("processes", nvmlDeviceGetComputeRunningProcesses_v3, device, &n, lines);
    say("processes.n", n);
    say("processes.mib", n ? (long long)(lines[0].usedGpuMemory / MIB) : -1);
    say("processes.instance", n ? (long long)lines[0].gpuInstanceId : -1);
    n = 64;
    TRY("processes.graphics", nvmlDeviceGetGraphicsRunningProcesses_v3, device, &n, lines);
    say("processes.graphics.n", n);
    n = 0;
    TRY("utilization.processes", nvmlDeviceGetProcessUtilization, device, NULL, &n, 0);
    CALL(cuDevicePrimaryCtxRelease_v2, 0);
    n = 64;
    TRY("processes.after", nvmlDeviceGetComputeRunningProcesses_v3, device, &n, lines);
    say("processes.after.n", n);
    say("processes.after.mib", n ? (long long)(lines[0].usedGpuMemory / MIB) : -1);
}

void check_nvml(void)
{
    section("nvml");
    unsigned n = 0, other = 0;
    char text[96];
    nvmlDevice_t device = NULL, same = NULL;
    nvmlMemory_t memory;
    nvmlMemory_v2_t memory2 = {.version = nvmlMemory_v2};
    TRY("uninitialised.count", nvmlDeviceGetCount_v2, &n);
    TRY("uninitialised.shutdown", nvmlShutdown);
    TRY("uninitialised.name", nvmlDeviceGetName, NULL, text, sizeof text);
    TRY("uninitialised.driver", nvmlSystemGetDriverVersion, text, sizeof text);
    TRY("uninitialised.nvml", nvmlSystemGetNVMLVersion, text, sizeof text);
    TRY("init", nvmlInit_v2);
    TRY("init.again", nvmlInit_v2);
    TRY("shutdown", nvmlShutdown);
    TRY("count", nvmlDeviceGetCount_v2, &n);
    TRY("count.null", nvmlDeviceGetCount_v2, NULL);
    TRY("index", nvmlDeviceGetHandleByIndex_v2, 0, &device);
    TRY("index.past", nvmlDeviceGetHandleByIndex_v2, 99, &same);
    TRY("index.null", nvmlDeviceGetHandleByIndex_v2, 0, NULL);
    TRY("uuid", nvmlDeviceGetUUID, device, text, sizeof text);
    TRY("uuid.short", nvmlDeviceGetUUID, device, text, 5);
    CALL(nvmlDeviceGetUUID, device, text, sizeof text);
    TRY("by_uuid", nvmlDeviceGetHandleByUUID, text, &same);
    say("by_uuid.same", same == device);
    TRY("by_uuid.nosuch", nvmlDeviceGetHandleByUUID, "GPU-00000000-0000-0000-0000-000000000000", &same);
    TRY("by_uuid.garbage", nvmlDeviceGetHandleByUUID, "garbage", &same);
    TRY("by_bus.nosuch", nvmlDeviceGetHandleByPciBusId_v2, "0000:7f:1f.0", &same);
    TRY("by_bus.garbage", nvmlDeviceGetHandleByPciBusId_v2, "garbage", &same);
    TRY("name.null", nvmlDeviceGetName, device, NULL, 10);
    TRY("name.handle", nvmlDeviceGetName, NULL, text, sizeof text);
    TRY("memory", nvmlDeviceGetMemoryInfo, device, &memory);
    say("memory.total.mib", (long long)(memory.total / MIB));
    say("memory.adds_up", memory.total == memory.used + memory.free);
    TRY("memory.null", nvmlDeviceGetMemoryInfo, device, NULL);
    TRY("memory2", nvmlDeviceGetMemoryInfo_v2, device, &memory2);
    say("memory2.reserved", (long long)memory2.reserved);
    say("memory2.adds_up", memory2.total == memory2.used + memory2.free + memory2.reserved);
    say("memory2.idle.used.kib", (long long)(memory2.used / KIB));
    memory2.version = 1;
    TRY("memory2.version", nvmlDeviceGetMemoryInfo_v2, device, &memory2);
    TRY("mig", nvmlDeviceGetMigMode, device, &n, &other);
    TRY("fan", nvmlDeviceGetFanSpeed, device, &n);
    TRY("temperature.sensor", nvmlDeviceGetTemperature, device, (nvmlTemperatureSensors_t)9, &n);
    TRY("clock.type", nvmlDeviceGetClockInfo, device, (nvmlClockType_t)9, &n);
    TRY("attributes", nvmlDeviceGetAttributes_v2, device, (nvmlDeviceAttributes_t *)text);
    check_processes(device);
    TRY("process.name.nosuch", nvmlSystemGetProcessName, 0x3ffffff, text, sizeof text);
    TRY("shutdown.last", nvmlShutdown);
    TRY("shutdown.more", nvmlShutdown);
}
