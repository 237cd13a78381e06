/* Contexts: the primary one of each device, those a program makes, and each thread's stack of them. */
#include "cuda_state.h"

#include <stdlib.h>
#include <string.h>

static __thread struct context *stack[MAX_STACK];
static __thread unsigned depth;

static const size_t default_limits[N_LIMITS] = {
    [CU_LIMIT_STACK_SIZE] = 1024,
    [CU_LIMIT_PRINTF_FIFO_SIZE] = 8650752,
    [CU_LIMIT_MALLOC_HEAP_SIZE] = 8388608,
    [CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT] = 2048,
    [CU_LIMIT_MAX_L2_FETCH_GRANULARITY] = 64,
    [CU_LIMIT_PERSISTING_L2_CACHE_SIZE] = 11796480,
    [CU_LIMIT_SHMEM_SIZE] = 232448,
};

/* May be a context that is gone: see sim_enter. */
struct context *context_current(void) { return depth ? stack[depth - 1] : NULL; }

/* Handles come from programs and may be anything; a pointer is not followed before it was found here. */
bool context_is_known(const struct context *context)
{
    for (const struct context *c = driver.contexts; c; c = c->next)
        if (c == context) return true;
    return false;
}

/* A primary context is started again after each reset and then has a new id, so that the server never mistakes it for
 * the old one. */
static CUresult context_begin(struct context *context, int device, unsigned flags)
{
    context->id = ++driver.next_id;
    context->device = device;
    context->flags = flags;
    memcpy(context->limits, default_limits, sizeof default_limits);
    growth_begins(context);
    context->legacy = context->per_thread = (struct stream){.context = context};
    context->lost_ns = context->work_ns = context->expected_ns = context->n_losses = 0;
    memset(context->engines_ns, 0, sizeof context->engines_ns);
    context->legacy.id = 1;
    context->per_thread.id = 2;
    CUresult result = sim_take(context, device, SIM_CONTEXT, 0, 0);
    context->alive = !result;
    return result;
}

/* Order matters: what is in the context first, while the server still knows it, then the context with whatever is left.
 * Pools, and what was allocated from them, belong to the process. */
static void context_stop(struct context *context)
{
    peers_end(context);
    modules_end(context);
    streams_end(context);
    arrays_end(context);
    ranges_end(context);
    context->alive = false;
    sim_ask(SIM_CLOSE, (struct sim_request){.device = (uint32_t)context->device, .context = context->id}, NULL, 0);
    bool last = true;
    for (const struct context *c = driver.contexts; c; c = c->next)
        last = last && !(c->alive && c->device == context->device);
    if (last) graph_memory_end(context->device);
}

static CUresult enter_create(const CUcontext *pctx, unsigned flags, CUdevice dev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!pctx || flags & ~(unsigned)CU_CTX_FLAGS_MASK) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_is_device(dev) ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_DEVICE);
}

/* Pushes, and so changes the thread's current context, as cuCtxCreate always has. */
static CUresult create(CUcontext *pctx, unsigned flags, CUdevice dev)
{
    CUresult result = enter_create(pctx, flags, dev);
    if (result) return result;
    struct context *context = depth < MAX_STACK ? calloc(1, sizeof *context) : NULL;
    if (!context) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = context_begin(context, dev, flags | CU_CTX_MAP_HOST);
    if (result) {
        free(context);
        return sim_leave(result);
    }
    /* Never taken out again: a destroyed context's handle must stay recognisable and must not name a later one. */
    context->next = driver.contexts;
    driver.contexts = context;
    stack[depth++] = context;
    *pctx = (CUcontext)context;
    return sim_leave(CUDA_SUCCESS);
}

/* A context of the first kind is for programs whose device pointers have 32 bits, and where every address has more
 * there is no room for one. */
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
    if (context_current() == context) depth--;
    context_stop(context);
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxDestroy_v2(CUcontext ctx) { return destroy(ctx); }

API cuCtxDestroy(CUcontext ctx) { return destroy(ctx); }

/* Primary contexts. */

/* With the lock; also what a green context does, which lives in it. */
CUresult primary_retain(int device)
{
    struct context *primary = &driver.primary[device];
    CUresult result = primary->alive ? CUDA_SUCCESS : context_begin(primary, device, primary->flags | CU_CTX_MAP_HOST);
    if (!result) driver.primary_refs[device]++;
    return result;
}

/* With the lock, and a reference to give up. */
void primary_leave(int device)
{
    if (!--driver.primary_refs[device] && driver.primary[device].alive) context_stop(&driver.primary[device]);
}

API cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!pctx) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    result = primary_retain(dev);
    if (!result) *pctx = (CUcontext)&driver.primary[dev];
    return sim_leave(result);
}

static CUresult primary_release(CUdevice dev, bool all)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (!all && !driver.primary_refs[dev]) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    /* A reset takes the context's insides away but leaves the references: the next retain fills it again. */
    if (!all)
        primary_leave(dev);
    else if (driver.primary[dev].alive)
        context_stop(&driver.primary[dev]);
    return sim_leave(CUDA_SUCCESS);
}

API cuDevicePrimaryCtxRelease_v2(CUdevice dev) { return primary_release(dev, false); }

/* Unlike its successor it does not mind that nobody holds the context. */
API cuDevicePrimaryCtxRelease(CUdevice dev)
{
    CUresult result = primary_release(dev, false);
    return result == CUDA_ERROR_INVALID_CONTEXT ? CUDA_SUCCESS : result;
}

API cuDevicePrimaryCtxReset_v2(CUdevice dev) { return primary_release(dev, true); }

API cuDevicePrimaryCtxReset(CUdevice dev) { return primary_release(dev, true); }

static CUresult primary_set_flags(CUdevice dev, unsigned flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (flags & ~(unsigned)CU_CTX_FLAGS_MASK) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    driver.primary[dev].flags = flags;
    return sim_leave(CUDA_SUCCESS);
}

API cuDevicePrimaryCtxSetFlags_v2(CUdevice dev, unsigned int flags) { return primary_set_flags(dev, flags); }

API cuDevicePrimaryCtxSetFlags(CUdevice dev, unsigned int flags) { return primary_set_flags(dev, flags); }

API cuDevicePrimaryCtxGetState(CUdevice dev, unsigned int *flags, int *active)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (!flags || !active) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *flags = driver.primary[dev].flags & ~(unsigned)CU_CTX_MAP_HOST;
    *active = driver.primary[dev].alive;
    return sim_leave(CUDA_SUCCESS);
}

/* The thread's stack. */

/* A destroyed context may still be pushed and made current, as on the real driver: the next use says what it is. */
static CUresult check_usable(const struct context *context)
{
    return context_is_known(context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

API cuCtxPushCurrent_v2(CUcontext ctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    result = ctx ? check_usable((struct context *)ctx) : CUDA_ERROR_INVALID_VALUE;
    if (!result && depth == MAX_STACK) result = CUDA_ERROR_OUT_OF_MEMORY;
    if (!result) stack[depth++] = (struct context *)ctx;
    return sim_leave(result);
}

API cuCtxPopCurrent_v2(CUcontext *pctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!depth) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    if (pctx) *pctx = (CUcontext)stack[depth - 1];
    depth--;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxSetCurrent(CUcontext ctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!ctx) {
        depth -= depth > 0;
        return sim_leave(CUDA_SUCCESS);
    }
    result = check_usable((struct context *)ctx);
    if (!result) {
        depth += !depth;
        stack[depth - 1] = (struct context *)ctx;
    }
    return sim_leave(result);
}

API cuCtxGetCurrent(CUcontext *pctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!pctx) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *pctx = (CUcontext)context_current();
    return sim_leave(CUDA_SUCCESS);
}
