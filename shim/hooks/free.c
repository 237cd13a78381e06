/*
 * free.c: calls that free device memory. If the kernel keeps the ledger, probes report the frees of memory that this
 * process allocated. For these, the hooks serve the standalone ledger, and do nothing for it while it is empty. Owns
 * whether this process has imported handles.
 *
 * The entry of the memory is removed from the table before the driver can return the same handle to another thread.
 */
#include "core/hook_table.h"
#include "hooks/async_memory.h"
#include "standalone/standalone.h"

/* Memory of a pool that this call frees leaves the pool at once. No probe reports the pool's size after that, so the
 * pool is measured. */
EXPORT CUresult cuMemFree_v2(CUdeviceptr dptr)
{
    __typeof__(&cuMemFree_v2) driver = REAL(cuMemFree_v2);
    struct fgpu_grant grant;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    bool held = fgpu_has_grants() && fgpu_grant_take(FGPU_SPACE_POINTER, dptr, &grant);
    struct pool *pool = fgpu_take_pool_of(dptr);
    CUresult result = driver(dptr);
    if (held) fgpu_grant_ended(&grant, result);
    if (!dptr || result != CUDA_SUCCESS) return result;
    if (pool)
        fgpu_pool_trimmed(pool);
    else
        fgpu_pools_unsettled(); /* memory of no pool, or of a pool that has lost its note */
    return result;
}

#define FREES(name, type)                                                                                              \
    EXPORT CUresult name(type handle)                                                                                  \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct fgpu_grant grant;                                                                                       \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        bool held = fgpu_has_grants() && fgpu_grant_take(FGPU_SPACE_POINTER, (uint64_t)handle, &grant);                \
        CUresult result = driver(handle);                                                                              \
        if (held) fgpu_grant_ended(&grant, result);                                                                    \
        return result;                                                                                                 \
    }
FREES(cuArrayDestroy, CUarray)
FREES(cuMipmappedArrayDestroy, CUmipmappedArray)

/* -- memory that other processes have allocated. When they have freed it, NVML shows it for the process that has opened
 * it, and the agent charges it there. No probe reports when that process frees it. */

static _Atomic bool imports;

EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *osHandle,
                                               CUmemAllocationHandleType shHandleType)
{
    __typeof__(&cuMemImportFromShareableHandle) driver = REAL(cuMemImportFromShareableHandle);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(handle, osHandle, shHandleType);
    if (result == CUDA_SUCCESS) atomic_store_explicit(&imports, true, memory_order_relaxed);
    return result;
}

static CUresult may_end_import(CUresult result)
{
    if (result == CUDA_SUCCESS && atomic_load_explicit(&imports, memory_order_relaxed)) fgpu_freed_unseen();
    return result;
}

EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr dptr)
{
    __typeof__(&cuIpcCloseMemHandle) driver = REAL(cuIpcCloseMemHandle);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(dptr);
    if (result == CUDA_SUCCESS) fgpu_freed_unseen();
    return result;
}

/* -- mapped memory: after (create; map; release) it exists until the unmap */

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
{
    __typeof__(&cuMemRelease) driver = REAL(cuMemRelease);
    struct fgpu_grant memory;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    bool held = fgpu_has_grants() && fgpu_grant_drop(handle, &memory);
    CUresult result = driver(handle);
    if (held) fgpu_grant_dropped(&memory, result);
    return may_end_import(result);
}

EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *addr)
{
    __typeof__(&cuMemRetainAllocationHandle) driver = REAL(cuMemRetainAllocationHandle);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(handle, addr);
    if (result == CUDA_SUCCESS && handle && fgpu_has_grants()) fgpu_grant_refer(*handle);
    return result;
}

EXPORT CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long flags)
{
    __typeof__(&cuMemMap) driver = REAL(cuMemMap);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(ptr, size, offset, handle, flags);
    if (result == CUDA_SUCCESS && fgpu_has_grants() && fgpu_grant_refer(handle))
        fgpu_grant_keep(
            (struct fgpu_grant){.handle = ptr, .bytes = size, .owner = handle, .space = FGPU_SPACE_MAPPING});
    return result;
}

/* An unmap may cover several mappings, one after the other; usually it covers one. */
EXPORT CUresult cuMemUnmap(CUdeviceptr ptr, size_t size)
{
    __typeof__(&cuMemUnmap) driver = REAL(cuMemUnmap);
    struct fgpu_grant mapping, memory;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    bool held = fgpu_has_grants() && fgpu_grant_take(FGPU_SPACE_MAPPING, ptr, &mapping);
    bool refers = held && fgpu_grant_drop(mapping.owner, &memory);
    CUresult result = driver(ptr, size);
    if (refers) fgpu_grant_dropped(&memory, result);
    if (held && result) fgpu_grant_keep(mapping);
    if (!held || result) return may_end_import(result);
    for (CUdeviceptr at = ptr + mapping.bytes; at - ptr < size; at += mapping.bytes) {
        if (!fgpu_grant_take(FGPU_SPACE_MAPPING, at, &mapping)) break;
        if (fgpu_grant_drop(mapping.owner, &memory)) fgpu_grant_dropped(&memory, CUDA_SUCCESS);
    }
    return result;
}
