/* Stands before the simulated driver, found as libcudX.so.1 (see the test), which gives no work to green contexts. Here
 * one is a context that cannot be made current once it has ended, while its work and its events stay, as on an H200. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL /* each version by its own name */
#include <cuda.h>
#include <dlfcn.h>

#define BEHIND(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int misused; /* so often was it made current all the same */
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
