/*
 * elsewhere ROUNDS MIB [NAME...]: allocates memory on one of two devices, and frees it while a context of the other
 * device is current, in each way that the driver has. For each way and device, prints one line
 *
 *   NAME DEVICE PASSED ROUNDS TOOK_HERE TOOK_THERE LEFT_HERE LEFT_THERE
 *
 * In PASSED of the ROUNDS no call failed. The last four numbers are in MiB, from the driver's figures of free memory:
 * TOOK is the memory that a round uses on the device and on the other device. LEFT is the memory that is still missing
 * on each at most two seconds after the last round. A round allocates MIB. For a round that fails, the name of the
 * failed call and its result are printed on stderr.
 */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB (1ll << 20)

#define DRIVER(X)                                                                                                      \
    X(cuInit)                                                                                                          \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuCtxSynchronize)                                                                                                \
    X(cuMemGetInfo_v2)                                                                                                 \
    X(cuMemAlloc_v2)                                                                                                   \
    X(cuMemAllocPitch_v2)                                                                                              \
    X(cuMemAllocManaged)                                                                                               \
    X(cuMemFree_v2)                                                                                                    \
    X(cuMemAllocAsync)                                                                                                 \
    X(cuMemFreeAsync)                                                                                                  \
    X(cuMemAllocFromPoolAsync)                                                                                         \
    X(cuMemPoolCreate)                                                                                                 \
    X(cuMemPoolDestroy)                                                                                                \
    X(cuMemPoolTrimTo)                                                                                                 \
    X(cuDeviceGetDefaultMemPool)                                                                                       \
    X(cuStreamCreate)                                                                                                  \
    X(cuStreamSynchronize)                                                                                             \
    X(cuMemAddressReserve)                                                                                             \
    X(cuMemAddressFree)                                                                                                \
    X(cuMemCreate)                                                                                                     \
    X(cuMemRelease)                                                                                                    \
    X(cuMemMap)                                                                                                        \
    X(cuMemUnmap)                                                                                                      \
    X(cuArrayCreate_v2)                                                                                                \
    X(cuArrayDestroy)                                                                                                  \
    X(cuMipmappedArrayCreate)                                                                                          \
    X(cuMipmappedArrayDestroy)

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

static const char *failed; /* the call that failed last, and its result */
static CUresult result;
static CUcontext contexts[2];
static CUstream streams[2];
static int here, there; /* the device of the memory, and the device that is current when the memory is freed */
static long long level[2], took[2];
static bool watched;

#define TRY(name, ...)                                                                                                 \
    do {                                                                                                               \
        failed = #name;                                                                                                \
        result = cu.name ? cu.name(__VA_ARGS__) : CUDA_ERROR_NOT_FOUND;                                                \
        if (result) return;                                                                                            \
    } while (0)

static void current(int device)
{
    if (cu.cuCtxSetCurrent(contexts[device])) exit(3);
}

/* Returns the free bytes of a device, after the end of its work. */
static long long free_bytes(int device)
{
    size_t left, total;
    current(device);
    if (cu.cuCtxSynchronize() || cu.cuMemGetInfo_v2(&left, &total)) exit(3);
    return (long long)left;
}

/* Measures how much memory is in use, and makes the other device current before the memory is freed. */
static void leave(void)
{
    for (int i = 0; i < 2 && watched; i++) took[i] = level[i] - free_bytes(i);
    watched = false;
    current(there);
}

static CUmemLocation place(void) { return (CUmemLocation){.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = here}; }

/* -- one round each: allocates `bytes` on `here` and frees them while `there` is current */

static void free_async(CUdeviceptr at, int stream)
{
    leave();
    TRY(cuMemFreeAsync, at, streams[stream]);
    TRY(cuStreamSynchronize, streams[stream]);
}

static void plain(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    leave();
    TRY(cuMemFree_v2, at);
}

static void plain_there(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    free_async(at, there);
}

static void plain_back(size_t bytes) /* a stream of the memory's device, while the other one is current */
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    free_async(at, here);
}

static void plain_default(size_t bytes) /* the default stream of the current context */
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    leave();
    TRY(cuMemFreeAsync, at, NULL);
    TRY(cuStreamSynchronize, NULL);
}

static void pitched(size_t bytes)
{
    CUdeviceptr at;
    size_t pitch;
    TRY(cuMemAllocPitch_v2, &at, &pitch, 1 << 16, bytes >> 16, 4);
    leave();
    TRY(cuMemFree_v2, at);
}

static void managed(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocManaged, &at, bytes, CU_MEM_ATTACH_GLOBAL);
    leave();
    TRY(cuMemFree_v2, at);
}

static void async(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, streams[here]);
    leave();
    TRY(cuMemFree_v2, at);
}

static void async_there(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, streams[here]);
    free_async(at, there);
}

static void async_back(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, streams[here]);
    free_async(at, here);
}

static void async_afar(size_t bytes) /* both calls name the stream of a device that is not current */
{
    CUdeviceptr at;
    current(there);
    TRY(cuMemAllocAsync, &at, bytes, streams[here]);
    free_async(at, here);
}

static void pool_default(size_t bytes) /* the default pool of a device on a stream of the other one */
{
    CUmemoryPool its;
    CUdeviceptr at;
    current(there);
    TRY(cuDeviceGetDefaultMemPool, &its, here);
    TRY(cuMemAllocFromPoolAsync, &at, bytes, its, streams[there]);
    free_async(at, there);
}

static void pool_own(size_t bytes) /* the same with a pool that the program made */
{
    CUmemPoolProps how = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED, .location = place()};
    CUmemoryPool made;
    CUdeviceptr at;
    current(there);
    TRY(cuMemPoolCreate, &made, &how);
    TRY(cuMemAllocFromPoolAsync, &at, bytes, made, streams[there]);
    free_async(at, there);
    if (!result) TRY(cuMemPoolDestroy, made);
}

static void mapped(size_t bytes)
{
    CUmemAllocationProp what = {.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = place()};
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    current(there);
    TRY(cuMemAddressReserve, &at, bytes, 0, 0, 0);
    TRY(cuMemCreate, &handle, bytes, &what, 0);
    TRY(cuMemMap, at, bytes, 0, handle, 0);
    TRY(cuMemRelease, handle);
    leave();
    TRY(cuMemUnmap, at, bytes);
    TRY(cuMemAddressFree, at, bytes);
}

static void array(size_t bytes)
{
    CUDA_ARRAY_DESCRIPTOR what = {
        .Width = 1 << 14, .Height = bytes >> 16, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 1};
    CUarray made;
    TRY(cuArrayCreate_v2, &made, &what);
    leave();
    TRY(cuArrayDestroy, made);
}

static void mipmapped(size_t bytes)
{
    CUDA_ARRAY3D_DESCRIPTOR what = {
        .Width = 1 << 14, .Height = bytes >> 16, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 1};
    CUmipmappedArray made;
    TRY(cuMipmappedArrayCreate, &made, &what, 1);
    leave();
    TRY(cuMipmappedArrayDestroy, made);
}

static const struct way {
    const char *name;
    void (*round)(size_t);
} ways[] = {
    {"plain", plain},
    {"plain_there", plain_there},
    {"plain_back", plain_back},
    {"plain_default", plain_default},
    {"pitched", pitched},
    {"managed", managed},
    {"async", async},
    {"async_there", async_there},
    {"async_back", async_back},
    {"async_afar", async_afar},
    {"pool_default", pool_default},
    {"pool_own", pool_own},
    {"mapped", mapped},
    {"array", array},
    {"mipmapped", mipmapped},
};

static void run(const struct way *way, unsigned rounds, size_t bytes)
{
    unsigned passed = 0;
    took[0] = took[1] = 0;
    for (int i = 0; i < 2; i++) level[i] = free_bytes(i);
    for (unsigned round = 0; round < rounds; round++) {
        watched = !round;
        current(here);
        way->round(bytes);
        passed += !result;
        if (result) fprintf(stderr, "%s on %d, round %u: %s returns %d\n", way->name, here, round, failed, result);
    }
    for (unsigned i = 0; i < 100 && (free_bytes(0) != level[0] || free_bytes(1) != level[1]); i++) usleep(20000);
    printf("%s %d %u %u %lld %lld", way->name, here, passed, rounds, took[here] / MIB, took[there] / MIB);
    printf(" %lld %lld\n", (level[here] - free_bytes(here)) / MIB, (level[there] - free_bytes(there)) / MIB);
    fflush(stdout);
}

static bool begin(void)
{
    if (!cu.cuInit || cu.cuInit(0)) return false;
    for (int i = 0; i < 2; i++) {
        if (cu.cuDevicePrimaryCtxRetain(&contexts[i], i) || cu.cuCtxSetCurrent(contexts[i])) return false;
        if (cu.cuStreamCreate(&streams[i], 0)) return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    const struct way *end = ways + sizeof ways / sizeof *ways;
#define FIND(name) cu.name = lib ? (__typeof__(&name))dlsym(lib, #name) : NULL;
    DRIVER(FIND)
    if (argc < 3 || !begin()) return 2;
    for (const struct way *way = ways; way < end; way++) {
        bool named = argc == 3;
        for (int i = 3; i < argc; i++) named |= !strcmp(argv[i], way->name);
        for (here = 0; named && here < 2; here++) {
            there = 1 - here;
            run(way, (unsigned)atoi(argv[1]), (size_t)atoll(argv[2]) * MIB);
        }
    }
    return 0;
}
