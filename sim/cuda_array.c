/* Arrays: memory with a shape. They take extent x format from the device like any allocation and have no address that a
 * program sees. */
#include "cuda_state.h"

#include <stdlib.h>

struct array {
    CUDA_ARRAY3D_DESCRIPTOR descriptor;
    CUdeviceptr memory;
    bool is_mipmapped;
    struct context *context;
    struct array *next;
};

static struct array *arrays;

static size_t format_bytes(CUarray_format format)
{
    switch ((int)format) {
    case CU_AD_FORMAT_UNSIGNED_INT8:
    case CU_AD_FORMAT_SIGNED_INT8:
        return 1;
    case CU_AD_FORMAT_UNSIGNED_INT16:
    case CU_AD_FORMAT_SIGNED_INT16:
    case CU_AD_FORMAT_HALF:
        return 2;
    case CU_AD_FORMAT_UNSIGNED_INT32:
    case CU_AD_FORMAT_SIGNED_INT32:
    case CU_AD_FORMAT_FLOAT:
        return 4;
    default:
        return 0;
    }
}

static size_t at_least_one(size_t n) { return n ? n : 1; }

/* False: the product does not fit, or the shape is none. */
static bool size_of(const CUDA_ARRAY3D_DESCRIPTOR *d, unsigned level, size_t *size)
{
    size_t element = format_bytes(d->Format) * d->NumChannels;
    bool counts = d->NumChannels == 1 || d->NumChannels == 2 || d->NumChannels == 4;
    if (!element || !counts || !d->Width) return false;
    size_t width = at_least_one(d->Width >> level), height = at_least_one(d->Height >> level);
    return !__builtin_mul_overflow(element, width, size) && !__builtin_mul_overflow(*size, height, size) &&
           !__builtin_mul_overflow(*size, at_least_one(d->Depth >> level), size);
}

static CUresult create(void **out, const CUDA_ARRAY3D_DESCRIPTOR *descriptor, unsigned levels, bool is_mipmapped)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!out || !descriptor || !levels || levels > 32) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    size_t total = 0, size;
    for (unsigned level = 0; level < levels; level++)
        if (!size_of(descriptor, level, &size) || __builtin_add_overflow(total, size, &total))
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct array *array = calloc(1, sizeof *array);
    if (!array) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = memory_allocate(context, total, &array->memory);
    if (result) {
        free(array);
        return sim_leave(result);
    }
    array->descriptor = *descriptor;
    array->is_mipmapped = is_mipmapped;
    array->context = context;
    array->next = arrays;
    arrays = array;
    *out = array;
    return sim_leave(CUDA_SUCCESS);
}

static struct array **find(const void *handle, bool is_mipmapped)
{
    struct array **at = &arrays;
    while (*at && (*at != handle || (*at)->is_mipmapped != is_mipmapped)) at = &(*at)->next;
    return at;
}

static CUresult destroy(const void *handle, bool is_mipmapped)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct array **at = find(handle, is_mipmapped), *array = *at;
    if (!array) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *at = array->next;
    result = memory_free(array->memory);
    free(array);
    return sim_leave(result);
}

/* The context's memory goes as a whole; here only the handles are forgotten. */
void arrays_end(const struct context *context)
{
    for (struct array **at = &arrays; *at;) {
        struct array *array = *at;
        if (array->context != context) {
            at = &array->next;
            continue;
        }
        *at = array->next;
        free(array);
    }
}

API cuArray3DCreate_v2(CUarray *pHandle, const CUDA_ARRAY3D_DESCRIPTOR *pAllocateArray)
{
    return create((void **)pHandle, pAllocateArray, 1, false);
}

API cuArrayCreate_v2(CUarray *pHandle, const CUDA_ARRAY_DESCRIPTOR *pAllocateArray)
{
    CUDA_ARRAY3D_DESCRIPTOR descriptor = {0};
    if (pAllocateArray) {
        descriptor.Width = pAllocateArray->Width;
        descriptor.Height = pAllocateArray->Height;
        descriptor.Format = pAllocateArray->Format;
        descriptor.NumChannels = pAllocateArray->NumChannels;
    }
    return create((void **)pHandle, pAllocateArray ? &descriptor : NULL, 1, false);
}

API cuArrayDestroy(CUarray hArray) { return destroy(hArray, false); }

API cuMipmappedArrayCreate(CUmipmappedArray *pHandle, const CUDA_ARRAY3D_DESCRIPTOR *pDescriptor, unsigned int levels)
{
    return create((void **)pHandle, pDescriptor, levels, true);
}

API cuMipmappedArrayDestroy(CUmipmappedArray hArray) { return destroy(hArray, true); }

API cuArray3DGetDescriptor_v2(CUDA_ARRAY3D_DESCRIPTOR *pDescriptor, CUarray hArray)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct array *array = *find(hArray, false);
    if (!pDescriptor) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!array) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *pDescriptor = array->descriptor;
    return sim_leave(CUDA_SUCCESS);
}
