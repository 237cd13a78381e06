/* Pools in several processes. A descriptor refers to a pool, and a handle of 64 bytes to an allocation in the pool. */
#include "cuda/async/pool.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIGN 0x66677070u

struct pointer_data {
    uint32_t sign, spare;
    uint64_t pool[2], key[2];
    uint64_t size;
    uint64_t unused[2];
};

_Static_assert(sizeof(struct pointer_data) == sizeof(CUmemPoolPtrExportData), "what is exported has 64 bytes");

static bool is_same(const uint64_t *a, const uint64_t *b) { return a[0] == b[0] && a[1] == b[1]; }

/* Shares the pool's reserve under a key. The contents of its allocations are shared one by one. */
static CUresult share_pool(struct pool *pool)
{
    if (has_key(pool->key)) return CUDA_SUCCESS;
    struct sim_request request = {.device = (uint32_t)pool->device, .kind = SIM_POOL, .bytes = pool->reserved};
    return share_memory(request, NULL, 0, 0, pool->key);
}

API cuMemPoolExportToShareableHandle(void *handle_out, CUmemoryPool handle, CUmemAllocationHandleType handleType,
                                     unsigned long long flags)
{
    struct pool *pool;
    int descriptor;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    if (!handle_out || flags || handleType != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !pool->is_shareable)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = share_pool(pool);
    if (!result) result = share_export(pool->key, 0, &descriptor);
    if (!result) *(int *)handle_out = descriptor;
    return sim_leave(result);
}

static CUresult import(struct pool **out, int descriptor)
{
    struct sim_share share;
    int file;
    CUresult result = share_import(descriptor, SIM_POOL, &share, &file);
    if (result) return result;
    close(file);
    struct pool *pool = pool_new((int)share.device);
    if (!pool) {
        share_drop(share.key);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    pool->is_imported = true;
    memcpy(pool->key, share.key, sizeof pool->key);
    *out = pool;
    return CUDA_SUCCESS;
}

/* The program keeps its descriptor. Each import is a new pool, also in the process that exported it. */
API cuMemPoolImportFromShareableHandle(CUmemoryPool *pool_out, void *handle, CUmemAllocationHandleType handleType,
                                       unsigned long long flags)
{
    struct pool *pool;
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!pool_out || flags || handleType != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if ((int)(intptr_t)handle < 0) return sim_leave(CUDA_ERROR_UNKNOWN);
    result = import(&pool, (int)(intptr_t)handle);
    if (!result) *pool_out = (CUmemoryPool)pool;
    return sim_leave(result);
}

/* The pool's reserve includes the memory of its allocations, so an allocation is shared with 0 bytes. */
static CUresult share_contents(struct range *range)
{
    if (has_key(range->key)) return CUDA_SUCCESS;
    struct sim_request request = {.device = (uint32_t)range->device, .kind = SIM_POOL};
    return share_memory(request, (void *)range->start, range->span, range->backed, range->key);
}

API cuMemPoolExportPointer(CUmemPoolPtrExportData *shareData_out, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct range *range = range_find(ptr);
    bool is_right = range && range->kind == RANGE_POOL && range->start == ptr && range->pool->is_shareable;
    if (!shareData_out || !is_right) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = share_pool(range->pool);
    if (!result) result = share_contents(range);
    if (result) return sim_leave(result);
    struct pointer_data data = {.sign = SIGN, .size = range->size};
    memcpy(data.pool, range->pool->key, sizeof data.pool);
    memcpy(data.key, range->key, sizeof data.key);
    memcpy(shareData_out, &data, sizeof data);
    return sim_leave(CUDA_SUCCESS);
}

/* Maps a file as a range. The file must be as long as the range: a process that reads past the end of a file is
 * killed. */
static struct range *map_range(int file, size_t size)
{
    struct stat st;
    size_t span = (size + 4095) / 4096 * 4096;
    if (!size || span < size || fstat(file, &st) || (uint64_t)st.st_size < span) return NULL;
    void *map = share_map(file, span);
    struct range *range = map ? range_new(context_current(), (uintptr_t)map, size) : NULL;
    if (map && !range) space_return((uintptr_t)map, span);
    if (range) range->span = span;
    return range;
}

static CUresult import_pointer(struct pool *pool, const struct pointer_data *data, CUdeviceptr *out)
{
    struct sim_share share;
    int file;
    CUresult result = share_open(data->key, &share, &file);
    if (result) return CUDA_ERROR_INVALID_VALUE;
    struct range *range = map_range(file, data->size);
    close(file);
    if (!range) {
        share_drop(data->key);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    range->kind = RANGE_POOL;
    range->free = pool_free;
    range->pool = pool;
    range->device = pool->device;
    range->is_foreign = true;
    memcpy(range->key, data->key, sizeof range->key);
    pool->n_imported++;
    *out = range->start;
    return CUDA_SUCCESS;
}

API cuMemPoolImportPointer(CUdeviceptr *ptr_out, CUmemoryPool handle, CUmemPoolPtrExportData *shareData)
{
    struct context *context;
    struct pointer_data data;
    struct pool *pool = (struct pool *)handle;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!ptr_out || !shareData || !pool_is_known(pool) || !pool->is_imported)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    memcpy(&data, shareData, sizeof data);
    if (data.sign != SIGN || !is_same(data.pool, pool->key)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(import_pointer(pool, &data, ptr_out));
}
