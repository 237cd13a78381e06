/*
 * memory.c: what takes device memory with a pointer, a handle or a context of its own. Owns nothing; admit.c asks.
 */
#include <errno.h>

#include "books.h"
#include "gate.h"

/* -- memory: on the device of the current context. Without one the driver says so; nothing is asked. */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
{
    __typeof__(&cuMemAlloc_v2) driver = REAL(cuMemAlloc_v2);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_current(&device)) return driver(dptr, bytesize);
    struct admission admission = fgpu_admission(device, bytesize, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, bytesize);
    return fgpu_settled(&admission, result, result ? 0 : *dptr);
}

/* NVML shows nothing of managed memory, touched or not: admission and witness are all that ever know of it. */
EXPORT CUresult cuMemAllocManaged(CUdeviceptr *dptr, size_t bytesize, unsigned int flags)
{
    __typeof__(&cuMemAllocManaged) driver = REAL(cuMemAllocManaged);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_current(&device)) return driver(dptr, bytesize, flags);
    struct admission admission = fgpu_admission(device, bytesize, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, bytesize, flags);
    if (result == CUDA_SUCCESS) fgpu_managed_made(*dptr);
    return fgpu_settled(&admission, result, result ? 0 : *dptr);
}

/* Rows are padded to what the hardware reads at once, so the bytes are more than the caller's product. */
EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr *dptr, size_t *pPitch, size_t WidthInBytes, size_t Height,
                                   unsigned int ElementSizeBytes)
{
    __typeof__(&cuMemAllocPitch_v2) driver = REAL(cuMemAllocPitch_v2);
    CUdevice device;
    uint64_t row, bytes;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !WidthInBytes || !Height || !fgpu_current(&device))
        return driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    if (__builtin_add_overflow(WidthInBytes, SMALL_ALIGNMENT - 1, &row) ||
        __builtin_mul_overflow(row & ~(SMALL_ALIGNMENT - 1), Height, &bytes))
        bytes = TOO_MUCH;
    struct admission admission = fgpu_admission(device, bytes, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    return fgpu_settled(&admission, result, result ? 0 : *dptr);
}

/* The 32-bit forms of old have no witness: what they take is committed at once, and stays so until
 * the device's last context ends. */
EXPORT CUresult cuMemAlloc(CUdeviceptr_v1 *dptr, unsigned int bytesize)
{
    __typeof__(&cuMemAlloc) driver = REAL(cuMemAlloc);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_current(&device)) return driver(dptr, bytesize);
    struct admission admission = fgpu_admission(device, bytesize, FGPU_POOL);
    if (admission.refusal) return admission.refusal;
    return fgpu_settled(&admission, driver(dptr, bytesize), 0);
}

EXPORT CUresult cuMemAllocPitch(CUdeviceptr_v1 *dptr, unsigned int *pPitch, unsigned int WidthInBytes,
                                unsigned int Height, unsigned int ElementSizeBytes)
{
    __typeof__(&cuMemAllocPitch) driver = REAL(cuMemAllocPitch);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !WidthInBytes || !Height || !fgpu_current(&device))
        return driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    uint64_t row = (WidthInBytes + SMALL_ALIGNMENT - 1) & ~(SMALL_ALIGNMENT - 1);
    struct admission admission = fgpu_admission(device, row * Height, FGPU_POOL);
    if (admission.refusal) return admission.refusal;
    return fgpu_settled(&admission, driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes), 0);
}

/* Physical memory of its own, mapped later: charged here, whether it is ever mapped or not. */
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags)
{
    __typeof__(&cuMemCreate) driver = REAL(cuMemCreate);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!handle || !size || !prop || prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return driver(handle, size, prop, flags);
    struct admission admission = fgpu_admission(prop->location.id, size > FGPU_MOST_BYTES ? TOO_MUCH : size, FGPU_VMM);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(handle, size, prop, flags);
    return fgpu_settled(&admission, result, result ? 0 : *handle);
}

#define NO_HANDLE 0x100ULL

/* -- contexts: half a GiB each on a large device. How much is the kernel's to know, hence 0 bytes. */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    __typeof__(&cuDevicePrimaryCtxRetain) driver = REAL(cuDevicePrimaryCtxRetain);
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned flags;
    int active = 0;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult known = state ? state(dev, &flags, &active) : CUDA_SUCCESS;
    /* One more reference takes nothing; a device that does not exist is the driver's to refuse. */
    if (!pctx || known != CUDA_SUCCESS || active) {
        if (active) fgpu_pools_seen(dev);
        CUresult result = driver(pctx, dev);
        if (result == CUDA_SUCCESS && pctx) fgpu_primary_seen(dev, *pctx);
        return result;
    }
    struct admission admission = fgpu_admission(dev, 0, FGPU_CONTEXT);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(pctx, dev);
    if (result == CUDA_SUCCESS) fgpu_pools_seen(dev);
    if (result == CUDA_SUCCESS) fgpu_primary_seen(dev, *pctx);
    fgpu_settled(&admission, result, result ? 0 : (uint64_t)*pctx);
    if (result == CUDA_SUCCESS) fgpu_primary_made(dev, (uint64_t)*pctx);
    return result;
}

/* A device that does not exist is the driver's to refuse, in every link: not ours to hide behind out-of-memory. */
#define CREATE_CONTEXT(name, device, ...)                                                                              \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!pctx || !fgpu_is_device(device)) return driver(__VA_ARGS__);                                              \
        struct admission admission = fgpu_admission(device, 0, FGPU_CONTEXT);                                          \
        if (admission.refusal) return admission.refusal;                                                               \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        if (result == CUDA_SUCCESS) fgpu_pools_seen(device);                                                           \
        if (result == CUDA_SUCCESS) fgpu_context_made(*pctx);                                                          \
        return fgpu_settled(&admission, result, result ? 0 : (uint64_t)*pctx);                                         \
    } while (0)

EXPORT CUresult cuCtxCreate(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate, dev, pctx, flags, dev);
}

EXPORT CUresult cuCtxCreate_v2(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v2, dev, pctx, flags, dev);
}

EXPORT CUresult cuCtxCreate_v3(CUcontext *pctx, CUexecAffinityParam *paramsArray, int numParams, unsigned int flags,
                               CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v3, dev, pctx, paramsArray, numParams, flags, dev);
}

EXPORT CUresult cuCtxCreate_v4(CUcontext *pctx, CUctxCreateParams *ctxCreateParams, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v4, dev, pctx, ctxCreateParams, flags, dev);
}

/* It keeps the device's primary context, and makes that where there is none. No witness sees it: NVML charges it. */
EXPORT CUresult cuGreenCtxCreate(CUgreenCtx *phCtx, CUdevResourceDesc desc, CUdevice dev, unsigned int flags)
{
    __typeof__(&cuGreenCtxCreate) driver = REAL(cuGreenCtxCreate);
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned set;
    int active = 0;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult known = state ? state(dev, &set, &active) : CUDA_SUCCESS;
    struct admission admission = {.index = -1};
    if (known == CUDA_SUCCESS && !active && fgpu_is_device(dev)) {
        admission = fgpu_admission(dev, 0, FGPU_CONTEXT);
        if (admission.refusal) return admission.refusal;
    }
    CUresult result = driver(phCtx, desc, dev, flags);
    if (result == CUDA_SUCCESS) fgpu_pools_seen(dev);
    /* The primary context has no handle yet that we were told. */
    fgpu_settled_books(&admission, result, NO_HANDLE + (uint64_t)dev);
    if (result == CUDA_SUCCESS) fgpu_primary_made(dev, NO_HANDLE + (uint64_t)dev);
    return result;
}
