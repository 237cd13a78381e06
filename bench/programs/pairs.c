/* pairs [LIBCUDART]: pairs of an allocation and its free. The program prints "ready WAY": WAY is `runtime` if that
 * library could be loaded, else `driver`. Then it answers each line of stdin with one line, or with "- CODE". It does
 * not use fgpu.
 *
 *   paced RATE SECONDS   RATE pairs of cuMemAlloc and cuMemFree of 4 MiB a second. Answer: completed pairs, late pairs
 *   loop BATCHES PAIRS   stream-ordered pairs of 1 MiB, by the runtime if it is loaded. Answer: the nanoseconds of each
 *                        batch */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define PACED_BYTES (4 << 20)
#define LOOP_BYTES (1 << 20)
#define WARM 20

#define DRIVER(X)                                                                                                      \
    X(cuInit)                                                                                                          \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuCtxSynchronize)                                                                                                \
    X(cuDeviceGetDefaultMemPool)                                                                                       \
    X(cuMemPoolSetAttribute)

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;
static CUresult (*alloc_now)(CUdeviceptr *, size_t), (*free_now)(CUdeviceptr);
static int (*alloc_async)(CUdeviceptr *, size_t, void *),
    (*free_async)(CUdeviceptr, void *); /* CUresult, cudaError_t */

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static bool load(const char *runtime)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *lib = runtime ? dlopen(runtime, RTLD_NOW) : NULL;
    bool all = driver != NULL;
#define FIND(name) all = all && (cu.name = (__typeof__(&name))dlsym(driver, #name));
    DRIVER(FIND)
    if (!all) return false;
    *(void **)&alloc_now = dlsym(driver, "cuMemAlloc_v2");
    *(void **)&free_now = dlsym(driver, "cuMemFree_v2");
    *(void **)&alloc_async = lib ? dlsym(lib, "cudaMallocAsync") : dlsym(driver, "cuMemAllocAsync");
    *(void **)&free_async = lib ? dlsym(lib, "cudaFreeAsync") : dlsym(driver, "cuMemFreeAsync");
    if (!alloc_now || !free_now || !alloc_async || !free_async) return false;
    CUcontext context;
    if (cu.cuInit(0) || cu.cuDevicePrimaryCtxRetain(&context, 0) || cu.cuCtxSetCurrent(context)) return false;
    printf("ready %s\n", lib ? "runtime" : "driver");
    return true;
}

/* Pairs that are late follow each other without a pause, so that the number of pairs is exact at the end. */
static void paced(int rate, int seconds)
{
    int64_t begun = now(), step = 1000000000ll / rate;
    long done = 0, late = 0;
    CUdeviceptr at = 0;
    for (; done < (long)rate * seconds; done++) {
        int64_t due = begun + done * step;
        struct timespec when = {due / 1000000000, due % 1000000000};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR) {
        }
        if (now() > due + step) late++;
        CUresult result = alloc_now(&at, PACED_BYTES);
        if (!result) result = free_now(at);
        if (result) {
            printf("- %d\n", result);
            return;
        }
    }
    printf("%ld %ld\n", done, late);
}

static int pairs(int count)
{
    int result = 0;
    CUdeviceptr at = 0;
    for (int i = 0; i < count && !result; i++) {
        result = alloc_async(&at, LOOP_BYTES, NULL);
        if (!result) result = free_async(at, NULL);
    }
    return result;
}

/* The pool keeps freed memory, as frameworks configure it. Otherwise the times would include the allocation of new
 * memory. */
static void loop(int batches, int count)
{
    CUmemoryPool pool;
    cuuint64_t keep = UINT64_MAX;
    int result = cu.cuDeviceGetDefaultMemPool(&pool, 0);
    if (!result) result = cu.cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
    if (!result) result = pairs(WARM);
    for (int i = 0; i < batches && !result; i++) {
        cu.cuCtxSynchronize();
        int64_t begun = now();
        result = pairs(count);
        if (!result) printf("%s%" PRId64, i ? " " : "", now() - begun);
    }
    if (result) printf("- %d", result);
    putchar('\n');
}

int main(int argc, char **argv)
{
    char verb[16];
    int one, other;
    if (!load(argc > 1 ? argv[1] : NULL)) {
        puts("- no context");
        return 1;
    }
    fflush(stdout);
    while (scanf("%15s %d %d", verb, &one, &other) == 3 && one > 0 && other > 0) {
        if (!strcmp(verb, "paced")) paced(one, other);
        if (!strcmp(verb, "loop")) loop(one, other);
        fflush(stdout);
    }
    return 0;
}
