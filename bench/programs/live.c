/* live: a tenant that watches its own limit. The program allocates memory until less than 16 MiB is free, and prints
 * "ready", or "- WHY". For each line `TOTAL ADMITTED` of stdin, it calls cuMemGetInfo and requests 16 MiB in turn,
 * until the total is TOTAL and the request is admitted (1) or refused (0). It frees admitted memory at once. The answer
 * has the times (CLOCK_MONOTONIC, ns) at which each condition was first true, or is "- late" after 10 s. The program
 * does not use fgpu. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define MIB (1ull << 20)
#define PIECE (2 * MIB)
#define ASKED (16 * MIB)
#define NAP_NS 20000 /* the machine may have only two processors, and the agent needs one of them */
#define LATE_NS 10000000000ll

static CUresult (*mem_info)(size_t *, size_t *);
static CUresult (*mem_alloc)(CUdeviceptr *, size_t);
static CUresult (*mem_free)(CUdeviceptr);

static void fail(const char *what, int result)
{
    printf("- %s: %d\n", what, result);
    exit(1);
}

static void *find(void *driver, const char *name)
{
    void *found = dlsym(driver, name);
    if (!found) fail(name, 0);
    return found;
}

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void prepare(void)
{
    CUresult (*init)(unsigned), (*retain)(CUcontext *, CUdevice), (*set)(CUcontext);
    CUcontext context;
    CUresult result;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) fail("no libcuda.so.1", 0);
    init = find(driver, "cuInit");
    retain = find(driver, "cuDevicePrimaryCtxRetain");
    set = find(driver, "cuCtxSetCurrent");
    mem_info = find(driver, "cuMemGetInfo_v2");
    mem_alloc = find(driver, "cuMemAlloc_v2");
    mem_free = find(driver, "cuMemFree_v2");
    if ((result = init(0)) || (result = retain(&context, 0)) || (result = set(context))) fail("a context", result);
}

static void fill(void)
{
    size_t free, total;
    CUdeviceptr at;
    CUresult result;
    for (;;) {
        if ((result = mem_info(&free, &total))) fail("cuMemGetInfo", result);
        if (free < ASKED) return;
        if ((result = mem_alloc(&at, PIECE))) fail("cuMemAlloc", result);
    }
}

static bool is_admitted(void)
{
    CUdeviceptr at;
    CUresult result = mem_alloc(&at, ASKED);
    if (result && result != CUDA_ERROR_OUT_OF_MEMORY) fail("cuMemAlloc", result);
    if (!result) mem_free(at);
    return !result;
}

static void watch(size_t wanted, bool admitted)
{
    const struct timespec nap = {0, NAP_NS};
    const int64_t late = now() + LATE_NS;
    int64_t seen = 0, held = 0;
    size_t free, total;
    while (!seen || !held) {
        if (!seen && !mem_info(&free, &total) && total == wanted) seen = now();
        if (!held && is_admitted() == admitted) held = now();
        if (now() > late) {
            puts("- late");
            return;
        }
        nanosleep(&nap, NULL);
    }
    printf("%" PRId64 " %" PRId64 "\n", seen, held);
}

int main(void)
{
    size_t wanted;
    int admitted;
    setvbuf(stdout, NULL, _IOLBF, 0);
    prepare();
    fill();
    puts("ready");
    while (scanf("%zu %d", &wanted, &admitted) == 2) watch(wanted, admitted);
    return 0;
}
