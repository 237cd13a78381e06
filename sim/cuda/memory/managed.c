/* Managed memory: prefetches, advice (which has no effect), and the devices that have its granules. A granule that was
 * used on a device, or prefetched to it, takes memory there until it is freed, also after a prefetch to the host. */
#include "cuda/memory/memory.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

_Static_assert(SIM_MAX_DEVICES <= 16, "a bit for each in struct range's places");

static uint64_t resident[SIM_MAX_DEVICES];

/* Returns false if the device has no room. The memory then stays on the host, where devices can use it too. */
static bool set_resident(int device, uint64_t bytes)
{
    struct sim_request request = {.device = (uint32_t)device, .bytes = bytes};
    if (bytes == resident[device]) return true;
    if (sim_ask(SIM_RESIDENT, request, NULL, 0) != SIM_OK) return false;
    resident[device] = bytes;
    return true;
}

static uint64_t count_places(const struct range *range, size_t first, size_t end, int device)
{
    uint64_t n = 0;
    for (size_t i = first; i < end; i++) n += range->places[i] >> device & 1;
    return n;
}

static void move_to(struct range *range, uintptr_t at, size_t size, int device)
{
    size_t first = (at - range->start) / GRANULE, end = granules(at + size - range->start) / GRANULE;
    if (!range->places) range->places = calloc(range->span / GRANULE, sizeof *range->places);
    if (!range->places) return;
    uint64_t missing = end - first - count_places(range, first, end, device);
    if (!set_resident(device, resident[device] + missing * GRANULE)) return;
    for (size_t i = first; i < end; i++) range->places[i] |= (uint16_t)(1u << device);
}

void managed_touch(struct range *range, uintptr_t at, size_t size)
{
    const struct context *context = context_current();
    if (range->kind == RANGE_MANAGED && size) move_to(range, at, size, context ? context->device : range->device);
}

void managed_drop(struct range *range)
{
    for (int device = 0; range->places && device < (int)driver.n_devices; device++)
        set_resident(device, resident[device] - count_places(range, 0, range->span / GRANULE, device) * GRANULE);
    free(range->places);
    range_drop(range);
}

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

/* The first versions name a device, or the host by a number that is no device. */
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
    if (stream->capture) {
        capture_break(stream->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    /* A prefetch to the host does nothing, because a granule stays on its device. */
    if (location.type == CU_MEM_LOCATION_TYPE_DEVICE) move_to(range_find(at), at, count, location.id);
    return sim_leave(CUDA_SUCCESS);
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
