/* Managed memory: where a program would like it to be. It takes nothing from a device here, wherever it is. */
#include "cuda_state.h"

static bool is_place(CUmemLocation location)
{
    switch (location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
        return sim_is_device(location.id);
    case CU_MEM_LOCATION_TYPE_HOST:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT:
        return true;
    default:
        return false;
    }
}

/* The first forms name a device, or the host by a number that is none. */
static CUmemLocation place_of(CUdevice device)
{
    CUmemLocation location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    if (device == CU_DEVICE_CPU) location = (CUmemLocation){.type = CU_MEM_LOCATION_TYPE_HOST};
    return location;
}

static bool is_managed(CUdeviceptr at, size_t count)
{
    const struct range *range = range_find(at);
    return range && range->kind == RANGE_MANAGED && count && count <= range->size - (at - range->start);
}

static CUresult prefetch(CUdeviceptr at, size_t count, CUmemLocation location, unsigned flags, CUstream handle,
                         bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (flags || !is_managed(at, count)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (location.type == CU_MEM_LOCATION_TYPE_INVALID) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!is_place(location)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (!stream->capture) return sim_leave(CUDA_SUCCESS);
    capture_break(stream->capture);
    return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

TWICE(_ptsz, cuMemPrefetchAsync, (CUdeviceptr devPtr, size_t count, CUdevice dstDevice, CUstream hStream),
      prefetch(devPtr, count, place_of(dstDevice), 0, hStream, per_thread))
TWICE(_ptsz, cuMemPrefetchAsync_v2,
      (CUdeviceptr devPtr, size_t count, CUmemLocation location, unsigned int flags, CUstream hStream),
      prefetch(devPtr, count, location, flags, hStream, per_thread))

static CUresult advise(CUdeviceptr at, size_t count, CUmem_advise advice, CUmemLocation location)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    bool names_place = advice >= CU_MEM_ADVISE_SET_PREFERRED_LOCATION;
    if (advice < CU_MEM_ADVISE_SET_READ_MOSTLY || advice > CU_MEM_ADVISE_UNSET_ACCESSED_BY || !is_managed(at, count))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(names_place && !is_place(location) ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS);
}

API cuMemAdvise(CUdeviceptr devPtr, size_t count, CUmem_advise advice, CUdevice device)
{
    return advise(devPtr, count, advice, place_of(device));
}

API cuMemAdvise_v2(CUdeviceptr devPtr, size_t count, CUmem_advise advice, CUmemLocation location)
{
    return advise(devPtr, count, advice, location);
}
