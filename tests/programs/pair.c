/* pair [proc] LIBRARY...: a CUDA program that loads several drivers, each with RTLD_LOCAL. It reads commands from
 * stdin, one a line: "WHAT DRIVER NUMBER". For each it prints "ok ..." or the number of the driver's error. With `proc`
 * it gets functions from cuGetProcAddress_v2. It uses nothing of fgpu. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_DRIVERS 5
#define MOST_POINTERS 4096

static struct driver {
    void *library;
    CUcontext context;
    CUdeviceptr taken[MOST_POINTERS];
    unsigned count;
} drivers[MOST_DRIVERS];

static int by_lookup; /* functions come from cuGetProcAddress_v2 */

/* Finds a function by its exported name. The name for cuGetProcAddress has no version. */
static void *find(struct driver *d, const char *name)
{
    CUresult (*get)(const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *);
    char asked[64];
    void *found = NULL;
    snprintf(asked, sizeof asked, "%s", name);
    if (strstr(asked, "_v2")) *strstr(asked, "_v2") = 0;
    if (!by_lookup) return dlsym(d->library, name);
    get = dlsym(d->library, "cuGetProcAddress_v2");
    return get && !get(asked, &found, 12000, CU_GET_PROC_ADDRESS_DEFAULT, NULL) ? found : NULL;
}

#define CALL(d, name, ...) ((__typeof__(&name))find(d, #name))(__VA_ARGS__)

static CUresult make_current(struct driver *d)
{
    CUresult result = CUDA_SUCCESS;
    if (!d->context && !(result = CALL(d, cuInit, 0))) result = CALL(d, cuDevicePrimaryCtxRetain, &d->context, 0);
    if (!result) result = CALL(d, cuCtxSetCurrent, d->context);
    return result;
}

static CUresult take(struct driver *d, const char *how, size_t bytes, CUdeviceptr *at)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUDA_ARRAY_DESCRIPTOR shape = {bytes / 4096 / 4, 4096, CU_AD_FORMAT_FLOAT, 1};
    size_t pitch;
    if (!strcmp(how, "managed")) return CALL(d, cuMemAllocManaged, at, bytes, CU_MEM_ATTACH_GLOBAL);
    if (!strcmp(how, "pitch")) return CALL(d, cuMemAllocPitch_v2, at, &pitch, 4096, bytes / 4096, 4);
    if (!strcmp(how, "create")) return CALL(d, cuMemCreate, (CUmemGenericAllocationHandle *)at, bytes, &prop, 0);
    if (!strcmp(how, "array")) return CALL(d, cuArrayCreate_v2, (CUarray *)at, &shape);
    if (!strcmp(how, "async")) return CALL(d, cuMemAllocAsync, at, bytes, NULL);
    return CALL(d, cuMemAlloc_v2, at, bytes);
}

/* Allocates pieces until a call fails. Prints their number and the result of that call. */
static void fill(struct driver *d, const char *how, size_t bytes)
{
    unsigned before = d->count;
    CUresult result = CUDA_SUCCESS;
    while (d->count < MOST_POINTERS && !(result = take(d, how, bytes, &d->taken[d->count]))) d->count++;
    printf("ok %u %d\n", d->count - before, (int)result);
}

static void serve(struct driver *d, const char *what, size_t number)
{
    size_t available = 0, total = 0;
    CUresult result = strcmp(what, "leave") ? make_current(d) : CUDA_SUCCESS;
    if (!strncmp(what, "fill.", 5) && !result) return fill(d, what + 5, number);
    if (!strcmp(what, "drop") && !result)
        for (; number-- && d->count && !result;) result = CALL(d, cuMemFree_v2, d->taken[--d->count]);
    if (!strcmp(what, "info") && !result) result = CALL(d, cuMemGetInfo_v2, &available, &total);
    if (!strcmp(what, "leave")) {
        result = CALL(d, cuDevicePrimaryCtxRelease_v2, 0);
        d->context = NULL;
        d->count = 0;
    }
    if (result)
        printf("%d\n", (int)result);
    else
        printf("ok %zu %zu\n", available, total);
}

int main(int argc, char **argv)
{
    char line[128], what[32];
    unsigned which;
    size_t number;
    by_lookup = argc > 1 && !strcmp(argv[1], "proc");
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 0; i + 1 + by_lookup < argc && i < MOST_DRIVERS; i++)
        if (!(drivers[i].library = dlopen(argv[i + 1 + by_lookup], RTLD_NOW | RTLD_LOCAL))) return puts(dlerror()), 1;
    printf("ready %d\n", getpid());
    while (fgets(line, sizeof line, stdin))
        if (sscanf(line, "%31s %u %zu", what, &which, &number) == 3 && which < MOST_DRIVERS)
            serve(&drivers[which], what, number);
    return 0;
}
