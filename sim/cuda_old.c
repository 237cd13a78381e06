/* Forms from before CUDA 3.2, with device pointers of 32 bits, which the real library exports to this day. They are for
 * contexts of their own kind, which cannot be made any more. */
#include "cuda_state.h"

static CUresult refuse(void)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    return result ? result : sim_leave(CUDA_ERROR_INVALID_CONTEXT);
}

API cuMemAlloc(CUdeviceptr_v1 *dptr, unsigned int bytesize)
{
    (void)dptr, (void)bytesize;
    return refuse();
}

API cuMemFree(CUdeviceptr_v1 dptr)
{
    (void)dptr;
    return refuse();
}

API cuMemGetInfo(unsigned int *free, unsigned int *total)
{
    (void)free, (void)total;
    return refuse();
}
