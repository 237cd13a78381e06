/* The thread's stack of contexts, as programs change it. */
#include "cuda/core/driver.h"

/* As on the real driver, a destroyed context may be pushed and made current. The next use of it fails. */
static CUresult check_usable(const struct context *context)
{
    return context_is_known(context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

API cuCtxPushCurrent_v2(CUcontext ctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    result = ctx ? check_usable((struct context *)ctx) : CUDA_ERROR_INVALID_VALUE;
    if (!result && thread_is_full()) result = CUDA_ERROR_OUT_OF_MEMORY;
    if (!result) thread_push((struct context *)ctx);
    return sim_leave(result);
}

API cuCtxPopCurrent_v2(CUcontext *pctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!context_current()) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    struct context *context = thread_pop();
    if (pctx) *pctx = (CUcontext)context;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxSetCurrent(CUcontext ctx)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!ctx) {
        thread_pop();
        return sim_leave(CUDA_SUCCESS);
    }
    result = check_usable((struct context *)ctx);
    if (!result) {
        thread_pop();
        thread_push((struct context *)ctx);
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
