/* Virtual memory management, pools, streams, events and kernels. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

#define GRANULE (2 * MIB)

static CUmemAllocationProp pinned(void)
{
    CUmemAllocationProp prop;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    return prop;
}

static void check_create(void)
{
    CUmemGenericAllocationHandle handle = 0;
    CUmemAllocationProp prop = pinned(), bad = pinned();
    CUdeviceptr ptr = 0;
    size_t granularity = 0;
    TRY("granularity", cuMemGetAllocationGranularity, &granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    say("granularity.value", (long long)granularity);
    TRY("granularity.null", cuMemGetAllocationGranularity, NULL, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    TRY("create.odd", cuMemCreate, &handle, MIB, &prop, 0);
    TRY("create.0", cuMemCreate, &handle, 0, &prop, 0);
    TRY("create.null", cuMemCreate, NULL, GRANULE, &prop, 0);
    TRY("create.prop.null", cuMemCreate, &handle, GRANULE, NULL, 0);
    TRY("create.flags", cuMemCreate, &handle, GRANULE, &prop, 1);
    TRY("create.huge", cuMemCreate, &handle, (size_t)1 << 44, &prop, 0);
    bad.location.id = 99;
    TRY("create.device", cuMemCreate, &handle, GRANULE, &bad, 0);
    bad.location.id = 0;
    bad.type = CU_MEM_ALLOCATION_TYPE_INVALID;
    TRY("create.type", cuMemCreate, &handle, GRANULE, &bad, 0);
    TRY("reserve.odd", cuMemAddressReserve, &ptr, MIB, 0, 0, 0);
    TRY("reserve.0", cuMemAddressReserve, &ptr, 0, 0, 0, 0);
    TRY("reserve.alignment", cuMemAddressReserve, &ptr, GRANULE, 3, 0, 0);
    TRY("reserve.null", cuMemAddressReserve, NULL, GRANULE, 0, 0, 0);
    TRY("reserve.flags", cuMemAddressReserve, &ptr, GRANULE, 0, 0, 1);
    TRY("release.unknown", cuMemRelease, 0);
    TRY("addressfree.unknown", cuMemAddressFree, 0x1000, GRANULE);
}

static void check_mapping(void)
{
    CUmemGenericAllocationHandle handle = 0, again = 0;
    CUmemAllocationProp prop = pinned();
    CUmemAccessDesc access = {{.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr ptr = 0, base = 0;
    size_t size = 0;
    char byte = 1;
    mark();
    TRY("create", cuMemCreate, &handle, 2 * GRANULE, &prop, 0);
    say("create.mib", taken_mib());
    TRY("reserve", cuMemAddressReserve, &ptr, 4 * GRANULE, 0, 0, 0);
    TRY("map.offset", cuMemMap, ptr, GRANULE, GRANULE, handle, 0);
    TRY("map.toolong", cuMemMap, ptr, 4 * GRANULE, 0, handle, 0);
    TRY("map.odd", cuMemMap, ptr + 4096, 2 * GRANULE, 0, handle, 0);
    TRY("map.handle", cuMemMap, ptr, 2 * GRANULE, 0, 0, 0);
    TRY("map", cuMemMap, ptr, 2 * GRANULE, 0, handle, 0);
    TRY("map.twice", cuMemMap, ptr, 2 * GRANULE, 0, handle, 0);
    TRY("copy.noaccess", cuMemcpyHtoD_v2, ptr, &byte, 1);
    TRY("access.null", cuMemSetAccess, ptr, 2 * GRANULE, NULL, 1);
    TRY("access.count0", cuMemSetAccess, ptr, 2 * GRANULE, &access, 0);
    TRY("access.part", cuMemSetAccess, ptr, GRANULE, &access, 1);
    TRY("access.unmapped", cuMemSetAccess, ptr + 2 * GRANULE, GRANULE, &access, 1);
    TRY("access", cuMemSetAccess, ptr, 2 * GRANULE, &access, 1);
    TRY("copy", cuMemcpyHtoD_v2, ptr, &byte, 1);
    TRY("map.alias", cuMemMap, ptr + 2 * GRANULE, 2 * GRANULE, 0, handle, 0);
    CALL(cuMemSetAccess, ptr + 2 * GRANULE, 2 * GRANULE, &access, 1);
    byte = 0;
    CALL(cuMemcpyDtoH_v2, &byte, ptr + 2 * GRANULE, 1);
    say("alias.same", byte);
    TRY("range", cuMemGetAddressRange_v2, &base, &size, ptr + 5);
    say("range.size", (long long)size);
    TRY("free", cuMemFree_v2, ptr);
    TRY("retain", cuMemRetainAllocationHandle, &again, (void *)(uintptr_t)(ptr + 9));
    say("retain.same", again == handle);
    TRY("retain.unknown", cuMemRetainAllocationHandle, &again, (void *)0x1000);
    TRY("release", cuMemRelease, handle);
    TRY("release.second", cuMemRelease, handle);
    TRY("release.third", cuMemRelease, handle);
    say("released.mib", taken_mib());
    TRY("addressfree.mapped", cuMemAddressFree, ptr, 4 * GRANULE);
    TRY("unmap.part", cuMemUnmap, ptr, GRANULE);
    TRY("unmap", cuMemUnmap, ptr, 2 * GRANULE);
    say("unmap.one.mib", taken_mib());
    TRY("unmap.twice", cuMemUnmap, ptr, 2 * GRANULE);
    TRY("unmap.alias", cuMemUnmap, ptr + 2 * GRANULE, 2 * GRANULE);
    say("unmap.mib", taken_mib());
    TRY("addressfree.size", cuMemAddressFree, ptr, GRANULE);
    TRY("addressfree", cuMemAddressFree, ptr, 4 * GRANULE);
    TRY("addressfree.twice", cuMemAddressFree, ptr, 4 * GRANULE);
}

void check_vmm(void)
{
    section("vmm");
    use_primary();
    check_create();
    check_mapping();
    /* Does it need a current context? */
    CUcontext context = NULL;
    CUmemGenericAllocationHandle handle = 0;
    CUmemAllocationProp prop = pinned();
    CALL(cuCtxPopCurrent_v2, &context);
    TRY("nocontext.create", cuMemCreate, &handle, GRANULE, &prop, 0);
    TRY("nocontext.release", cuMemRelease, handle);
    CALL(cuCtxPushCurrent_v2, context);
}

static long long reserved_mib(CUmemoryPool pool)
{
    cuuint64_t value = 0;
    CALL(cuMemPoolGetAttribute, pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &value);
    return (long long)(value / MIB);
}

void check_pools(void)
{
    section("pool");
    use_primary();
    static const size_t sizes[] = {MIB, MIB, 10 * MIB, 100 * MIB};
    CUdeviceptr ptrs[4];
    CUmemoryPool pool = NULL, other = NULL;
    CUmemPoolProps props;
    cuuint64_t used = 0, threshold = 64 * MIB;
    TRY("default", cuDeviceGetDefaultMemPool, &pool, 0);
    TRY("current", cuDeviceGetMemPool, &other, 0);
    say("current.isdefault", pool == other);
    for (int i = 0; i < 4; i++) {
        CALL(cuMemAllocAsync, &ptrs[i], sizes[i], NULL);
        say("reserved.mib", reserved_mib(pool));
    }
    CALL(cuMemPoolGetAttribute, pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &used);
    say("used", (long long)used);
    for (int i = 0; i < 4; i++) TRY("free", cuMemFreeAsync, ptrs[i], NULL);
    say("freed.reserved.mib", reserved_mib(pool));
    CALL(cuStreamSynchronize, NULL);
    say("synchronized.reserved.mib", reserved_mib(pool));
    CALL(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold);
    CALL(cuMemAllocAsync, &ptrs[0], 100 * MIB, NULL);
    CALL(cuMemFree_v2, ptrs[0]);
    CALL(cuCtxSynchronize);
    say("threshold.reserved.mib", reserved_mib(pool));
    TRY("trim", cuMemPoolTrimTo, pool, 0);
    say("trimmed.reserved.mib", reserved_mib(pool));
    threshold = 0;
    CALL(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold);
    CALL(cuMemAllocAsync, &ptrs[0], 1000, NULL);
    CALL(cuMemPoolGetAttribute, pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &used);
    say("small.used", (long long)used);
    CALL(cuMemFreeAsync, ptrs[0], NULL);
    CALL(cuCtxSynchronize);
    TRY("alloc.0", cuMemAllocAsync, &ptrs[0], 0, NULL);
    TRY("alloc.null", cuMemAllocAsync, NULL, 10, NULL);
    TRY("alloc.huge", cuMemAllocAsync, &ptrs[0], (size_t)1 << 44, NULL);
    TRY("free.0", cuMemFreeAsync, 0, NULL);
    TRY("free.unknown", cuMemFreeAsync, 0x1000, NULL);
    TRY("destroy.default", cuMemPoolDestroy, pool);
    memset(&props, 0, sizeof props);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    TRY("create", cuMemPoolCreate, &other, &props);
    TRY("create.null", cuMemPoolCreate, NULL, &props);
    TRY("alloc", cuMemAllocFromPoolAsync, &ptrs[0], MIB, other, NULL);
    TRY("free", cuMemFreeAsync, ptrs[0], NULL);
    TRY("destroy", cuMemPoolDestroy, other);
}

/* A pool is destroyed before its allocation: its memory is freed with the allocation, in spite of the threshold. */
void check_destroyed_pools(void)
{
    section("destroyed");
    use_primary();
    CUdeviceptr ptr = 0;
    CUmemoryPool pool = NULL;
    CUmemPoolProps props;
    cuuint64_t threshold = 128 * MIB;
    memset(&props, 0, sizeof props);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    mark();
    TRY("create", cuMemPoolCreate, &pool, &props);
    TRY("threshold", cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold);
    TRY("alloc", cuMemAllocFromPoolAsync, &ptr, 40 * MIB, pool, NULL);
    say("alloc.mib", taken_mib());
    TRY("destroy", cuMemPoolDestroy, pool);
    say("destroy.mib", taken_mib());
    TRY("free", cuMemFreeAsync, ptr, NULL);
    CALL(cuStreamSynchronize, NULL);
    say("free.mib", taken_mib());
}

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static void check_kernels(void)
{
    CUmodule module = NULL;
    CUfunction function = NULL;
    TRY("module", cuModuleLoadData, &module, image);
    TRY("module.null", cuModuleLoadData, &module, NULL);
    TRY("function", cuModuleGetFunction, &function, module, "spin_0us");
    TRY("function.null", cuModuleGetFunction, NULL, module, "spin_0us");
    TRY("function.name.null", cuModuleGetFunction, &function, module, NULL);
    TRY("launch", cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
    TRY("launch.grid0", cuLaunchKernel, function, 0, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
    TRY("launch.block0", cuLaunchKernel, function, 1, 1, 1, 0, 1, 1, 0, NULL, NULL, NULL);
    TRY("launch.block1025", cuLaunchKernel, function, 1, 1, 1, 1025, 1, 1, 0, NULL, NULL, NULL);
    TRY("launch.null", cuLaunchKernel, NULL, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
    TRY("synchronize", cuCtxSynchronize);
    TRY("unload", cuModuleUnload, module);
}

void check_streams(void)
{
    section("stream");
    use_primary();
    CUstream stream = NULL;
    CUevent start = NULL, end = NULL, untimed = NULL;
    CUstreamCaptureStatus status = 77;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    int priority = 77;
    unsigned flags = 77;
    float ms = -1;
    TRY("create.null", cuStreamCreate, NULL, 0);
    TRY("create.flags", cuStreamCreate, &stream, 99);
    TRY("create.priority", cuStreamCreateWithPriority, &stream, CU_STREAM_NON_BLOCKING, -99);
    TRY("priority", cuStreamGetPriority, stream, &priority);
    say("priority.value", priority);
    TRY("flags", cuStreamGetFlags, stream, &flags);
    say("flags.value", flags);
    TRY("query", cuStreamQuery, stream);
    TRY("query.default", cuStreamQuery, NULL);
    TRY("capturing", cuStreamIsCapturing, stream, &status);
    say("capturing.value", status);
    TRY("capturing.null", cuStreamIsCapturing, stream, NULL);
    TRY("capturing.default", cuStreamIsCapturing, NULL, &status);
    TRY("mode", cuThreadExchangeStreamCaptureMode, &mode);
    say("mode.before", mode);
    TRY("mode.back", cuThreadExchangeStreamCaptureMode, &mode);
    say("mode.after", mode);
    mode = 77;
    TRY("mode.bad", cuThreadExchangeStreamCaptureMode, &mode);
    TRY("event", cuEventCreate, &start, 0);
    TRY("event.end", cuEventCreate, &end, CU_EVENT_BLOCKING_SYNC);
    TRY("event.untimed", cuEventCreate, &untimed, CU_EVENT_DISABLE_TIMING);
    TRY("event.null", cuEventCreate, NULL, 0);
    TRY("event.flags", cuEventCreate, &end, 0x100);
    TRY("event.interprocess", cuEventCreate, &end, CU_EVENT_INTERPROCESS);
    TRY("event.query.unrecorded", cuEventQuery, start);
    TRY("event.synchronize.unrecorded", cuEventSynchronize, start);
    TRY("event.elapsed.unrecorded", cuEventElapsedTime, &ms, start, end);
    TRY("event.record", cuEventRecord, start, stream);
    TRY("event.record.end", cuEventRecord, end, stream);
    TRY("event.record.untimed", cuEventRecord, untimed, stream);
    TRY("event.synchronize", cuEventSynchronize, end);
    TRY("event.elapsed", cuEventElapsedTime, &ms, start, end);
    say("event.elapsed.sane", ms >= 0 && ms < 100);
    TRY("event.elapsed.untimed", cuEventElapsedTime, &ms, start, untimed);
    TRY("event.elapsed.null", cuEventElapsedTime, NULL, start, end);
    TRY("event.wait", cuStreamWaitEvent, stream, end, 0);
    TRY("event.wait.flags", cuStreamWaitEvent, stream, end, 99);
    TRY("event.destroy", cuEventDestroy_v2, start);
    TRY("event.destroy.null", cuEventDestroy_v2, NULL);
    TRY("destroy", cuStreamDestroy_v2, stream);
    TRY("destroy.default", cuStreamDestroy_v2, NULL);
    check_kernels();
}
