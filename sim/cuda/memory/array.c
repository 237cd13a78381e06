/* Arrays: memory with a shape. They take extent x format bytes of the device, as any allocation, and have no address
 * for the program. A sparse array takes none. */
#include "cuda/core/capture_state.h"
#include "cuda/memory/memory.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

struct array {
    CUDA_ARRAY3D_DESCRIPTOR descriptor;
    CUdeviceptr memory;
    struct tiles *tiles; /* not NULL: the array is sparse, and has no memory of its own */
    bool is_mipmapped;
    unsigned levels;
    struct array *parent; /* of a level, which has no memory of its own */
    unsigned level;
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

#define BLOCK 4u /* the side of a block of a compressed format, in texels */

/* Returns the bytes of a block; 0: the format is not compressed, or has another number of channels. Not shared with
 * fgpu's table of formats (bpf/texels.h): an error there must differ from the driver. */
static size_t block_bytes(CUarray_format format, unsigned channels)
{
    switch ((int)format) {
    case CU_AD_FORMAT_BC1_UNORM:
    case CU_AD_FORMAT_BC1_UNORM_SRGB:
        return channels == 4 ? 8 : 0;
    case CU_AD_FORMAT_BC4_UNORM:
    case CU_AD_FORMAT_BC4_SNORM:
        return channels == 1 ? 8 : 0;
    case CU_AD_FORMAT_BC5_UNORM:
    case CU_AD_FORMAT_BC5_SNORM:
        return channels == 2 ? 16 : 0;
    case CU_AD_FORMAT_BC6H_UF16:
    case CU_AD_FORMAT_BC6H_SF16:
        return channels == 3 ? 16 : 0;
    case CU_AD_FORMAT_BC2_UNORM:
    case CU_AD_FORMAT_BC2_UNORM_SRGB:
    case CU_AD_FORMAT_BC3_UNORM:
    case CU_AD_FORMAT_BC3_UNORM_SRGB:
    case CU_AD_FORMAT_BC7_UNORM:
    case CU_AD_FORMAT_BC7_UNORM_SRGB:
        return channels == 4 ? 16 : 0;
    default:
        return 0;
    }
}

static size_t at_least_one(size_t n) { return n ? n : 1; }

/* Returns false if the product does not fit or the shape is invalid. */
static bool size_of(const CUDA_ARRAY3D_DESCRIPTOR *d, unsigned level, size_t *size)
{
    bool counts = d->NumChannels == 1 || d->NumChannels == 2 || d->NumChannels == 4;
    size_t block = block_bytes(d->Format, d->NumChannels), side = block ? BLOCK : 1;
    size_t element = block ? block : counts ? format_bytes(d->Format) * d->NumChannels : 0;
    if (!element || !d->Width) return false;
    size_t width = (at_least_one(d->Width >> level) - 1) / side + 1;
    size_t height = (at_least_one(d->Height >> level) - 1) / side + 1;
    return !__builtin_mul_overflow(element, width, size) && !__builtin_mul_overflow(*size, height, size) &&
           !__builtin_mul_overflow(*size, at_least_one(d->Depth >> level), size);
}

static CUresult create(void **out, const CUDA_ARRAY3D_DESCRIPTOR *descriptor, unsigned levels, bool is_mipmapped)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    if (!out || !descriptor || !levels || levels > 32) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    size_t total = 0, size;
    for (unsigned level = 0; level < levels; level++)
        if (!size_of(descriptor, level, &size) || __builtin_add_overflow(total, size, &total))
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
    bool is_sparse = descriptor->Flags & CUDA_ARRAY3D_SPARSE;
    if (is_sparse && (is_mipmapped || !tiles_are_simulated(descriptor, total)))
        return sim_leave(CUDA_ERROR_NOT_SUPPORTED);
    struct array *array = calloc(1, sizeof *array);
    if (!array) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    if (is_sparse) {
        array->tiles = tiles_new(descriptor);
        result = array->tiles ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    } else {
        result = memory_allocate(context, total, &array->memory);
    }
    if (result) {
        free(array);
        return sim_leave(result);
    }
    array->descriptor = *descriptor;
    array->is_mipmapped = is_mipmapped;
    array->levels = levels;
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

static void forget_levels(const struct array *parent)
{
    for (struct array **at = &arrays; *at;) {
        struct array *array = *at;
        if (array->parent != parent) {
            at = &array->next;
            continue;
        }
        *at = array->next;
        free(array);
    }
}

static CUresult destroy(const void *handle, bool is_mipmapped)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    struct array **at = find(handle, is_mipmapped), *array = *at;
    if (!array || array->parent) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *at = array->next;
    forget_levels(array);
    result = array->tiles ? CUDA_SUCCESS : memory_free(array->memory);
    tiles_end(array->tiles);
    free(array);
    return sim_leave(result);
}

/* The server frees the context's memory as a whole. This removes the handles, and unmaps tiles: their memory belongs to
 * the process. */
void arrays_end(const struct context *context)
{
    for (struct array **at = &arrays; *at;) {
        struct array *array = *at;
        if (array->context != context) {
            at = &array->next;
            continue;
        }
        *at = array->next;
        tiles_end(array->tiles);
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

static CUresult enter_array(CUarray handle, const void *out, const struct array **array)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    *array = *find(handle, false);
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return *array ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_HANDLE);
}

API cuArray3DGetDescriptor_v2(CUDA_ARRAY3D_DESCRIPTOR *pDescriptor, CUarray hArray)
{
    const struct array *array;
    CUresult result = enter_array(hArray, pDescriptor, &array);
    if (result) return result;
    *pDescriptor = array->descriptor;
    return sim_leave(CUDA_SUCCESS);
}

/* A query of two dimensions returns nothing of the third. */
API cuArrayGetDescriptor_v2(CUDA_ARRAY_DESCRIPTOR *pDescriptor, CUarray hArray)
{
    const struct array *array;
    CUresult result = enter_array(hArray, pDescriptor, &array);
    if (result) return result;
    const CUDA_ARRAY3D_DESCRIPTOR *d = &array->descriptor;
    *pDescriptor = (CUDA_ARRAY_DESCRIPTOR){
        .Width = d->Width, .Height = d->Height, .Format = d->Format, .NumChannels = d->NumChannels};
    return sim_leave(CUDA_SUCCESS);
}

static size_t halved(size_t extent, unsigned times) { return extent ? at_least_one(extent >> times) : 0; }

static struct array *make_level(struct array *parent, unsigned level)
{
    for (struct array *a = arrays; a; a = a->next)
        if (a->parent == parent && a->level == level) return a;
    struct array *array = calloc(1, sizeof *array);
    if (!array) return NULL;
    array->descriptor = parent->descriptor;
    array->descriptor.Width = halved(parent->descriptor.Width, level);
    array->descriptor.Height = halved(parent->descriptor.Height, level);
    if (!(parent->descriptor.Flags & CUDA_ARRAY3D_LAYERED))
        array->descriptor.Depth = halved(parent->descriptor.Depth, level);
    array->parent = parent;
    array->level = level;
    array->levels = 1;
    array->context = parent->context;
    array->next = arrays;
    arrays = array;
    return array;
}

/* A level exists as long as its mipmapped array, and cannot be destroyed alone. */
API cuMipmappedArrayGetLevel(CUarray *pLevelArray, CUmipmappedArray hMipmappedArray, unsigned int level)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct array *parent = *find(hMipmappedArray, true);
    if (!pLevelArray) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!parent) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (level >= parent->levels) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct array *array = make_level(parent, level);
    if (array) *pLevelArray = (CUarray)array;
    return sim_leave(array ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

/* Sparse arrays. A mapping is made at the call, not in the order of the stream. */

static struct tiles *tiles_of(CUarray handle)
{
    const struct array *array = *find(handle, false);
    return array ? array->tiles : NULL;
}

static CUresult map_array(const CUarrayMapInfo *list, unsigned count, CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (stream->capture) {
        capture_break(stream->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    if (!list || !count) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < count && !result; i++) {
        struct tiles *tiles = list[i].resourceType == CU_RESOURCE_TYPE_ARRAY ? tiles_of(list[i].resource.array) : NULL;
        result = tiles ? tiles_change(tiles, &list[i], context->device) : CUDA_ERROR_INVALID_VALUE;
    }
    return sim_leave(result);
}

TWICE(_ptsz, cuMemMapArrayAsync, (CUarrayMapInfo * mapInfoList, unsigned int count, CUstream hStream),
      map_array(mapInfoList, count, hStream, per_thread))

API cuArrayGetSparseProperties(CUDA_ARRAY_SPARSE_PROPERTIES *sparseProperties, CUarray array)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sparseProperties || !tiles_of(array)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    tiles_describe(sparseProperties);
    return sim_leave(CUDA_SUCCESS);
}
