/*
 * array.c: calls that create arrays. The request is extent x format x levels, without the driver's padding, which only
 * NVML shows. Owns nothing.
 */
#include "account/account.h"
#include "texels.h"

#define NO_MEMORY_YET                                                                                                  \
    (CUDA_ARRAY3D_SPARSE | CUDA_ARRAY3D_DEFERRED_MAPPING) /* mapped later, through handles of cuMemCreate */
#define MOST_LEVELS 32

struct shape {
    uint64_t width, height, depth;
    unsigned format, channels, flags;
};

static struct shape shape_2d(uint64_t width, uint64_t height, CUarray_format format, unsigned channels)
{
    return (struct shape){width, height, 0, format, channels, 0};
}

static struct shape shape_3d(const CUDA_ARRAY3D_DESCRIPTOR *d)
{
    return (struct shape){d->Width, d->Height, d->Depth, d->Format, d->NumChannels, d->Flags};
}

static uint64_t at_level(uint64_t extent, unsigned level) { return extent >> level ? extent >> level : 1; }

/* Return the bytes of an array. 0: it takes no memory, or the driver would refuse it. The number of layers, and of the
 * six sides of a cube, is the same at every mipmap level. */
static uint64_t bytes_of(struct shape s, unsigned levels)
{
    uint64_t total = 0;
    if (!s.width || !s.channels || !levels || s.flags & NO_MEMORY_YET) return 0;
    bool layers = s.flags & (CUDA_ARRAY3D_LAYERED | CUDA_ARRAY3D_CUBEMAP);
    for (unsigned level = 0; level < levels && level < MOST_LEVELS; level++) {
        uint64_t bits = fgpu_texel_bits(s.format, s.channels & 7); /* the driver refuses more than 4 channels */
        if (__builtin_mul_overflow(bits, at_level(s.width, level), &bits) ||
            __builtin_mul_overflow(bits, at_level(s.height, level), &bits) ||
            __builtin_mul_overflow(bits, at_level(s.depth, layers ? 0 : level), &bits) ||
            __builtin_add_overflow(total, bits, &total))
            return TOO_MUCH;
    }
    return (total + 7) / 8;
}

/* The 32-bit calls have no probe: their bytes are committed at once, and stay charged until the process exits. */
#define WITNESSED FGPU_MEMORY
#define UNWITNESSED FGPU_POOL

/* All calls take a handle and a descriptor. Those without mipmap levels do not read the third argument. */
typedef CUresult create(void *, const void *, unsigned);

static CUresult create_array(create *driver, void *handle, const void *descriptor, const struct shape *shape,
                             unsigned levels, unsigned kind)
{
    struct fgpu_request request;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    uint64_t bytes = handle && descriptor ? bytes_of(*shape, levels) : 0;
    if (!bytes || !fgpu_request_here(&request, bytes, kind, handle)) return driver(handle, descriptor, levels);
    while (fgpu_attempt(&request)) request.result = driver(handle, descriptor, levels);
    return request.result;
}
#define DRIVER(name) ((create *)(void *)REAL(name))

EXPORT CUresult cuArrayCreate_v2(CUarray *pHandle, const CUDA_ARRAY_DESCRIPTOR *pAllocateArray)
{
    struct shape shape = {0};
    const CUDA_ARRAY_DESCRIPTOR *d = pAllocateArray;
    if (d) shape = shape_2d(d->Width, d->Height, d->Format, d->NumChannels);
    return create_array(DRIVER(cuArrayCreate_v2), pHandle, d, &shape, 1, WITNESSED);
}

EXPORT CUresult cuArray3DCreate_v2(CUarray *pHandle, const CUDA_ARRAY3D_DESCRIPTOR *pAllocateArray)
{
    struct shape shape = {0};
    if (pAllocateArray) shape = shape_3d(pAllocateArray);
    return create_array(DRIVER(cuArray3DCreate_v2), pHandle, pAllocateArray, &shape, 1, WITNESSED);
}

EXPORT CUresult cuMipmappedArrayCreate(CUmipmappedArray *pHandle, const CUDA_ARRAY3D_DESCRIPTOR *pMipmappedArrayDesc,
                                       unsigned int numMipmapLevels)
{
    struct shape shape = {0};
    if (pMipmappedArrayDesc) shape = shape_3d(pMipmappedArrayDesc);
    return create_array(DRIVER(cuMipmappedArrayCreate), pHandle, pMipmappedArrayDesc, &shape, numMipmapLevels,
                        WITNESSED);
}

EXPORT CUresult cuArrayCreate(CUarray *pHandle, const CUDA_ARRAY_DESCRIPTOR_v1 *pAllocateArray)
{
    struct shape shape = {0};
    const CUDA_ARRAY_DESCRIPTOR_v1 *d = pAllocateArray;
    if (d) shape = shape_2d(d->Width, d->Height, d->Format, d->NumChannels);
    return create_array(DRIVER(cuArrayCreate), pHandle, d, &shape, 1, UNWITNESSED);
}

EXPORT CUresult cuArray3DCreate(CUarray *pHandle, const CUDA_ARRAY3D_DESCRIPTOR_v1 *pAllocateArray)
{
    struct shape shape = {0};
    const CUDA_ARRAY3D_DESCRIPTOR_v1 *d = pAllocateArray;
    if (d) shape = (struct shape){d->Width, d->Height, d->Depth, d->Format, d->NumChannels, d->Flags};
    return create_array(DRIVER(cuArray3DCreate), pHandle, d, &shape, 1, UNWITNESSED);
}
