/* memory: measures the times of the driver's calls in one process. The program answers each line `NAME COUNT` of stdin
 * with one line: COUNT times in nanoseconds, or "- WHY". It does not use fgpu; bench/memory.py runs it with and without
 * fgpu.
 *
 * NAME is alloc or free (4 MiB each), async (cuMemAllocAsync and cuMemFreeAsync, one time for both), info, launch, or
 * init (dlopen, lookup and cuInit of a new process). */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BYTES (4 << 20)
#define BATCH 50 /* launches and stream-ordered pairs between two synchronisations, which are not timed */
#define MOST 100000
#define WARM 20

#define DRIVER(X)                                                                                                      \
    X(cuInit)                                                                                                          \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuCtxSynchronize)                                                                                                \
    X(cuGetErrorName)                                                                                                  \
    X(cuMemAlloc_v2)                                                                                                   \
    X(cuMemFree_v2)                                                                                                    \
    X(cuMemGetInfo_v2)                                                                                                 \
    X(cuMemAllocAsync)                                                                                                 \
    X(cuMemFreeAsync)                                                                                                  \
    X(cuDeviceGetDefaultMemPool)                                                                                       \
    X(cuMemPoolSetAttribute)                                                                                           \
    X(cuModuleLoadData)                                                                                                \
    X(cuModuleGetFunction)                                                                                             \
    X(cuLaunchKernel)

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

/* The simulated driver takes the duration of the kernel from its name. On a real driver the kernel returns at once. */
static const char kernel_name[] = "spin_0us";
static const char image[] = ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static const char *self;
static int64_t times[MOST];
static CUfunction kernel;

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static const char *name_of(CUresult result)
{
    const char *name = NULL;
    return cu.cuGetErrorName && !cu.cuGetErrorName(result, &name) && name ? name : "an error";
}

static bool load(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
#define FIND(name) cu.name = lib ? (__typeof__(&name))dlsym(lib, #name) : NULL;
    DRIVER(FIND)
    return lib && cu.cuInit;
}

/* -- the measurements: each fills `times` and returns the first error */

typedef CUresult timed(int count);

static CUresult alloc_and_free(int count, bool free_too)
{
    CUresult result = CUDA_SUCCESS;
    CUdeviceptr at = 0;
    for (int i = -WARM; i < count && !result; i++) {
        int64_t begun = now();
        result = cu.cuMemAlloc_v2(&at, BYTES);
        int64_t had = now();
        if (result) break;
        result = cu.cuMemFree_v2(at);
        if (i >= 0) times[i] = free_too ? now() - had : had - begun;
    }
    return result;
}

static CUresult time_alloc(int count) { return alloc_and_free(count, false); }
static CUresult time_free(int count) { return alloc_and_free(count, true); }

static CUresult time_info(int count)
{
    CUresult result = CUDA_SUCCESS;
    size_t free_bytes, total;
    for (int i = -WARM; i < count && !result; i++) {
        int64_t begun = now();
        result = cu.cuMemGetInfo_v2(&free_bytes, &total);
        if (i >= 0) times[i] = now() - begun;
    }
    return result;
}

/* The pool keeps freed memory, as frameworks configure it. Otherwise each first pair after a synchronisation would
 * include the allocation of new memory. */
static CUresult time_async(int count)
{
    CUmemoryPool pool;
    CUdeviceptr at;
    cuuint64_t keep = UINT64_MAX;
    if (!cu.cuMemAllocAsync || !cu.cuMemFreeAsync || !cu.cuDeviceGetDefaultMemPool || !cu.cuMemPoolSetAttribute)
        return CUDA_ERROR_NOT_FOUND;
    CUresult result = cu.cuDeviceGetDefaultMemPool(&pool, 0);
    if (!result) result = cu.cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
    for (int i = -WARM; i < count && !result; i++) {
        if ((i + WARM) % BATCH == 0) cu.cuCtxSynchronize();
        int64_t begun = now();
        result = cu.cuMemAllocAsync(&at, BYTES, NULL);
        if (!result) result = cu.cuMemFreeAsync(at, NULL);
        if (i >= 0) times[i] = now() - begun;
    }
    cu.cuCtxSynchronize();
    return result;
}

static CUresult time_launch(int count)
{
    CUmodule module;
    CUresult result = CUDA_SUCCESS;
    if (!kernel) result = cu.cuModuleLoadData(&module, image);
    if (!kernel && !result) result = cu.cuModuleGetFunction(&kernel, module, kernel_name);
    for (int i = -WARM; i < count && !result; i++) {
        if ((i + WARM) % BATCH == 0) cu.cuCtxSynchronize();
        int64_t begun = now();
        result = cu.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
        if (i >= 0) times[i] = now() - begun;
    }
    cu.cuCtxSynchronize();
    return result;
}

/* Start a new process for each time. The process writes its time to a pipe. */
static CUresult time_init(int count)
{
    for (int i = 0; i < count; i++) {
        int ends[2], status;
        if (pipe(ends)) return CUDA_ERROR_OPERATING_SYSTEM;
        pid_t child = fork();
        if (child == 0) {
            dup2(ends[1], 1);
            execl(self, self, "init", (char *)NULL);
            _exit(127);
        }
        close(ends[1]);
        bool good = child > 0 && read(ends[0], &times[i], sizeof times[i]) == sizeof times[i];
        close(ends[0]);
        if (child < 0 || waitpid(child, &status, 0) != child || status || !good) return CUDA_ERROR_NOT_INITIALIZED;
    }
    return CUDA_SUCCESS;
}

static int be_init(void)
{
    int64_t begun = now();
    if (!load() || cu.cuInit(0)) return 1;
    int64_t took = now() - begun;
    return write(1, &took, sizeof took) != sizeof took;
}

static const struct {
    const char *name;
    timed *run;
} table[] = {{"alloc", time_alloc}, {"free", time_free},     {"async", time_async},
             {"info", time_info},   {"launch", time_launch}, {"init", time_init}};

static void serve(const char *name, int count)
{
    CUresult result = CUDA_ERROR_NOT_FOUND;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name) && count > 0 && count <= MOST) result = table[i].run(count);
    if (result) printf("- %s", name_of(result));
    for (int i = 0; i < count && !result; i++) printf("%s%" PRId64, i ? " " : "", times[i]);
    putchar('\n');
    fflush(stdout);
}

int main(int argc, char **argv)
{
    CUcontext context;
    char name[32];
    int count;
    self = argv[0];
    if (argc > 1 && !strcmp(argv[1], "init")) return be_init();
    bool good = load() && !cu.cuInit(0) && !cu.cuDevicePrimaryCtxRetain(&context, 0) && !cu.cuCtxSetCurrent(context);
    puts(good ? "ready" : "- no context");
    fflush(stdout);
    while (good && scanf("%31s %d", name, &count) == 2) serve(name, count);
    return !good;
}
