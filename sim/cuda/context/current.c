/* Queries of the current context, and waiting for it. */
#include "cuda/async/pool.h"
#include "cuda/core/gate.h"
#include "cuda/stream/stream.h"

API cuCtxGetDevice(CUdevice *device)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct context *context = context_current(); /* a destroyed context still has its device */
    if (!context) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    if (!device) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *device = context->device;
    return sim_leave(CUDA_SUCCESS);
}

/* Since CUDA 13 some queries name the context. NULL still means the current one. */
static CUresult enter_named(CUcontext ctx, struct context **context)
{
    if (!ctx) return sim_enter(context);
    CUresult result = sim_enter_init();
    if (result) return result;
    *context = (struct context *)ctx;
    if (!context_is_known(*context)) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    return (*context)->alive ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_CONTEXT_IS_DESTROYED);
}

API cuCtxGetDevice_v2(CUdevice *device, CUcontext ctx)
{
    struct context *context;
    CUresult result = enter_named(ctx, &context);
    if (result) return result;
    if (!device) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *device = context->device;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxGetFlags(unsigned int *flags)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *flags = context->flags;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxGetId(CUcontext ctx, unsigned long long *ctxId)
{
    struct context *context;
    CUresult result = enter_named(ctx, &context);
    if (result) return result;
    if (!ctxId) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *ctxId = context->id;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxGetApiVersion(CUcontext ctx, unsigned int *version)
{
    struct context *context;
    CUresult result = enter_named(ctx, &context);
    if (result) return result;
    if (!version) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *version = 3020; /* the only version that is left */
    return sim_leave(CUDA_SUCCESS);
}

static CUresult synchronize(struct context *context)
{
    CUresult result = capture_permits_waiting(context);
    if (result) return sim_leave(result);
    queues_wait(context);
    if (context->alive) context_wait(context, context_done_ns(context));
    if (!context->alive) return sim_leave(CUDA_ERROR_CONTEXT_IS_DESTROYED);
    pools_settle(context, NULL);
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxSynchronize(void)
{
    struct context *context;
    gate_read_completion();
    CUresult result = sim_enter(&context);
    return result ? result : synchronize(context);
}

API cuCtxSynchronize_v2(CUcontext ctx)
{
    struct context *context;
    gate_read_completion();
    CUresult result = enter_named(ctx, &context);
    return result ? result : synchronize(context);
}

API cuCtxGetLimit(size_t *value, CUlimit limit)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!value) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (limit >= N_LIMITS || limit == CU_LIMIT_DEV_RUNTIME_SYNC_DEPTH) return sim_leave(CUDA_ERROR_UNSUPPORTED_LIMIT);
    *value = context->limits[limit];
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxSetLimit(CUlimit limit, size_t value)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (limit >= N_LIMITS) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (limit == CU_LIMIT_DEV_RUNTIME_SYNC_DEPTH) return sim_leave(CUDA_ERROR_UNSUPPORTED_LIMIT);
    result = capture_permits();
    return sim_leave(result ? result : growth_limit(context, limit, value));
}

API cuCtxGetStreamPriorityRange(int *leastPriority, int *greatestPriority)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (leastPriority) *leastPriority = 0;
    if (greatestPriority) *greatestPriority = -5;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxGetCacheConfig(CUfunc_cache *config)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!config) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *config = CU_FUNC_CACHE_PREFER_NONE;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxSetCacheConfig(CUfunc_cache config)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    return sim_leave((unsigned)config > CU_FUNC_CACHE_PREFER_EQUAL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS);
}

API cuMemGetInfo_v2(size_t *free, size_t *total)
{
    struct context *context;
    struct sim_memory memory;
    if (gate_is_parked()) return CUDA_ERROR_OPERATING_SYSTEM;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (sim_ask(SIM_MEMORY, (struct sim_request){.device = (uint32_t)context->device}, &memory, sizeof memory))
        return sim_leave(CUDA_ERROR_UNKNOWN);
    if (total) *total = memory.total - memory.reserved;
    if (free) *free = memory.total - memory.reserved - memory.used;
    return sim_leave(CUDA_SUCCESS);
}
