/* What a pointer is: the answers by which frameworks tell device, managed, pinned and unknown memory apart. */
#include "cuda_state.h"

#include <string.h>

static bool is_host(const struct range *range) { return range->kind == RANGE_HOST || range->kind == RANGE_REGISTERED; }

static CUresult attribute(void *data, CUpointer_attribute attr, const struct range *range, uintptr_t at)
{
    uint64_t number = 0;
    size_t width = sizeof(uint32_t);
    switch ((int)attr) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        /* Pool and mapped memory belongs to no context. */
        number = range->kind == RANGE_MAPPED || range->kind == RANGE_POOL ? 0 : (uintptr_t)range->context;
        width = sizeof(CUcontext);
        break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        number = is_host(range) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        number = at;
        width = sizeof(CUdeviceptr);
        break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (!is_host(range) && range->kind != RANGE_MANAGED) return CUDA_ERROR_INVALID_VALUE;
        number = at;
        width = sizeof(void *);
        break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        number = attr == CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE && range->kind == RANGE_DEVICE;
        width = 1;
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
        number = range->id;
        width = sizeof(uint64_t);
        break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        number = range->kind == RANGE_MANAGED;
        width = 1;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        number = (uint32_t)range->device;
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        number = range->start;
        width = sizeof(CUdeviceptr);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        number = range->size;
        width = sizeof(size_t);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
        number = 1;
        width = 1;
        break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
        number = attr == CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE ? (uintptr_t)range->pool : 0;
        width = sizeof(uint64_t);
        break;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        number = range->kind == RANGE_MAPPED ? range->access : CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE;
        break;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
    memcpy(data, &number, width); /* little-endian, as every machine this runs on */
    return CUDA_SUCCESS;
}

API cuPointerGetAttribute(void *data, CUpointer_attribute attr, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct range *range = range_find(ptr);
    if (!data || !range) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(attribute(data, attr, range, ptr));
}

/* Unlike the single question, this one answers for any pointer at all: what is unknown gets zeros. */
API cuPointerGetAttributes(unsigned int n, CUpointer_attribute *attributes, void **data, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!n || !attributes || !data) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const struct range none = {.device = -2}, *range = range_find(ptr);
    for (unsigned i = 0; i < n; i++) {
        if (!data[i]) return sim_leave(CUDA_ERROR_INVALID_VALUE);
        if (range && !attribute(data[i], attributes[i], range, ptr)) continue;
        uint64_t zero = 0;
        int ordinal = none.device;
        bool is_ordinal = attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        bool is_pointer = attributes[i] == CU_POINTER_ATTRIBUTE_CONTEXT ||
                          attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ||
                          attributes[i] == CU_POINTER_ATTRIBUTE_HOST_POINTER;
        if (is_ordinal)
            memcpy(data[i], &ordinal, sizeof ordinal);
        else
            memcpy(data[i], &zero,
                   is_pointer                                         ? sizeof zero
                   : attributes[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED ? 1
                                                                      : sizeof(uint32_t));
    }
    return sim_leave(CUDA_SUCCESS);
}

API cuPointerSetAttribute(const void *value, CUpointer_attribute attr, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!value || attr != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || !range_find(ptr))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(CUDA_SUCCESS);
}
