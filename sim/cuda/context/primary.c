/* Primary contexts, one of each device. */
#include "cuda/context/context.h"

CUresult primary_retain(int device)
{
    struct context *primary = &driver.primary[device];
    CUresult result = primary->alive ? CUDA_SUCCESS : context_begin(primary, device, primary->flags | CU_CTX_MAP_HOST);
    if (!result) driver.primary_refs[device]++;
    return result;
}

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
    /* A reset ends the context but keeps the references. The next retain begins it again. */
    if (!all)
        primary_leave(dev);
    else if (driver.primary[dev].alive)
        context_stop(&driver.primary[dev]);
    return sim_leave(CUDA_SUCCESS);
}

API cuDevicePrimaryCtxRelease_v2(CUdevice dev) { return primary_release(dev, false); }

/* Unlike its successor, succeeds if the context has no reference. */
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
