/* fill: allocates GPU memory step by step until the driver refuses, prints the number of bytes, and holds the memory.
 *
 *     fill [--step 4MiB] [--chunks N] [--hold SECONDS] [--pause MS] [--vmm]
 *
 * It contains nothing of fgpu: it finds the driver as frameworks do, by dlopen, dlsym and cuGetProcAddress. Exit
 * status: 0 refused with out-of-memory or all N chunks allocated, 1 any other error, 2 usage. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct {
    CUresult (*init)(unsigned);
    CUresult (*device_get)(CUdevice *, int);
    CUresult (*context_retain)(CUcontext *, CUdevice);
    CUresult (*context_set)(CUcontext);
    CUresult (*error_name)(CUresult, const char **);
    CUresult (*alloc)(CUdeviceptr *, size_t);
    CUresult (*granularity)(size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags);
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long);
    CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*access)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
} cu;

static struct {
    uint64_t step, chunks;
    double hold, pause;
    int vmm;
} want = {.step = 4 << 20, .chunks = UINT64_MAX};

static const char *name_of(CUresult result)
{
    const char *name = NULL;
    if (!cu.error_name || cu.error_name(result, &name) || !name) return "CUDA_ERROR_UNKNOWN";
    return name;
}

static void must(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS) return;
    printf("%s: %s\n", what, name_of(result));
    exit(1);
}

/* -- the driver's functions: three from dlsym, the others from cuGetProcAddress */

static void load(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) {
        printf("%s\n", dlerror());
        exit(1);
    }
    CUresult (*get)(const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *) =
        dlsym(lib, "cuGetProcAddress_v2");
    cu.init = dlsym(lib, "cuInit");
    cu.error_name = dlsym(lib, "cuGetErrorName");
    if (!get || !cu.init) {
        printf("libcuda.so.1 has no cuGetProcAddress_v2 or no cuInit\n");
        exit(1);
    }
    const struct {
        const char *name;
        void *slot;
    } table[] = {{"cuDeviceGet", &cu.device_get},
                 {"cuDevicePrimaryCtxRetain", &cu.context_retain},
                 {"cuCtxSetCurrent", &cu.context_set},
                 {"cuMemAlloc", &cu.alloc},
                 {"cuMemGetAllocationGranularity", &cu.granularity},
                 {"cuMemCreate", &cu.create},
                 {"cuMemAddressReserve", &cu.reserve},
                 {"cuMemMap", &cu.map},
                 {"cuMemRelease", &cu.release},
                 {"cuMemSetAccess", &cu.access}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        must(get(table[i].name, table[i].slot, 12000, CU_GET_PROC_ADDRESS_DEFAULT, NULL), table[i].name);
}

/* -- the two ways to allocate memory */

static CUresult take_plain(size_t bytes)
{
    CUdeviceptr at;
    return cu.alloc(&at, bytes);
}

/* Allocate as PyTorch's expandable segments and JAX do: release the handle, so that the mapping keeps the memory. */
static CUresult take_mapped(size_t bytes)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemAccessDesc access = {.location = prop.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    size_t grain;
    must(cu.granularity(&grain, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
    bytes = (bytes + grain - 1) / grain * grain;
    CUresult result = cu.create(&handle, bytes, &prop, 0);
    if (result) return result;
    must(cu.reserve(&at, bytes, 0, 0, 0), "cuMemAddressReserve");
    must(cu.map(at, bytes, 0, handle, 0), "cuMemMap");
    must(cu.access(at, bytes, &access, 1), "cuMemSetAccess");
    must(cu.release(handle), "cuMemRelease");
    return CUDA_SUCCESS;
}

static void wait_for(double seconds)
{
    struct timespec left = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left) && errno == EINTR) {
    }
}

static CUresult fill(uint64_t *admitted)
{
    for (uint64_t i = 0; i < want.chunks; i++) {
        CUresult result = want.vmm ? take_mapped(want.step) : take_plain(want.step);
        if (result) return result;
        *admitted += want.step;
        wait_for(want.pause);
    }
    return CUDA_SUCCESS;
}

/* -- the command line */

static void usage(void)
{
    fprintf(stderr, "usage: fill [--step 4MiB] [--chunks N] [--hold SECONDS] [--pause MS] [--vmm]\n");
    exit(2);
}

static double number(const char *text, char **unit)
{
    errno = 0;
    double value = text ? strtod(text, unit) : -1;
    if (!text || *unit == text || errno || !(value >= 0) || value > 1e15) usage();
    return value;
}

static double plain(const char *text)
{
    char *end;
    double value = number(text, &end);
    if (*end) usage();
    return value;
}

static uint64_t size(const char *text)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB"};
    char *unit;
    double value = number(text, &unit);
    for (unsigned i = 0; i < 4; i++)
        if (!strcmp(unit, units[i]) && value * (double)(1ull << (10 * i)) <= 1e15)
            return (uint64_t)(value * (double)(1ull << (10 * i)));
    usage();
    return 0;
}

static void options(char **arg)
{
    while (*++arg) {
        if (!strcmp(*arg, "--vmm"))
            want.vmm = 1;
        else if (!strcmp(*arg, "--step"))
            want.step = size(*++arg);
        else if (!strcmp(*arg, "--chunks"))
            want.chunks = (uint64_t)plain(*++arg);
        else if (!strcmp(*arg, "--hold"))
            want.hold = plain(*++arg);
        else if (!strcmp(*arg, "--pause"))
            want.pause = plain(*++arg) / 1000;
        else
            usage();
    }
}

int main(int argc, char **argv)
{
    CUdevice device;
    CUcontext context;
    uint64_t admitted = 0;
    (void)argc;
    options(argv);
    load();
    must(cu.init(0), "cuInit");
    must(cu.device_get(&device, 0), "cuDeviceGet");
    must(cu.context_retain(&context, device), "cuDevicePrimaryCtxRetain");
    must(cu.context_set(context), "cuCtxSetCurrent");
    CUresult result = fill(&admitted);
    printf("admitted %" PRIu64 " bytes", admitted);
    printf(result ? ", then %s\n" : "\n", name_of(result));
    fflush(stdout);
    wait_for(want.hold);
    return result != CUDA_SUCCESS && result != CUDA_ERROR_OUT_OF_MEMORY;
}
