/*
 * limits.c: cuCtxSetLimit. Owns nothing. The limit of the stack allocates memory at once, that of the heap at the first
 * launch of code that uses it, that of printf none.
 */
#include "code/local_memory.h"

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value)
{
    __typeof__(&cuCtxSetLimit) driver = REAL(cuCtxSetLimit);
    struct fgpu_growth growth;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (limit != CU_LIMIT_STACK_SIZE) {
        CUresult result = driver(limit, value);
        if (limit == CU_LIMIT_MALLOC_HEAP_SIZE && result == CUDA_SUCCESS) fgpu_heap_limited(value);
        return result;
    }
    CUresult refusal = fgpu_stack_begins(&growth, value);
    return refusal ? refusal : fgpu_stack_ends(&growth, driver(limit, value), value);
}
