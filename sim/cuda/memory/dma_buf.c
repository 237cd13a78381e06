/* Descriptors of address ranges, for drivers of other devices (dma-buf). They can be made of memory of cuMemAlloc
 * and of mapped memory, whether or not that was created to be shared. */
#include "cuda/memory/memory.h"

#define PAGE 4096u

static bool is_within(const struct range *range, uintptr_t at, size_t size)
{
    return range && size && size <= range->size - (at - range->start);
}

static CUresult key_of(struct range *range, uint64_t *key)
{
    return range->kind == RANGE_DEVICE   ? share_range(range, key)
           : range->kind == RANGE_MAPPED ? vmm_key(range, key)
                                         : CUDA_ERROR_INVALID_VALUE;
}

/* Refuses a range of several mappings: it would have to be one buffer, and here each mapping has its own. */
API cuMemGetHandleForAddressRange(void *handle, CUdeviceptr dptr, size_t size, CUmemRangeHandleType handleType,
                                  unsigned long long flags)
{
    struct context *context;
    uint64_t key[2];
    int descriptor;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct range *range = range_find(dptr);
    if (!handle || handleType != CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD || flags || dptr % PAGE || size % PAGE ||
        !is_within(range, dptr, size))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = key_of(range, key);
    if (!result) result = share_export(key, SIM_FLAG_RANGE, &descriptor);
    if (!result) *(int *)handle = descriptor;
    return sim_leave(result);
}
