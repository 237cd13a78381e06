/* The tiles of sparse arrays, to each of which memory of a tile pool can be mapped. Only arrays of two dimensions with
 * elements of 16 bytes are simulated: the real driver's tile was measured for these alone. */
#include "cuda/memory/memory.h"

#include <stdlib.h>

#define ELEMENT 16u
#define SIDE 64u /* of a tile, in elements */
#define TILE (SIDE * SIDE * ELEMENT)

struct tiles {
    size_t width, height; /* of the array, in elements */
    struct vmm_handle *memory[];
};

static size_t sides(size_t extent) { return (extent + SIDE - 1) / SIDE; }

bool tiles_are_simulated(const CUDA_ARRAY3D_DESCRIPTOR *descriptor, size_t size)
{
    return !descriptor->Depth && size == descriptor->Width * descriptor->Height * ELEMENT;
}

struct tiles *tiles_new(const CUDA_ARRAY3D_DESCRIPTOR *descriptor)
{
    size_t n = sides(descriptor->Width) * sides(descriptor->Height);
    struct tiles *tiles = calloc(1, sizeof *tiles + n * sizeof *tiles->memory);
    if (!tiles) return NULL;
    tiles->width = descriptor->Width;
    tiles->height = descriptor->Height;
    return tiles;
}

static void set(struct vmm_handle **tile, struct vmm_handle *memory)
{
    if (memory) vmm_map_tile(memory);
    if (*tile) vmm_unmap_tile(*tile);
    *tile = memory;
}

void tiles_end(struct tiles *tiles)
{
    if (!tiles) return;
    size_t n = sides(tiles->width) * sides(tiles->height);
    for (size_t i = 0; i < n; i++) set(&tiles->memory[i], NULL);
    free(tiles);
}

/* Returns whether these are whole tiles. The array may end inside the last one. */
static bool is_whole(size_t offset, size_t extent, size_t of)
{
    return extent && offset < of && extent <= of - offset && offset % SIDE == 0 &&
           (extent % SIDE == 0 || offset + extent == of);
}

CUresult tiles_change(struct tiles *tiles, const CUarrayMapInfo *info, int device)
{
    bool is_map = info->memOperationType == CU_MEM_OPERATION_TYPE_MAP;
    if (info->memHandleType != CU_MEM_HANDLE_TYPE_GENERIC ||
        info->subresourceType != CU_ARRAY_SPARSE_SUBRESOURCE_TYPE_SPARSE_LEVEL || info->flags ||
        info->deviceBitMask != 1u << device || (!is_map && info->memOperationType != CU_MEM_OPERATION_TYPE_UNMAP))
        return CUDA_ERROR_INVALID_VALUE;
    unsigned x = info->subresource.sparseLevel.offsetX, width = info->subresource.sparseLevel.extentWidth;
    unsigned y = info->subresource.sparseLevel.offsetY, height = info->subresource.sparseLevel.extentHeight;
    if (info->subresource.sparseLevel.level || info->subresource.sparseLevel.layer ||
        info->subresource.sparseLevel.offsetZ || info->subresource.sparseLevel.extentDepth != 1 ||
        !is_whole(x, width, tiles->width) || !is_whole(y, height, tiles->height))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t bytes = (uint64_t)sides(width) * sides(height) * TILE;
    struct vmm_handle *memory = is_map ? vmm_tile_pool(info->memHandle.memHandle, device, info->offset, bytes) : NULL;
    if (is_map ? !memory : info->memHandle.memHandle != 0) return CUDA_ERROR_INVALID_VALUE;
    for (size_t row = y / SIDE; row < y / SIDE + sides(height); row++)
        for (size_t column = x / SIDE; column < x / SIDE + sides(width); column++)
            set(&tiles->memory[row * sides(tiles->width) + column], memory);
    return CUDA_SUCCESS;
}

void tiles_describe(CUDA_ARRAY_SPARSE_PROPERTIES *properties)
{
    *properties = (CUDA_ARRAY_SPARSE_PROPERTIES){.tileExtent = {SIDE, SIDE, 1}};
}
