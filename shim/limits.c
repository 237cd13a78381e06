/*
 * limits.c: cuCtxSetLimit. Owns nothing. The stack's limit takes memory at once; that of printf takes none.
 */
#include "local_memory.h"

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value)
{
    __typeof__(&cuCtxSetLimit) driver = REAL(cuCtxSetLimit);
    struct fgpu_growth growth;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (limit != CU_LIMIT_STACK_SIZE) return driver(limit, value);
    CUresult refusal = fgpu_stack_begins(&growth, value);
    return refusal ? refusal : fgpu_stack_ends(&growth, driver(limit, value), value);
}
