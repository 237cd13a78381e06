/* charged_arrays: contexts that a former function ends, arrays of compressed and planar formats, memory that a sparse
 * array or a multicast object keeps after the release of its handle, and a fragmented pool. See charged.h. */
#include "charged.h"

/* Call a former function, which cuda.h replaces by a macro: `name` is the exported symbol. */
static void call_former(const char *name, CUdevice device, CUcontext context)
{
    CUresult result = CUDA_ERROR_NOT_FOUND;
    void *function = driver_symbol(name);
    if (function)
        result = context ? ((CUresult(*)(CUcontext))function)(context) : ((CUresult(*)(CUdevice))function)(device);
    if (result) note("%s returns %d", name, (int)result);
}

static void former(void)
{
    CUcontext context;
    CUresult (*make)(CUcontext *, unsigned, CUdevice) =
        (CUresult(*)(CUcontext *, unsigned, CUdevice))driver_symbol("cuCtxCreate_v2");
    role('A', getpid());
    begin();
    for (int round = 0; round < 3; round++) {
        allocate(SIZE);
        mark("2 GiB in the primary context");
        call_former("cuDevicePrimaryCtxRelease", 0, NULL);
        mark("released by the former function");
        CU(cuDevicePrimaryCtxRetain, &context, 0);
        CU(cuCtxSetCurrent, context);
    }
    allocate(SIZE);
    call_former("cuDevicePrimaryCtxReset", 0, NULL);
    mark("reset by the former function");
    if (!make || make(&context, 0, 0)) note("no second context");
    allocate(SIZE);
    mark("2 GiB in a second context");
    call_former("cuCtxDestroy", 0, context);
    mark("destroyed by the former function");
    finish();
}

static void formats(void)
{
    static const struct {
        const char *name;
        CUarray_format format;
        unsigned channels;
    } kinds[] = {{"BC1", CU_AD_FORMAT_BC1_UNORM, 4},
                 {"BC4", CU_AD_FORMAT_BC4_UNORM, 1},
                 {"BC7", CU_AD_FORMAT_BC7_UNORM, 4},
                 {"NV12", CU_AD_FORMAT_NV12, 3},
                 {"float4", CU_AD_FORMAT_FLOAT, 4}};
    char text[80];
    role('A', getpid());
    begin();
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        CUDA_ARRAY3D_DESCRIPTOR shape = {
            .Width = 16384, .Height = 16384, .Format = kinds[i].format, .NumChannels = kinds[i].channels};
        CUarray array = NULL;
        CU(cuArray3DCreate, &array, &shape);
        snprintf(text, sizeof text, "an array of 16384 x 16384 %s", kinds[i].name);
        mark(text);
        if (array) CU(cuArrayDestroy, array);
        mark("destroyed");
    }
    finish();
}

static void sparse(void)
{
    CUDA_ARRAY3D_DESCRIPTOR shape = {
        .Width = 16384, .Height = 16384, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 4, .Flags = CUDA_ARRAY3D_SPARSE};
    CUDA_ARRAY_SPARSE_PROPERTIES tile;
    CUmemGenericAllocationHandle handle = 0;
    CUmemAllocationProp kind;
    CUarrayMapInfo info;
    CUarray array = NULL;
    role('A', getpid());
    begin();
    CU(cuArray3DCreate, &array, &shape);
    mark("a sparse array of 4 GiB");
    memset(&tile, 0, sizeof tile);
    if (array) CU(cuArrayGetSparseProperties, &tile, array);
    note("tile of %u x %u x %u", tile.tileExtent.width, tile.tileExtent.height, tile.tileExtent.depth);
    memset(&kind, 0, sizeof kind);
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    kind.allocFlags.usage = CU_MEM_CREATE_USAGE_TILE_POOL;
    CU(cuMemCreate, &handle, GIB, &kind, 0);
    mark("a tile pool of 1 GiB");
    memset(&info, 0, sizeof info);
    info.resourceType = CU_RESOURCE_TYPE_ARRAY;
    info.resource.array = array;
    info.subresourceType = CU_ARRAY_SPARSE_SUBRESOURCE_TYPE_SPARSE_LEVEL;
    info.subresource.sparseLevel.extentWidth = 16384;
    info.subresource.sparseLevel.extentHeight = 4096;
    info.subresource.sparseLevel.extentDepth = 1;
    info.memOperationType = CU_MEM_OPERATION_TYPE_MAP;
    info.memHandleType = CU_MEM_HANDLE_TYPE_GENERIC;
    info.memHandle.memHandle = handle;
    info.deviceBitMask = 1;
    CU(cuMemMapArrayAsync, &info, 1, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("mapped into the array");
    if (handle) CU(cuMemRelease, handle);
    mark("handle released");
    info.memOperationType = CU_MEM_OPERATION_TYPE_UNMAP;
    info.memHandle.memHandle = 0;
    CU(cuMemMapArrayAsync, &info, 1, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("unmapped from the array");
    if (array) CU(cuArrayDestroy, array);
    mark("array destroyed");
    finish();
}

static void multicast(void)
{
    CUmulticastObjectProp shape = {.numDevices = 1, .size = GIB};
    CUmemGenericAllocationHandle team = 0, handle = 0;
    int is_supported = 0;
    role('A', getpid());
    begin();
    CU(cuDeviceGetAttribute, &is_supported, CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, 0);
    note("multicast supported: %d", is_supported);
    if (CU(cuMulticastCreate, &team, &shape)) {
        shape.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        CU(cuMulticastCreate, &team, &shape);
    }
    if (team) CU(cuMulticastAddDevice, team, 0);
    mark("a multicast object of 1 GiB");
    handle = create(GIB, shape.handleTypes != 0);
    mark("memory of 1 GiB");
    if (team && handle) CU(cuMulticastBindMem, team, 0, handle, 0, GIB, 0);
    mark("bound");
    if (handle) CU(cuMemRelease, handle);
    mark("handle released");
    if (team) CU(cuMulticastUnbind, team, 0, 0, GIB);
    mark("unbound");
    if (team) CU(cuMemRelease, team);
    mark("multicast object released");
    finish();
}

/* 6 GiB of a pool in pieces, of which every other one is freed: a device has no piece for a request of 1 GiB. With a
 * limit of 8 GiB the pool may grow by 1 GiB, and not by 2 GiB. */
static void fragments(void)
{
    enum { COUNT = 4096 };
    static CUdeviceptr at[COUNT];
    CUdeviceptr large[2] = {0};
    CUmemoryPool pool = NULL;
    cuuint64_t all = ~(cuuint64_t)0;
    role('A', getpid());
    begin();
    CU(cuDeviceGetDefaultMemPool, &pool, 0);
    CU(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &all);
    for (int i = 0; i < COUNT; i++)
        if (CU(cuMemAllocAsync, &at[i], 3 * MIB / 2, NULL)) break;
    mark("6 GiB of a pool in pieces of 1.5 MiB");
    for (int i = 0; i < COUNT; i += 2) CU(cuMemFreeAsync, at[i], NULL);
    CU(cuMemAllocAsync, &large[0], GIB, NULL);
    mark("every other piece freed, 1 GiB allocated");
    CU(cuMemAllocAsync, &large[1], GIB, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("another 1 GiB requested");
    for (int i = 1; i < COUNT; i += 2) CU(cuMemFreeAsync, at[i], NULL);
    CU(cuStreamSynchronize, NULL);
    CU(cuMemPoolTrimTo, pool, 0);
    mark("all pieces freed, trimmed");
    finish();
}

int main(int argc, char **argv)
{
    static const struct scenario table[] = {
        {"former", former},       {"formats", formats},     {"sparse", sparse},
        {"multicast", multicast}, {"fragments", fragments}, {NULL, NULL},
    };
    return run_one(table, argc, argv);
}
