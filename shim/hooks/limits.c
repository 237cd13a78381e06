/*
 * limits.c: cuCtxSetLimit. Owns nothing. The driver allocates memory for a limit of the stack at once, for a limit of
 * the heap at the first launch of code that uses the heap, and none for a limit of printf.
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
