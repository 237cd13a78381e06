/* Forms from before CUDA 3.2, with device pointers of 32 bits, which the real library exports to this day. They are for
 * contexts of their own kind; and where every address has more bits, such a context has no memory to give. */
#include "cuda_state.h"

static CUresult enter_old(struct context **context)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    return (*context)->api_version < 3020 ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_CONTEXT);
}

static CUresult allocate(struct context *context, size_t size, CUdeviceptr_v1 *out)
{
    CUdeviceptr at;
    CUresult result = memory_allocate(context, size, &at);
    if (result) return result;
    if (at > UINT32_MAX) {
        memory_free(at);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *out = (CUdeviceptr_v1)at;
    return CUDA_SUCCESS;
}

API cuMemAlloc(CUdeviceptr_v1 *dptr, unsigned int bytesize)
{
    struct context *context;
    CUresult result = enter_old(&context);
    if (result) return result;
    if (!dptr || !bytesize) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = capture_permits();
    return sim_leave(result ? result : allocate(context, bytesize, dptr));
}

API cuMemFree(CUdeviceptr_v1 dptr)
{
    struct context *context;
    CUresult result = enter_old(&context);
    if (result) return result;
    return sim_leave(dptr ? memory_free(dptr) : CUDA_SUCCESS);
}

static unsigned clip(uint64_t bytes) { return bytes > UINT32_MAX ? UINT32_MAX : (unsigned)bytes; }

API cuMemGetInfo(unsigned int *free, unsigned int *total)
{
    struct context *context;
    struct sim_memory memory;
    CUresult result = enter_old(&context);
    if (result) return result;
    if (sim_ask(SIM_MEMORY, (struct sim_request){.device = (uint32_t)context->device}, &memory, sizeof memory))
        return sim_leave(CUDA_ERROR_UNKNOWN);
    if (total) *total = clip(memory.total - memory.reserved);
    if (free) *free = clip(memory.total - memory.reserved - memory.used);
    return sim_leave(CUDA_SUCCESS);
}
