/*
 * pools.c: calls that create, destroy, trim or choose a memory pool. Owns nothing.
 */
#include "account/pool.h"

EXPORT CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *poolProps)
{
    __typeof__(&cuMemPoolCreate) driver = REAL(cuMemPoolCreate);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(pool, poolProps);
    if (result != CUDA_SUCCESS || !pool || !poolProps) return result;
    switch ((int)poolProps->location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
        fgpu_pool_enter(*pool, poolProps->location.id);
        break;
    case CU_MEM_LOCATION_TYPE_HOST:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT:
        fgpu_pool_enter(*pool, FGPU_HOST_POOL);
        break;
    default: /* managed memory without a location: it belongs to the device that is current when the program first
                allocates from the pool */
        break;
    }
    return result;
}

EXPORT CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
    __typeof__(&cuMemPoolDestroy) driver = REAL(cuMemPoolDestroy);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    struct pool *entry = pool ? fgpu_pool_find(pool) : NULL;
    uint64_t used = entry ? fgpu_pool_in_use(entry) : 0;
    if (entry) atomic_store(&entry->handle, FGPU_NO_HANDLE); /* before another pool can get the handle */
    CUresult result = driver(pool);
    if (result == CUDA_SUCCESS && entry) {
        fgpu_pool_destroyed(entry, fgpu_pool_rest(atomic_load(&entry->ordinal)), used);
        atomic_store(&entry->generation, 0);
    }
    if (entry) atomic_store_explicit(&entry->handle, result ? (uint64_t)pool : 0, memory_order_release);
    if (result == CUDA_SUCCESS) fgpu_forget_current();
    return result;
}

EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t minBytesToKeep)
{
    __typeof__(&cuMemPoolTrimTo) driver = REAL(cuMemPoolTrimTo);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(pool, minBytesToKeep);
    struct pool *entry = result == CUDA_SUCCESS && pool ? fgpu_pool_find(pool) : NULL;
    if (entry) fgpu_pool_trimmed(entry);
    return result;
}

EXPORT CUresult cuDeviceSetMemPool(CUdevice dev, CUmemoryPool pool)
{
    __typeof__(&cuDeviceSetMemPool) driver = REAL(cuDeviceSetMemPool);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(dev, pool);
    fgpu_forget_current();
    return result;
}

EXPORT CUresult cuMemSetMemPool(CUmemLocation *location, CUmemAllocationType type, CUmemoryPool pool)
{
    __typeof__(&cuMemSetMemPool) driver = REAL(cuMemSetMemPool);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(location, type, pool);
    fgpu_forget_current();
    return result;
}
