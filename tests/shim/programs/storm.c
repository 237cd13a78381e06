/*
 * storm MILLISECONDS THREADS [SHIM HELLO_MILLISECONDS]: a program that uses all functions at once, for sanitizers. Its
 * threads allocate in every way, free memory that other threads allocated, launch, capture, wait, query, make contexts
 * and pools, and fork. SHIM is the preloaded file. With SHIM, the program contains a gatekeeper, which changes limits,
 * gates and lists all the time and requests a new hello every HELLO_MILLISECONDS. Without SHIM, an agent outside of it
 * or an image's limit applies. Prints counts as JSON. Exit status 0 if each child and each lookup had its expected
 * result. Results of other calls are ignored.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storm.h"

#define MOST_THREADS 16
#define MOST_PARTS 10 /* on a slow machine, the run lasts up to this many times MILLISECONDS */
#define SLOTS 24
#define MIB (1ULL << 20)
#define ONE 1, 1, 1, 1, 1, 1
#define ONE_BLOCK .gridDimX = 1, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 1, .blockDimY = 1, .blockDimZ = 1

/* clang-format off */
#define DRIVER(X)                                                                                                      \
    X(cuInit) X(cuDeviceGetUuid_v2) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease_v2) X(cuCtxSetCurrent)     \
    X(cuCtxCreate_v2) X(cuCtxDestroy_v2) X(cuCtxSynchronize) X(cuMemAlloc_v2) X(cuMemAllocPitch_v2) X(cuMemFree_v2)    \
    X(cuMemAllocManaged) X(cuArray3DCreate_v2) X(cuArrayDestroy) X(cuMemCreate) X(cuMemRelease) X(cuMemMap)            \
    X(cuMemUnmap) X(cuMemAddressReserve) X(cuMemAddressFree) X(cuMemRetainAllocationHandle) X(cuMemAllocAsync)         \
    X(cuMemAllocFromPoolAsync) X(cuMemFreeAsync) X(cuMemPoolCreate) X(cuMemPoolDestroy) X(cuMemPoolTrimTo)             \
    X(cuDeviceGetDefaultMemPool) X(cuDeviceSetMemPool) X(cuStreamCreate) X(cuStreamDestroy_v2) X(cuStreamQuery)        \
    X(cuStreamSynchronize) X(cuEventCreate) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)                     \
    X(cuEventDestroy_v2) X(cuModuleLoadData) X(cuModuleGetFunction) X(cuLaunchKernel) X(cuStreamBeginCapture_v2)       \
    X(cuStreamEndCapture) X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphExecDestroy) X(cuGraphDestroy)      \
    X(cuDeviceGraphMemTrim) X(cuCtxSetLimit) X(cuModuleUnload) X(cuLibraryLoadData) X(cuLibraryGetKernel)               \
    X(cuLibraryGetModule) X(cuLibraryUnload) X(cuGraphCreate) X(cuGraphAddKernelNode_v2) X(cuMemGetInfo_v2) X(cuDeviceTotalMem_v2) X(cuGetProcAddress_v2)
#define MANAGEMENT(X)                                                                                                  \
    X(nvmlInit_v2) X(nvmlDeviceGetHandleByIndex_v2) X(nvmlDeviceGetMemoryInfo)                                         \
    X(nvmlDeviceGetComputeRunningProcesses_v3)
/* clang-format on */

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT) MANAGEMENT(SLOT)
} cu;

struct life { /* the state of one thread */
    uint64_t random;
    int device;
    CUcontext primary;
    CUstream stream;
    CUevent event;
    CUmemoryPool pool;
    CUfunction kernel;
    CUdeviceptr streamed[SLOTS];
    pthread_t thread;
};

_Atomic bool storm_over;
static void *driver;
static _Atomic CUdeviceptr taken[SLOTS], streamed[SLOTS]; /* allocated by any thread; any thread may free it */
static _Atomic unsigned long calls, forks, captures, launches;
static _Atomic bool failed;

static uint64_t draw(struct life *life, uint64_t below)
{
    life->random ^= life->random << 13, life->random ^= life->random >> 7, life->random ^= life->random << 17;
    return (life->random >> 11) % below;
}

static size_t size(struct life *life) { return 1 + draw(life, 1ULL << (4 + draw(life, 21))); }

/* -- memory */

static void take(struct life *life)
{
    CUdeviceptr at = 0;
    size_t pitch;
    switch (draw(life, 4)) {
    case 0:
        if (cu.cuMemAllocPitch_v2(&at, &pitch, 1 + draw(life, 5000), 1 + draw(life, 500), 4)) return;
        break;
    case 1:
        if (cu.cuMemAllocManaged(&at, size(life), CU_MEM_ATTACH_GLOBAL)) return;
        break;
    default:
        if (cu.cuMemAlloc_v2(&at, draw(life, 50) ? size(life) : 1ULL << draw(life, 64))) return;
    }
    at = atomic_exchange(&taken[draw(life, SLOTS)], at);
    if (at) cu.cuMemFree_v2(at);
}

static void make_array(struct life *life)
{
    CUDA_ARRAY3D_DESCRIPTOR shape = {
        .Width = 1 + draw(life, 300), .Height = 1 + draw(life, 300), .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 4};
    CUarray array;
    if (!cu.cuArray3DCreate_v2(&array, &shape)) cu.cuArrayDestroy(array);
}

static void map(struct life *life)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device}};
    size_t bytes = (1 + draw(life, 4)) * 2 * MIB;
    CUmemGenericAllocationHandle handle, again;
    CUdeviceptr at;
    if (cu.cuMemCreate(&handle, bytes, &prop, 0)) return;
    if (!cu.cuMemAddressReserve(&at, bytes, 0, 0, 0)) {
        if (!cu.cuMemMap(at, bytes, 0, handle, 0)) {
            if (!cu.cuMemRetainAllocationHandle(&again, (void *)at)) cu.cuMemRelease(again);
            cu.cuMemUnmap(at, bytes);
        }
        cu.cuMemAddressFree(at, bytes);
    }
    cu.cuMemRelease(handle);
}

/* -- memory in streams */

static void own_pool(struct life *life)
{
    CUmemPoolProps props = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED,
                            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device}};
    CUmemoryPool its;
    if (!life->pool) {
        if (cu.cuMemPoolCreate(&life->pool, &props)) life->pool = NULL;
        return;
    }
    if (!cu.cuDeviceGetDefaultMemPool(&its, life->device)) {
        cu.cuDeviceSetMemPool(life->device, draw(life, 2) ? its : life->pool);
        cu.cuDeviceSetMemPool(life->device, its);
        cu.cuMemPoolTrimTo(its, 0);
    }
    for (int i = 0; i < SLOTS; i++) /* a destroyed pool exists until its memory is freed */
        if (life->streamed[i]) cu.cuMemFreeAsync(life->streamed[i], life->stream), life->streamed[i] = 0;
    cu.cuMemPoolDestroy(life->pool);
    life->pool = NULL;
}

static void take_in_stream(struct life *life)
{
    CUdeviceptr at, *slot = &life->streamed[draw(life, SLOTS)];
    if (*slot) cu.cuMemFreeAsync(*slot, life->stream);
    *slot = 0;
    if (life->pool && draw(life, 2)) {
        if (cu.cuMemAllocFromPoolAsync(slot, size(life), life->pool, life->stream)) *slot = 0;
        return;
    }
    if (cu.cuMemAllocAsync(&at, size(life), draw(life, 2) ? life->stream : NULL)) return;
    cu.cuStreamSynchronize(life->stream);
    at = atomic_exchange(&streamed[draw(life, SLOTS)], at);
    if (at) cu.cuMemFreeAsync(at, life->stream);
}

/* -- work */

static void launch(struct life *life)
{
    CUstream stream = draw(life, 4) ? life->stream : draw(life, 2) ? CU_STREAM_PER_THREAD : NULL;
    for (uint64_t n = 1 + draw(life, 20); n && !storm_over; n--)
        launches += !cu.cuLaunchKernel(life->kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL);
}

static void rest(struct life *life)
{
    switch (draw(life, 6)) {
    case 0:
        cu.cuCtxSynchronize();
        return;
    case 1:
        cu.cuEventRecord(life->event, life->stream);
        cu.cuEventQuery(life->event);
        cu.cuEventSynchronize(life->event);
        return;
    case 2:
        cu.cuStreamQuery(life->stream);
        return;
    case 3:
        cu.cuStreamDestroy_v2(life->stream);
        if (cu.cuStreamCreate(&life->stream, (unsigned)draw(life, 2))) life->stream = NULL;
        return;
    default:
        cu.cuStreamSynchronize(life->stream);
    }
}

static void capture(struct life *life)
{
    CUgraph graph = NULL;
    CUgraphExec exec;
    CUdeviceptr at;
    if (cu.cuStreamBeginCapture_v2(life->stream, draw(life, 2) ? CU_STREAM_CAPTURE_MODE_RELAXED
                                                               : CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        return;
    bool allocates = !cu.cuMemAllocAsync(&at, size(life), life->stream);
    cu.cuLaunchKernel(life->kernel, 1, 1, 1, 1, 1, 1, 0, life->stream, NULL, NULL);
    if (allocates) cu.cuMemFreeAsync(at, life->stream);
    if (cu.cuStreamEndCapture(life->stream, &graph)) return;
    if (!cu.cuGraphInstantiateWithFlags(&exec, graph, 0)) {
        for (int i = 0; i < 3; i++) captures += !cu.cuGraphLaunch(exec, life->stream);
        cu.cuStreamSynchronize(life->stream);
        cu.cuGraphExecDestroy(exec);
    }
    cu.cuGraphDestroy(graph);
    if (!draw(life, 4)) cu.cuDeviceGraphMemTrim(life->device);
}

/* Loads new code, whose kernel has local memory and data of any size, and launches the kernel. */
static void use_code(struct life *life)
{
    static const char format[] = ".version 7.0\n.target sm_70\n.address_size 64\n.global .b8 big[%u];\n"
                                 ".visible .entry f()\n{\n .local .align 16 .b8 buf[%u];\n ret;\n}\n";
    char code[256];
    CUmodule module;
    CUlibrary library;
    CUkernel kernel;
    CUfunction function;
    CUgraph graph;
    CUgraphNode node;
    snprintf(code, sizeof code, format, 1 + (unsigned)draw(life, 8 * MIB), 1 + (unsigned)draw(life, 3000));
    if (!draw(life, 3)) cu.cuCtxSetLimit(CU_LIMIT_STACK_SIZE, draw(life, 3000));
    if (draw(life, 2)) {
        if (cu.cuModuleLoadData(&module, code)) return;
        if (!cu.cuModuleGetFunction(&function, module, "f"))
            for (int i = 0; i < 3; i++) launches += !cu.cuLaunchKernel(function, ONE, 0, life->stream, NULL, NULL);
        cu.cuStreamSynchronize(life->stream);
        cu.cuModuleUnload(module);
        return;
    }
    if (cu.cuLibraryLoadData(&library, code, NULL, NULL, 0, NULL, NULL, 0)) return;
    if (!cu.cuLibraryGetKernel(&kernel, library, "f")) {
        CUDA_KERNEL_NODE_PARAMS params = {.kern = kernel, ONE_BLOCK};
        if (!cu.cuGraphCreate(&graph, 0)) {
            cu.cuGraphAddKernelNode_v2(&node, graph, NULL, 0, &params);
            cu.cuGraphDestroy(graph);
        }
        launches += !cu.cuLaunchKernel((CUfunction)kernel, ONE, 0, life->stream, NULL, NULL);
        cu.cuStreamSynchronize(life->stream);
        cu.cuLibraryGetModule(&module, library);
    }
    cu.cuLibraryUnload(library);
}

static void other_context(struct life *life)
{
    CUcontext context;
    CUstream stream;
    CUdeviceptr at;
    if (cu.cuCtxCreate_v2(&context, 0, life->device)) return;
    cu.cuMemAllocManaged(&at, MIB, CU_MEM_ATTACH_GLOBAL);
    cu.cuMemAlloc_v2(&at, MIB);
    if (!cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING)) cu.cuMemAllocAsync(&at, MIB, stream);
    cu.cuCtxDestroy_v2(context); /* with all of its memory */
    cu.cuCtxSetCurrent(life->primary);
    if (!cu.cuDevicePrimaryCtxRetain(&context, life->device)) cu.cuDevicePrimaryCtxRelease_v2(life->device);
}

/* -- queries, and children */

static void look(struct life *life)
{
    nvmlProcessInfo_t infos[16];
    unsigned count = 16;
    nvmlMemory_t memory;
    nvmlDevice_t device;
    size_t free, total;
    void *found;
    cu.cuMemGetInfo_v2(&free, &total);
    cu.cuDeviceTotalMem_v2(&total, life->device);
    if (!cu.nvmlDeviceGetHandleByIndex_v2((unsigned)life->device, &device)) {
        cu.nvmlDeviceGetMemoryInfo(device, &memory);
        cu.nvmlDeviceGetComputeRunningProcesses_v3(device, &count, infos);
    }
    cu.cuGetProcAddress_v2("cuMemAlloc", &found, 12000, CU_GET_PROC_ADDRESS_DEFAULT, NULL);
    if (!dlsym(driver, "cuMemAlloc_v2") || dlsym(driver, "cuNothing")) failed = true;
}

/* Forks a child. It is another process for the gatekeeper, and its driver refuses all calls. */
static void have_a_child(struct life *life)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device}};
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    size_t free, total;
    int status;
    pid_t child = fork();
    if (!child) {
        int bad = !cu.cuInit(0) || !cu.cuMemAlloc_v2(&at, MIB) || !cu.cuMemCreate(&handle, 2 * MIB, &prop, 0) ||
                  !cu.cuMemGetInfo_v2(&free, &total) || !cu.cuMemAllocAsync(&at, MIB, life->stream);
        _exit(bad);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status) failed = true;
    forks++;
}

static void *live(void *argument)
{
    struct life *life = argument;
    static void (*const ways[])(struct life *) = {
        take,   take,   take, make_array, map,     take_in_stream, take_in_stream, take_in_stream, launch,
        launch, launch, rest, rest,       capture, look,           look,           use_code,
    };
    CUmodule module;
    while (cu.cuDevicePrimaryCtxRetain(&life->primary, life->device)) storm_nap(1000); /* until its device is known */
    cu.cuCtxSetCurrent(life->primary);
    if (cu.cuModuleLoadData(&module, "any") || cu.cuModuleGetFunction(&life->kernel, module, "spin_20us")) exit(4);
    cu.cuStreamCreate(&life->stream, CU_STREAM_NON_BLOCKING);
    cu.cuEventCreate(&life->event, 0);
    while (!storm_over) {
        uint64_t rare = draw(life, 400);
        if (rare < 1)
            have_a_child(life);
        else if (rare < 5)
            other_context(life);
        else if (rare < 12)
            own_pool(life);
        else
            ways[draw(life, sizeof ways / sizeof *ways)](life);
        calls++;
        if (!draw(life, 100)) storm_nap((long)draw(life, 20000)); /* without the driver's lock */
    }
    cu.cuStreamSynchronize(life->stream);
    if (life->pool) own_pool(life);
    cu.cuEventDestroy_v2(life->event);
    cu.cuStreamDestroy_v2(life->stream);
    return NULL;
}

/* The driver has one lock, which orders nearly all operations of threads. A thread that makes a query and then sleeps
 * for longer than two hellos is not ordered with any other thread, so ThreadSanitizer can find its races. */
static bool is_over(void) { return atomic_load_explicit(&storm_over, memory_order_relaxed); }

static void *doze(void *unused)
{
    size_t total;
    while (!is_over()) {
        cu.cuDeviceTotalMem_v2(&total, 0);
        for (int i = 0; i < 250 && !is_over(); i++) storm_nap(10000);
    }
    return unused;
}

static void *library(const char *name)
{
    void *found = dlopen(name, RTLD_NOW);
    if (!found) fprintf(stderr, "%s\n", dlerror()), exit(2);
    return found;
}

static void begin(const char *shim, long again_us)
{
    CUuuid uuid;
    driver = library("libcuda.so.1");
    void *management = library("libnvidia-ml.so.1");
#define FIND(name) cu.name = (__typeof__(&name))dlsym(driver, #name);
    DRIVER(FIND)
#undef FIND
#define FIND(name) cu.name = (__typeof__(&name))dlsym(management, #name);
    MANAGEMENT(FIND)
    if (shim) storm_world_begin(library(shim));
    if (cu.cuInit(0) || cu.nvmlInit_v2()) exit(3);
    for (int i = 0; shim && i < DEVICES; i++)
        if (!cu.cuDeviceGetUuid_v2(&uuid, i)) storm_world_knows(i, &uuid);
    if (shim) storm_world_turns(again_us);
}

/* Return whether everything has happened at least once. */
static bool has_all(bool has_world)
{
    const struct storm_counts *c = &storm_counts;
    bool all = calls && forks && launches && captures;
    return all && (!has_world || (c->hellos && c->asked && c->refused && c->changes && c->tagged && c->patient));
}

int main(int count, char **words)
{
    static struct life lives[MOST_THREADS];
    const char *shim = count > 4 ? words[3] : NULL;
    if (count < 3) return 2;
    int threads = atoi(words[2]) < MOST_THREADS ? atoi(words[2]) : MOST_THREADS;
    pthread_t dozer;
    begin(shim, shim ? 1000 * atol(words[4]) : 0);
    pthread_create(&dozer, NULL, doze, NULL);
    for (int t = 0; t < threads; t++) {
        lives[t].random = (uint64_t)t * 0x9e3779b97f4a7c15u + 1;
        lives[t].device = t % DEVICES;
        pthread_create(&lives[t].thread, NULL, live, &lives[t]);
    }
    for (int part = 0; !part || (part < MOST_PARTS && !has_all(shim)); part++) storm_nap(1000 * atol(words[1]));
    storm_over = true;
    if (shim) storm_world_end();
    for (int t = 0; t < threads; t++) pthread_join(lives[t].thread, NULL);
    pthread_join(dozer, NULL);
    printf("{\"calls\": %lu, \"forks\": %lu, \"launches\": %lu, \"graphs\": %lu, \"hellos\": %lu, \"asked\": %lu, "
           "\"refused\": %lu, \"changes\": %lu, \"tagged\": %lu, \"patient\": %lu}\n",
           calls, forks, launches, captures, storm_counts.hellos, storm_counts.asked, storm_counts.refused,
           storm_counts.changes, storm_counts.tagged, storm_counts.patient);
    return failed;
}
