/* A libcuda that is linked with the simulated driver, libcudX.so.1 (see driver_behind()), and adds green contexts with
 * work. A green context is a context that cannot be made current after its end, while its work and its events stay, as
 * on an H200. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL /* each version by its own name */
#include <cuda.h>
#include <dlfcn.h>

#define BEHIND(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int misused; /* how often a call tried to make the ended context current */
static CUcontext green;
static int ended;

CUresult cuGreenCtxCreate(CUgreenCtx *out, CUdevResourceDesc what, CUdevice device, unsigned flags)
{
    CUresult result = BEHIND(cuCtxCreate_v2)(&green, 0, device);
    *out = (CUgreenCtx)&green;
    return result ? result : BEHIND(cuCtxPopCurrent_v2)(&green);
}

CUresult cuCtxFromGreenCtx(CUcontext *out, CUgreenCtx which) { return *out = green, CUDA_SUCCESS; }

CUresult cuGreenCtxDestroy(CUgreenCtx which) { return ended = 1, CUDA_SUCCESS; }

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    if (context != green || !ended) return BEHIND(cuCtxPushCurrent_v2)(context);
    misused++;
    return CUDA_ERROR_CONTEXT_IS_DESTROYED;
}
