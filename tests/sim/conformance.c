/* Makes thousands of small calls to a CUDA driver and prints their results. No other process may use the device in the
 * meantime, because amounts of memory are differences of cuMemGetInfo. Sections are chosen by name on
 * the command line; without a name, all run. */
#define _GNU_SOURCE
#include "conformance.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void *cuda, *management;
static const char *prefix = "";
static size_t marked;

static int missing(void) { return 999; }

void *need(const char *name)
{
    void *found = dlsym(strncmp(name, "nvml", 4) ? cuda : management, name);
    return found ? found : (void *)missing;
}

void say(const char *name, long long value)
{
    printf("%s.%s %lld\n", prefix, name, value);
    fflush(stdout);
}

void section(const char *name) { prefix = name; }

void use_primary(void)
{
    CUcontext context = NULL;
    CALL(cuDevicePrimaryCtxRetain, &context, 0);
    CALL(cuCtxSetCurrent, context);
}

static size_t free_now(void)
{
    size_t available = 0, total = 0;
    CALL(cuMemGetInfo_v2, &available, &total);
    return available;
}

void mark(void) { marked = free_now(); }

long long taken_mib(void) { return ((long long)marked - (long long)free_now()) / (long long)MIB; }

static void check_before_init(void)
{
    section("uninitialised");
    int n = 0;
    size_t size;
    CUdevice device;
    CUcontext context;
    CUdeviceptr ptr = 0;
    CUmemGenericAllocationHandle handle = 0;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    const char *text = NULL;
    void *pfn = NULL;
    CUdriverProcAddressQueryResult status;
    TRY("cuDeviceGetCount", cuDeviceGetCount, &n);
    TRY("cuDeviceGet", cuDeviceGet, &device, 0);
    TRY("cuCtxGetCurrent", cuCtxGetCurrent, &context);
    TRY("cuCtxSynchronize", cuCtxSynchronize);
    TRY("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, &context, 0);
    TRY("cuMemAlloc", cuMemAlloc_v2, &ptr, 1);
    TRY("cuMemAlloc.null", cuMemAlloc_v2, NULL, 0);
    TRY("cuMemFree", cuMemFree_v2, 0);
    TRY("cuMemGetInfo", cuMemGetInfo_v2, &size, &size);
    TRY("cuMemRelease", cuMemRelease, handle);
    TRY("cuStreamSynchronize", cuStreamSynchronize, NULL);
    TRY("cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode, &mode);
    TRY("cuGetProcAddress", cuGetProcAddress_v2, "cuMemAlloc", &pfn, 12000, 0, &status);
    TRY("cuDriverGetVersion", cuDriverGetVersion, &n);
    say("version", n);
    TRY("cuDriverGetVersion.null", cuDriverGetVersion, NULL);
    TRY("cuGetErrorName", cuGetErrorName, CUDA_ERROR_OUT_OF_MEMORY, &text);
    TRY("cuGetErrorName.unknown", cuGetErrorName, (CUresult)12345, &text);
    say("cuGetErrorName.unknown.isnull", !text);
    TRY("cuInit.flags", cuInit, 1);
    TRY("cuInit", cuInit, 0);
    TRY("cuInit.again", cuInit, 0);
}

static void check_devices(void)
{
    section("device");
    CUdevice device = -1;
    char text[256];
    int value = 0, other = 0;
    size_t total = 0;
    CUuuid uuid;
    TRY("get", cuDeviceGet, &device, 0);
    TRY("get.null", cuDeviceGet, NULL, 0);
    TRY("get.past", cuDeviceGet, &device, 99);
    TRY("get.negative", cuDeviceGet, &device, -1);
    TRY("count.null", cuDeviceGetCount, NULL);
    TRY("name.device", cuDeviceGetName, text, sizeof text, 99);
    TRY("name.null", cuDeviceGetName, NULL, sizeof text, 0);
    TRY("name.short", cuDeviceGetName, text, 3, 0);
    TRY("uuid", cuDeviceGetUuid_v2, &uuid, 0);
    TRY("uuid.null", cuDeviceGetUuid_v2, NULL, 0);
    TRY("total", cuDeviceTotalMem_v2, &total, 0);
    say("total.mib", (long long)(total / MIB));
    TRY("total.null", cuDeviceTotalMem_v2, NULL, 0);
    TRY("total.device", cuDeviceTotalMem_v2, &total, 99);
    TRY("capability", cuDeviceComputeCapability, &value, &other, 0);
    TRY("attribute.0", cuDeviceGetAttribute, &value, 0, 0);
    TRY("attribute.9999", cuDeviceGetAttribute, &value, 9999, 0);
    TRY("attribute.null", cuDeviceGetAttribute, NULL, 1, 0);
    TRY("attribute.device", cuDeviceGetAttribute, &value, 1, 99);
    for (int i = 1; i < 148; i++) {
        char name[32];
        snprintf(name, sizeof name, "attribute.%d", i);
        value = -77;
        if (i != CU_DEVICE_ATTRIBUTE_PCI_BUS_ID && i != CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID &&
            i != CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)
            say(name, CALL(cuDeviceGetAttribute, &value, i, 0) ? -1 : value);
    }
    TRY("bus", cuDeviceGetPCIBusId, text, sizeof text, 0);
    TRY("bus.found", cuDeviceGetByPCIBusId, &device, text);
    TRY("bus.short", cuDeviceGetPCIBusId, text, 5, 0);
    TRY("bus.nosuch", cuDeviceGetByPCIBusId, &device, "0000:7f:1f.0");
    TRY("bus.garbage", cuDeviceGetByPCIBusId, &device, "garbage");
    TRY("bus.null", cuDeviceGetByPCIBusId, &device, NULL);
    TRY("peer.self", cuDeviceCanAccessPeer, &value, 0, 0);
    TRY("peer.past", cuDeviceCanAccessPeer, &value, 0, 99);
}

/* Calls of a forked child, which is not the process that called cuInit. */
static void check_fork(void)
{
    section("fork");
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        int n;
        CUdeviceptr ptr;
        CUcontext context;
        TRY("cuInit", cuInit, 0);
        TRY("cuDeviceGetCount", cuDeviceGetCount, &n);
        TRY("cuCtxGetCurrent", cuCtxGetCurrent, &context);
        TRY("cuMemAlloc", cuMemAlloc_v2, &ptr, 1);
        TRY("cuDriverGetVersion", cuDriverGetVersion, &n);
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    say("status", status);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } sections[] = {{"unready", check_unready},
                    {"uninitialised", check_before_init},
                    {"nvml", check_nvml},
                    {"events", check_events},
                    {"device", check_devices},
                    {"context", check_contexts},
                    {"memory", check_memory},
                    {"vmm", check_vmm},
                    {"pool", check_pools},
                    {"stream", check_streams},
                    {"capture", check_capture},
                    {"graph", check_graphs},
                    {"module", check_modules},
                    {"array", check_arrays},
                    {"managed", check_managed},
                    {"old", check_old},
                    {"sharing", check_sharing},
                    {"lookup", check_lookup},
                    {"contextless", check_contextless},
                    {"gone", check_gone},
                    {"launch", check_launches},
                    {"twin", check_twins},
                    {"instantiate", check_instantiation},
                    {"tograph", check_to_graph},
                    {"place", check_current_pool},
                    {"older", check_older},
                    {"green", check_green},
                    {"lists", check_lists},
                    {"forked", check_forked},
                    {"records", check_records},
                    {"fragments", check_fragments},
                    {"relaxed", check_relaxed},
                    {"lost", check_lost_graphs},
                    {"asides", check_asides},
                    {"apart", check_apart},
                    {"accounts", check_accounts},
                    {"green_context", check_green_contexts},
                    {"destroyed", check_destroyed_pools},
                    {"outlives", check_outlives},
                    {"endings", check_endings},
                    {"grows", check_grows},
                    {"queues", check_queues},
                    {"resident", check_resident},
                    {"pool_handles", check_pool_handles},
                    {"hooks2", check_hooks},
                    {"hooks3", check_code},
                    {"freed", check_freed},
                    {"afar", check_afar},
                    {"sparse", check_sparse},
                    {"formats", check_formats},
                    {"checkpoint", check_checkpoint},
                    {"fork", check_fork}};
    cuda = dlopen("libcuda.so.1", RTLD_NOW);
    management = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!cuda || !management) {
        fprintf(stderr, "conformance: %s\n", dlerror());
        return 1;
    }
    if (argc == 3 && !strcmp(argv[1], "--sharing-child")) return sharing_child(atoi(argv[2]));
    if (argc == 3 && !strcmp(argv[1], "--actor")) return actor_begins(atoi(argv[2]));
    for (size_t i = 0; i < sizeof sections / sizeof *sections; i++) {
        int wanted = argc == 1 || !strcmp(sections[i].name, "uninitialised");
        for (int a = 1; a < argc; a++) wanted = wanted || !strcmp(argv[a], sections[i].name);
        if (wanted) sections[i].run();
    }
    return 0;
}
