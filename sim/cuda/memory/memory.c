/* cuMemAlloc and its relatives. Each makes one round trip to the server, as each call of the real driver makes one call
 * into the kernel. */
#include "cuda/memory/memory.h"
#include "cuda/core/capture_state.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

#define PITCH 512u
#define MAX_ALLOCATION (1ull << 46) /* more than any address space; the sums below cannot wrap */

/* Sends the request to the server first, with the bytes of a new granule if the allocation needs one. A refusal
 * therefore changes nothing here. */
static CUresult allocate_small(struct context *context, size_t size, struct range **out)
{
    struct block *block;
    uint64_t physical = block_has_room(context, size) ? 0 : GRANULE;
    CUresult result = sim_take(context, context->device, SIM_BLOCK, physical, size);
    if (result) return result;
    uintptr_t start = block_carve(context, size, &block);
    struct range *range = start ? range_new(context, start, size) : NULL;
    if (!range) {
        if (start) block_return(context, block, start, size);
        sim_give(context, context->device, SIM_BLOCK, physical, size);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    range->block = block;
    *out = range;
    return CUDA_SUCCESS;
}

/* Above 1 MiB no granule is shared: 1 MiB + 1 byte takes 2 MiB. */
static CUresult allocate_large(struct context *context, size_t size, struct range **out)
{
    size_t physical = granules(size);
    CUresult result = sim_take(context, context->device, SIM_BLOCK, physical, size);
    if (result) return result;
    uintptr_t start = space_reserve(physical, GRANULE, false);
    struct range *range = start ? range_new(context, start, size) : NULL;
    if (!range) {
        if (start) space_return(start, physical);
        sim_give(context, context->device, SIM_BLOCK, physical, size);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    range->span = range->physical = physical;
    *out = range;
    return CUDA_SUCCESS;
}

static CUresult free_device(struct range *range)
{
    struct context *context = range->context;
    size_t physical = range->physical, size = range->size;
    const uint64_t *of = range->block ? range->block->key : range->key;
    const uint64_t key[2] = {of[0], of[1]};
    /* Only this function detects which free empties a shared granule. That free returns the granule's bytes to the
     * server. */
    if (range->block && block_return(context, range->block, range->start, size)) physical = GRANULE;
    range_drop(range);
    /* Memory that other processes may have opened is not freed here. */
    bool left = physical && (key[0] || key[1]);
    sim_give(context, context->device, SIM_BLOCK, left ? 0 : physical, size);
    if (left) share_drop(key);
    return CUDA_SUCCESS;
}

CUresult memory_allocate(struct context *context, size_t size, CUdeviceptr *out)
{
    struct range *range;
    if (size > MAX_ALLOCATION) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = size <= SMALL_MAX ? allocate_small(context, size, &range) : allocate_large(context, size, &range);
    if (result) return result;
    range->kind = RANGE_DEVICE;
    range->free = free_device;
    *out = range->start;
    return CUDA_SUCCESS;
}

static CUresult free_managed(struct range *range)
{
    sim_give(range->context, range->device, SIM_MANAGED, 0, range->size);
    managed_drop(range);
    return CUDA_SUCCESS;
}

/* The real driver returns the same error for a pointer inside an allocation, a freed pointer and other kinds of
 * memory. */
CUresult memory_free(uintptr_t at)
{
    struct range *range = range_find(at);
    if (!range || range->start != at || !range->free) return CUDA_ERROR_INVALID_VALUE;
    return range->free(range);
}

void memory_settle(const struct context *context, const struct stream *stream)
{
    for (struct context *c = driver.contexts; c; c = c->next)
        for (struct range *range = c->ranges, *next; range; range = next) {
            next = range->next;
            if (range->going_in == context && (!stream || range->going == stream)) memory_free(range->start);
        }
}

/* Enters with a current context, if no capture forbids the call. */
static CUresult enter_unsafe(struct context **context)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    result = capture_permits();
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

/* If the result cannot be written, the program gets its signal here, before anything is taken or locked. The program
 * may leave the call by siglongjmp and continue. */
static void touch(volatile CUdeviceptr *out)
{
    if (out) *out = *out;
}

API cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
{
    struct context *context;
    touch(dptr);
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!dptr || !bytesize) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(memory_allocate(context, bytesize, dptr));
}

API cuMemAllocPitch_v2(CUdeviceptr *dptr, size_t *pPitch, size_t width, size_t height, unsigned int element)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!dptr || !pPitch || !width || !height || (element != 4 && element != 8 && element != 16))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    size_t pitch, size;
    if (width > MAX_ALLOCATION) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    pitch = (width + PITCH - 1) / PITCH * PITCH;
    if (__builtin_mul_overflow(pitch, height, &size)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = memory_allocate(context, size, dptr);
    if (!result) *pPitch = pitch;
    return sim_leave(result);
}

API cuMemAllocManaged(CUdeviceptr *dptr, size_t bytesize, unsigned int flags)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!dptr || !bytesize || (flags != CU_MEM_ATTACH_GLOBAL && flags != CU_MEM_ATTACH_HOST))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    /* The device needs no room yet: pages move to it when they are used, and no process's row shows them. */
    result = bytesize > MAX_ALLOCATION ? CUDA_ERROR_OUT_OF_MEMORY
                                       : sim_take(context, context->device, SIM_MANAGED, 0, bytesize);
    if (result) return sim_leave(result);
    size_t span = granules(bytesize);
    uintptr_t start = space_reserve(span, GRANULE, true);
    struct range *range = start ? range_new(context, start, bytesize) : NULL;
    if (!range) {
        if (start) space_return(start, span);
        sim_give(context, context->device, SIM_MANAGED, 0, bytesize);
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    range->kind = RANGE_MANAGED;
    range->free = free_managed;
    range->span = span;
    *dptr = start;
    return sim_leave(CUDA_SUCCESS);
}

/* Needs no current context: the range of the pointer has its context. */
API cuMemFree_v2(CUdeviceptr dptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    result = capture_permits();
    if (result || !dptr) return sim_leave(result);
    const struct range *range = range_find(dptr);
    /* The real driver waits for the work that may still use the memory. */
    if (range && range->start == dptr) stream_wait(range->context, &range->context->legacy);
    return sim_leave(memory_free(dptr));
}

/* Returns the size that the program requested, not that of the granules. Memory of a graph is found between a launch
 * and a free. */
API cuMemGetAddressRange_v2(CUdeviceptr *pbase, size_t *psize, CUdeviceptr dptr)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    const struct range *range = range_find(dptr);
    if (!range || range->kind == RANGE_REGISTERED || (range->kind == RANGE_GRAPH && !range->is_live))
        return sim_leave(CUDA_ERROR_NOT_FOUND);
    if (pbase) *pbase = range->start;
    if (psize) *psize = range->size;
    return sim_leave(CUDA_SUCCESS);
}

/* Pinned host memory. It takes no device memory, but later calls must find its pointers. */

/* Unlike a request for device memory, a request for zero bytes succeeds. It returns NULL. */
static CUresult host_alloc(void **pp, size_t size, unsigned flags)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!pp || flags & ~7u || size > MAX_ALLOCATION) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *pp = NULL;
    if (!size) return sim_leave(CUDA_SUCCESS);
    size_t span = (size + 4095) / 4096 * 4096;
    uintptr_t start = space_reserve(span, 4096, true);
    struct range *range = start ? range_new(context, start, size) : NULL;
    if (!range) {
        if (start) space_return(start, span);
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    range->kind = RANGE_HOST;
    range->span = span;
    range->access = flags;
    *pp = (void *)start;
    return sim_leave(CUDA_SUCCESS);
}

API cuMemAllocHost_v2(void **pp, size_t bytesize) { return host_alloc(pp, bytesize, 0); }

API cuMemHostAlloc(void **pp, size_t bytesize, unsigned int flags) { return host_alloc(pp, bytesize, flags); }

API cuMemFreeHost(void *p)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!p) return sim_leave(CUDA_SUCCESS);
    struct range *range = range_find((uintptr_t)p);
    if (!range || range->kind != RANGE_HOST || range->start != (uintptr_t)p) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    range_drop(range);
    return sim_leave(CUDA_SUCCESS);
}

API cuMemHostRegister_v2(void *p, size_t bytesize, unsigned int flags)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!p || !bytesize || flags & ~15u || (uintptr_t)p + bytesize < bytesize)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct range *range = range_new(context, (uintptr_t)p, bytesize);
    if (!range) return sim_leave(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    range->kind = RANGE_REGISTERED;
    result = growth_register(context, bytesize);
    if (result) range_drop(range);
    return sim_leave(result);
}

API cuMemHostUnregister(void *p)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    struct range *range = range_find((uintptr_t)p);
    if (!range || range->kind != RANGE_REGISTERED || range->start != (uintptr_t)p)
        return sim_leave(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    growth_unregister(range->context, range->size);
    range_drop(range);
    return sim_leave(CUDA_SUCCESS);
}

API cuMemHostGetDevicePointer_v2(CUdeviceptr *pdptr, void *p, unsigned int flags)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct range *range = range_find((uintptr_t)p);
    if (!pdptr || flags || !range || (range->kind != RANGE_HOST && range->kind != RANGE_REGISTERED))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *pdptr = (uintptr_t)p;
    return sim_leave(CUDA_SUCCESS);
}

API cuMemHostGetFlags(unsigned int *pFlags, void *p)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct range *range = range_find((uintptr_t)p);
    if (!pFlags || !range || range->kind != RANGE_HOST) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *pFlags = range->access | CU_MEMHOSTALLOC_DEVICEMAP;
    return sim_leave(CUDA_SUCCESS);
}
