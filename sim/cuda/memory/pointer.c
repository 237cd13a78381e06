/* Attributes of pointers, by which frameworks tell device, managed, pinned and unknown memory apart. */
#include "cuda/memory/memory.h"

#include <string.h>

static bool is_host(const struct range *range) { return range->kind == RANGE_HOST || range->kind == RANGE_REGISTERED; }

/* Returns the size of an attribute; 0: there is no such attribute. */
static size_t width_of(CUpointer_attribute attr)
{
    switch ((int)attr) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        return 4;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_MAPPED:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_HW_DECOMPRESS_CAPABLE:
        return 1;
    default:
        return attr >= CU_POINTER_ATTRIBUTE_CONTEXT && attr <= CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID ? 8 : 0;
    }
}

static uint64_t mapping_start(const struct range *range) { return range->block ? range->block->start : range->start; }

static uint64_t value_of(CUpointer_attribute attr, const struct range *range, uintptr_t at)
{
    bool is_plain = range->kind == RANGE_DEVICE;
    switch ((int)attr) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        /* Pools and mapped memory belong to no context. */
        return range->kind == RANGE_MAPPED || range->kind == RANGE_POOL || range->kind == RANGE_GRAPH
                   ? 0
                   : (uintptr_t)range->context;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        return is_host(range) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        return at;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
        return range->id;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        return range->kind == RANGE_MANAGED;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        return (uint32_t)range->device;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_HW_DECOMPRESS_CAPABLE:
        return is_plain;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        return range->start;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        return range->size;
    case CU_POINTER_ATTRIBUTE_MAPPED:
        return 1;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
        return !is_host(range);
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        return range->kind == RANGE_MAPPED ? range->access : CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
        return (uintptr_t)range->pool;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
        return range->span ? range->span : GRANULE;
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
        return mapping_start(range);
    default:
        return 0;
    }
}

static CUresult attribute(void *data, CUpointer_attribute attr, const struct range *range, uintptr_t at)
{
    size_t width = width_of(attr);
    bool has_host_side = is_host(range) || range->kind == RANGE_MANAGED;
    if (!width || (attr == CU_POINTER_ATTRIBUTE_HOST_POINTER && !has_host_side) ||
        (attr == CU_POINTER_ATTRIBUTE_P2P_TOKENS && is_host(range)))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t value = value_of(attr, range, at);
    memcpy(data, &value, width); /* little-endian, as every machine on which this runs */
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

/* Unlike cuPointerGetAttribute, this works for any pointer: an unknown pointer gets zeros, and no device. */
API cuPointerGetAttributes(unsigned int n, CUpointer_attribute *attributes, void **data, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!n || !attributes || !data) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const struct range *range = range_find(ptr);
    for (unsigned i = 0; i < n; i++) {
        if (!data[i]) return sim_leave(CUDA_ERROR_INVALID_VALUE);
        if (range && !attribute(data[i], attributes[i], range, ptr)) continue;
        int64_t unknown = attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? -2 : 0;
        memcpy(data[i], &unknown, width_of(attributes[i]));
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
