/* Sparse arrays, and arrays of compressed formats. Sparse arrays take no memory. Memory that is mapped into one stays
 * on the device when its handle is released, and is then in no process's row of NVML. */
#define _GNU_SOURCE
#include "conformance.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define POOL (1024 * MIB)

static nvmlDevice_t device;
static long long row_before;

static long long row_mib(void)
{
    static nvmlProcessInfo_t rows[64];
    unsigned n = sizeof rows / sizeof *rows;
    long long bytes = 0;
    if (CALL(nvmlDeviceGetComputeRunningProcesses_v3, device, &n, rows)) return -1;
    for (unsigned i = 0; i < n; i++)
        if ((pid_t)rows[i].pid == getpid()) bytes += (long long)rows[i].usedGpuMemory;
    return bytes / (long long)MIB;
}

/* Prints the memory that was taken, on the device and in the row of this process. */
static void show(const char *what)
{
    char name[48];
    snprintf(name, sizeof name, "%s.mib", what);
    say(name, taken_mib());
    snprintf(name, sizeof name, "%s.row.mib", what);
    say(name, row_mib() - row_before);
}

static void map(const char *what, CUarray array, CUmemOperationType operation, CUmemGenericAllocationHandle handle)
{
    CUarrayMapInfo info;
    memset(&info, 0, sizeof info);
    info.resourceType = CU_RESOURCE_TYPE_ARRAY;
    info.resource.array = array;
    info.subresourceType = CU_ARRAY_SPARSE_SUBRESOURCE_TYPE_SPARSE_LEVEL;
    info.subresource.sparseLevel.extentWidth = 16384;
    info.subresource.sparseLevel.extentHeight = 4096;
    info.subresource.sparseLevel.extentDepth = 1;
    info.memOperationType = operation;
    info.memHandleType = CU_MEM_HANDLE_TYPE_GENERIC;
    info.memHandle.memHandle = handle;
    info.deviceBitMask = 1;
    TRY(what, cuMemMapArrayAsync, &info, 1, NULL);
    CALL(cuStreamSynchronize, NULL);
    show(what);
}

void check_sparse(void)
{
    CUDA_ARRAY3D_DESCRIPTOR shape = {
        .Width = 16384, .Height = 16384, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 4, .Flags = CUDA_ARRAY3D_SPARSE};
    CUmemAllocationProp kind = {.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    CUDA_ARRAY_SPARSE_PROPERTIES tile;
    CUmemGenericAllocationHandle handle = 0;
    CUarray array = NULL;
    section("sparse");
    use_primary();
    CALL(nvmlInit_v2);
    CALL(nvmlDeviceGetHandleByIndex_v2, 0, &device);
    mark();
    row_before = row_mib();
    TRY("create", cuArray3DCreate_v2, &array, &shape);
    show("create");
    memset(&tile, 0, sizeof tile);
    TRY("properties", cuArrayGetSparseProperties, &tile, array);
    say("tile.width", tile.tileExtent.width);
    say("tile.height", tile.tileExtent.height);
    say("tile.depth", tile.tileExtent.depth);
    kind.allocFlags.usage = CU_MEM_CREATE_USAGE_TILE_POOL;
    TRY("pool", cuMemCreate, &handle, POOL, &kind, 0);
    show("pool");
    map("map", array, CU_MEM_OPERATION_TYPE_MAP, handle);
    TRY("release", cuMemRelease, handle);
    show("release");
    map("unmap", array, CU_MEM_OPERATION_TYPE_UNMAP, 0);
    TRY("destroy", cuArrayDestroy, array);
    show("destroy");
    CALL(nvmlShutdown);
}

void check_formats(void)
{
    static const struct {
        const char *name;
        CUarray_format format;
        unsigned channels;
    } kinds[] = {{"bc1", CU_AD_FORMAT_BC1_UNORM, 4},
                 {"bc4", CU_AD_FORMAT_BC4_UNORM, 1},
                 {"bc7", CU_AD_FORMAT_BC7_UNORM, 4},
                 {"nv12", CU_AD_FORMAT_NV12, 3}};
    char name[48];
    section("formats");
    use_primary();
    mark();
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        CUDA_ARRAY3D_DESCRIPTOR shape = {
            .Width = 16384, .Height = 16384, .Format = kinds[i].format, .NumChannels = kinds[i].channels};
        CUarray array = NULL;
        TRY(kinds[i].name, cuArray3DCreate_v2, &array, &shape);
        snprintf(name, sizeof name, "%s.mib", kinds[i].name);
        say(name, taken_mib());
        if (array) CALL(cuArrayDestroy, array);
        snprintf(name, sizeof name, "%s.destroyed.mib", kinds[i].name);
        say(name, taken_mib());
    }
}
