/* Contexts that a program creates, and the beginning of every context. */
#include "cuda/context/context.h"

#include <stdlib.h>
#include <string.h>

static const size_t default_limits[N_LIMITS] = {
    [CU_LIMIT_STACK_SIZE] = 1024,
    [CU_LIMIT_PRINTF_FIFO_SIZE] = 8650752,
    [CU_LIMIT_MALLOC_HEAP_SIZE] = 8388608,
    [CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT] = 2048,
    [CU_LIMIT_MAX_L2_FETCH_GRANULARITY] = 64,
    [CU_LIMIT_PERSISTING_L2_CACHE_SIZE] = 11796480,
    [CU_LIMIT_SHMEM_SIZE] = 232448,
};

/* A primary context begins again after each reset. It then gets a new id, so that the server distinguishes it from the
 * old one. */
CUresult context_begin(struct context *context, int device, unsigned flags)
{
    context->id = ++driver.next_id;
    context->device = device;
    context->flags = flags;
    memcpy(context->limits, default_limits, sizeof default_limits);
    growth_begins(context);
    context->legacy = context->per_thread = (struct stream){.context = context};
    context->lost_ns = context->work_ns = context->expected_ns = context->known_ns = context->n_losses = 0;
    memset(context->engines_ns, 0, sizeof context->engines_ns);
    context->legacy.id = 1;
    context->per_thread.id = 2;
    CUresult result = sim_take(context, device, SIM_CONTEXT, 0, 0);
    context->alive = !result;
    return result;
}

static CUresult enter_create(const CUcontext *pctx, unsigned flags, CUdevice dev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!pctx || flags & ~(unsigned)CU_CTX_FLAGS_MASK) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_is_device(dev) ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_DEVICE);
}

/* Makes the new context current, as cuCtxCreate always does. */
static CUresult create(CUcontext *pctx, unsigned flags, CUdevice dev)
{
    CUresult result = enter_create(pctx, flags, dev);
    if (result) return result;
    struct context *context = thread_is_full() ? NULL : calloc(1, sizeof *context);
    if (!context) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = context_begin(context, dev, flags | CU_CTX_MAP_HOST);
    if (result) {
        free(context);
        return sim_leave(result);
    }
    /* Never removed: the handle of a destroyed context must be recognised, and must not name a later context. */
    context->next = driver.contexts;
    driver.contexts = context;
    thread_push(context);
    *pctx = (CUcontext)context;
    return sim_leave(CUDA_SUCCESS);
}

/* The first version creates a context for device pointers of 32 bits. All addresses are longer, so the call finds no
 * room. */
API cuCtxCreate(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    CUresult result = enter_create(pctx, flags, dev);
    return result ? result : sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
}

API cuCtxCreate_v2(CUcontext *pctx, unsigned int flags, CUdevice dev) { return create(pctx, flags, dev); }

API cuCtxCreate_v3(CUcontext *pctx, CUexecAffinityParam *params, int count, unsigned int flags, CUdevice dev)
{
    if (count < 0 || (count && !params)) return CUDA_ERROR_INVALID_VALUE;
    return count ? CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY : create(pctx, flags, dev);
}

API cuCtxCreate_v4(CUcontext *pctx, CUctxCreateParams *params, unsigned int flags, CUdevice dev)
{
    if (params && (params->execAffinityParams || params->cigParams)) return CUDA_ERROR_NOT_SUPPORTED;
    return create(pctx, flags, dev);
}

static CUresult destroy(CUcontext ctx)
{
    if (!ctx) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = sim_enter_init();
    if (result) return result;
    struct context *context = (struct context *)ctx;
    if (!context_is_known(context) || context->primary) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    if (!context->alive) return sim_leave(CUDA_ERROR_CONTEXT_IS_DESTROYED);
    if (context_current() == context) thread_pop();
    context_stop(context);
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxDestroy_v2(CUcontext ctx) { return destroy(ctx); }

API cuCtxDestroy(CUcontext ctx) { return destroy(ctx); }
