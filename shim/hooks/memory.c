/*
 * memory.c: calls that allocate device memory with a pointer or a handle of its own. Owns nothing; reclaim.c requests
 * the admission.
 */
#include "account/account.h"

/* -- memory: on the device of the current context. Without a context the driver returns the error, and no admission is
 * requested. */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
{
    __typeof__(&cuMemAlloc_v2) driver = REAL(cuMemAlloc_v2);
    struct fgpu_request request;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_request_here(&request, bytesize, FGPU_MEMORY, dptr)) return driver(dptr, bytesize);
    while (fgpu_attempt(&request)) request.result = driver(dptr, bytesize);
    return request.result;
}

/* NVML never shows managed memory, touched or not: only admission and the probes count it. The device does not bound
 * it, so a failed call is not repeated. */
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

/* Rows are padded for the hardware, so the bytes are more than the product of the caller's arguments. */
EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr *dptr, size_t *pPitch, size_t WidthInBytes, size_t Height,
                                   unsigned int ElementSizeBytes)
{
    __typeof__(&cuMemAllocPitch_v2) driver = REAL(cuMemAllocPitch_v2);
    struct fgpu_request request;
    uint64_t row, bytes;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (__builtin_add_overflow(WidthInBytes, SMALL_ALIGNMENT - 1, &row) ||
        __builtin_mul_overflow(row & ~(SMALL_ALIGNMENT - 1), Height, &bytes))
        bytes = TOO_MUCH;
    if (!dptr || !WidthInBytes || !Height || !fgpu_request_here(&request, bytes, FGPU_MEMORY, dptr))
        return driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    while (fgpu_attempt(&request)) request.result = driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    return request.result;
}

/* The 32-bit calls have no probe: their bytes are committed at once, and stay charged until the process exits. */
EXPORT CUresult cuMemAlloc(CUdeviceptr_v1 *dptr, unsigned int bytesize)
{
    __typeof__(&cuMemAlloc) driver = REAL(cuMemAlloc);
    struct fgpu_request request;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_request_here(&request, bytesize, FGPU_POOL, NULL)) return driver(dptr, bytesize);
    while (fgpu_attempt(&request)) request.result = driver(dptr, bytesize);
    return request.result;
}

EXPORT CUresult cuMemAllocPitch(CUdeviceptr_v1 *dptr, unsigned int *pPitch, unsigned int WidthInBytes,
                                unsigned int Height, unsigned int ElementSizeBytes)
{
    __typeof__(&cuMemAllocPitch) driver = REAL(cuMemAllocPitch);
    struct fgpu_request request;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    uint64_t row = (WidthInBytes + SMALL_ALIGNMENT - 1) & ~(SMALL_ALIGNMENT - 1);
    if (!dptr || !WidthInBytes || !Height || !fgpu_request_here(&request, row * Height, FGPU_POOL, NULL))
        return driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    while (fgpu_attempt(&request)) request.result = driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    return request.result;
}

/* The memory is mapped later. It is charged now, even if it is never mapped. The driver refuses a device that does not
 * exist. */
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags)
{
    __typeof__(&cuMemCreate) driver = REAL(cuMemCreate);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!handle || !size || !prop || prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        !fgpu_is_device(prop->location.id))
        return driver(handle, size, prop, flags);
    uint64_t bytes = size > FGPU_MOST_BYTES ? TOO_MUCH : size;
    struct fgpu_request request = {.ordinal = prop->location.id, .bytes = bytes, .kind = FGPU_VMM, .handle = handle};
    while (fgpu_attempt(&request)) request.result = driver(handle, size, prop, flags);
    return request.result;
}
