/* Stream-ordered allocation. A pool takes memory from the device in steps of 32 MiB. At a synchronisation it
 * releases unused memory, down to its release threshold. In between, the server gets no request about allocations and
 * frees. Pools and their allocations outlive contexts, the last context included. */
#include "cuda/async/pool.h"
#include "cuda/graph/graph.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

static struct pool *pools;
static struct pool *current_pool[SIM_MAX_DEVICES];

struct pool *pool_new(int device)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->device = device;
    pool->reuse[0] = pool->reuse[1] = pool->reuse[2] = 1;
    pool->next = pools;
    pools = pool;
    return pool;
}

static struct pool *default_pool(int device)
{
    for (struct pool *p = pools; p; p = p->next)
        if (p->is_default && p->device == device) return p;
    struct pool *pool = pool_new(device);
    if (pool) pool->is_default = true;
    return pool;
}

bool pool_is_known(const struct pool *pool)
{
    for (const struct pool *p = pools; p; p = p->next)
        if (p == pool) return !p->is_destroyed;
    return false;
}

static uint64_t steps(uint64_t bytes) { return (bytes + POOL_STEP - 1) / POOL_STEP * POOL_STEP; }

/* Memory that other processes may have opened is not released. The server gets the number of bytes that this process
 * still has. */
static CUresult set_reserved(struct pool *pool, uint64_t bytes)
{
    CUresult result = CUDA_SUCCESS;
    if (has_key(pool->key))
        result = share_resize(pool->key, bytes);
    else if (bytes > pool->reserved)
        result = sim_take(NULL, pool->device, SIM_POOL, bytes - pool->reserved, bytes - pool->reserved);
    else
        sim_give(NULL, pool->device, SIM_POOL, pool->reserved - bytes, pool->reserved - bytes);
    if (!result) pool->reserved = bytes;
    return result;
}

/* Releases whole steps of unused memory. Fragmentation within a pool is not modelled. */
static void trim(struct pool *pool, uint64_t keep)
{
    uint64_t floor = keep < pool->reserved ? steps(pool->used > keep ? pool->used : keep) : pool->reserved;
    if (pool->reserved > floor) set_reserved(pool, floor);
}

/* Frees the destroyed pools that have no memory any more. */
static void drop_the_empty(void)
{
    for (struct pool **at = &pools, *p; (p = *at);) {
        if (!p->is_destroyed || p->reserved) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        if (has_key(p->key)) share_drop(p->key);
        free(p);
    }
}

/* The real driver releases freed memory when a program waits for the device, not at the free (measured). The threshold
 * of a destroyed pool has no effect. */
void pools_settle(struct context *context, const struct stream *stream)
{
    memory_settle(context, stream);
    for (struct pool *p = pools; p; p = p->next)
        if (p->device == context->device) trim(p, p->is_destroyed ? 0 : p->threshold);
    drop_the_empty();
}

static CUresult free_in_order(struct range *range)
{
    if (has_key(range->key)) share_drop(range->key);
    if (range->is_foreign)
        range->pool->n_imported--;
    else
        range->pool->used -= range->size;
    range_drop(range);
    return CUDA_SUCCESS;
}

CUresult pool_free(struct range *range)
{
    struct pool *pool = range->pool;
    uint64_t size = range->is_foreign ? 0 : range->size;
    CUresult result = free_in_order(range);
    if (!size || result) return result;
    pool->unseen += size;
    trim(pool, pool->is_destroyed ? 0 : pool->threshold);
    drop_the_empty();
    return CUDA_SUCCESS;
}

/* Sends a request to the server only when the pool must grow. Otherwise the real driver's call takes half a
 * microsecond, and fgpu has no probe on it. */
static CUresult allocate(struct context *context, struct pool *pool, size_t size, CUdeviceptr *out)
{
    if (size > 1ull << 46) return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t needed = steps(pool->used + size);
    CUresult result = needed > pool->reserved ? set_reserved(pool, needed) : CUDA_SUCCESS;
    if (result) return result;
    size_t span = (size + 4095) / 4096 * 4096;
    uintptr_t start = space_reserve(span, 4096, false);
    struct range *range = start ? range_new(context, start, size) : NULL;
    if (!range) {
        if (start) space_return(start, span);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    range->kind = RANGE_POOL;
    range->free = pool_free;
    range->span = span;
    range->pool = pool;
    range->device = pool->device;
    pool->used += size;
    pool->used_high = pool->used > pool->used_high ? pool->used : pool->used_high;
    pool->reserved_high = pool->reserved > pool->reserved_high ? pool->reserved : pool->reserved_high;
    *out = start;
    return CUDA_SUCCESS;
}

/* In a capture the address exists at once. The memory exists from the launch on, and does not come from the pool. */
static CUresult capture_alloc(struct stream *stream, int device, size_t size, CUdeviceptr *out)
{
    struct graph_memory *memory;
    struct node *node;
    CUresult result = capture_node(stream, CU_GRAPH_NODE_TYPE_MEM_ALLOC, &node);
    if (result) return result;
    result = graph_memory_new(node->graph, device, size, &memory);
    if (result) {
        capture_break(stream->capture); /* the capture has a node that allocates nothing */
        return result;
    }
    node->memory = memory;
    node->alloc.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    node->alloc.poolProps.location = (CUmemLocation){.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    node->alloc.bytesize = size;
    node->alloc.dptr = *out = memory->range->start;
    node->graph->has_memory = true;
    return CUDA_SUCCESS;
}

static CUresult capture_free(struct stream *stream, uintptr_t at)
{
    struct graph_memory *memory;
    struct node *node;
    CUresult result = graph_memory_node_free(stream->capture->graph, at, &memory);
    if (!result) result = capture_node(stream, CU_GRAPH_NODE_TYPE_MEM_FREE, &node);
    if (result) return result;
    node->memory = memory;
    node->alloc.dptr = at;
    node->graph->has_memory = true;
    return CUDA_SUCCESS;
}

static CUresult alloc_async(CUdeviceptr *dptr, size_t size, struct pool *pool, CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!dptr) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *dptr = 0;
    if (!size) return sim_leave(CUDA_SUCCESS); /* unlike cuMemAlloc */
    if (!pool) pool = current_pool[context->device] ? current_pool[context->device] : default_pool(context->device);
    if (!pool || !pool_is_known(pool) || pool->is_imported) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (stream->capture) return sim_leave(capture_alloc(stream, pool->device, size, dptr));
    result = capture_permits(); /* captures of other streams */
    return sim_leave(result ? result : allocate(context, pool, size, dptr));
}

TWICE(_ptsz, cuMemAllocAsync, (CUdeviceptr * dptr, size_t bytesize, CUstream hStream),
      alloc_async(dptr, bytesize, NULL, hStream, per_thread))

static CUresult alloc_from_pool(CUdeviceptr *dptr, size_t size, CUmemoryPool pool, CUstream stream, bool per_thread)
{
    struct context *context;
    struct stream *entered;
    if (pool) return alloc_async(dptr, size, (struct pool *)pool, stream, per_thread);
    CUresult result = stream_enter_any_work(stream, per_thread, &context, &entered);
    return result ? result : sim_leave(CUDA_ERROR_INVALID_VALUE);
}

TWICE(_ptsz, cuMemAllocFromPoolAsync, (CUdeviceptr * dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream),
      alloc_from_pool(dptr, bytesize, pool, hStream, per_thread))

static CUresult free_async(CUdeviceptr dptr, CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (stream->capture) return sim_leave(dptr ? capture_free(stream, dptr) : CUDA_SUCCESS);
    struct range *range = range_find(dptr);
    bool is_start = range && range->start == dptr;
    if (is_start && range->kind == RANGE_MANAGED) return sim_leave(CUDA_ERROR_NOT_SUPPORTED);
    if (is_start && range->kind == RANGE_POOL) return sim_leave(free_in_order(range));
    if (is_start && range->kind == RANGE_DEVICE) {
        range->going = stream;
        range->going_in = context;
        return sim_leave(CUDA_SUCCESS);
    }
    return sim_leave(dptr ? memory_free(dptr) : CUDA_SUCCESS);
}

TWICE(_ptsz, cuMemFreeAsync, (CUdeviceptr dptr, CUstream hStream), free_async(dptr, hStream, per_thread))

/* Pools themselves. While something captures, a query of a pool's memory is unsafe; a query of a device's pool is
 * safe. */

static CUresult get_pool(CUmemoryPool *out, CUdevice dev, bool current)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    struct pool *pool = current && current_pool[dev] ? current_pool[dev] : default_pool(dev);
    *out = (CUmemoryPool)pool;
    return sim_leave(pool ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

API cuDeviceGetDefaultMemPool(CUmemoryPool *pool_out, CUdevice dev) { return get_pool(pool_out, dev, false); }

API cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice dev) { return get_pool(pool, dev, true); }

CUresult pool_enter(CUmemoryPool handle, struct pool **pool)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    *pool = (struct pool *)handle;
    return pool_is_known(*pool) ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_VALUE);
}

static CUresult set_pool(CUdevice dev, CUmemoryPool handle)
{
    struct pool *pool;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    if (pool->device != dev || pool->is_imported) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    current_pool[dev] = pool;
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceSetMemPool(CUdevice dev, CUmemoryPool handle) { return set_pool(dev, handle); }

/* The same calls with a location and a type of memory. Only devices have pools here. */
static bool is_of_device(const CUmemLocation *location, CUmemAllocationType type)
{
    return location && location->type == CU_MEM_LOCATION_TYPE_DEVICE && type == CU_MEM_ALLOCATION_TYPE_PINNED;
}

API cuMemGetDefaultMemPool(CUmemoryPool *pool_out, CUmemLocation *location, CUmemAllocationType type)
{
    return is_of_device(location, type) ? get_pool(pool_out, location->id, false) : CUDA_ERROR_INVALID_VALUE;
}

API cuMemGetMemPool(CUmemoryPool *pool, CUmemLocation *location, CUmemAllocationType type)
{
    return is_of_device(location, type) ? get_pool(pool, location->id, true) : CUDA_ERROR_INVALID_VALUE;
}

API cuMemSetMemPool(CUmemLocation *location, CUmemAllocationType type, CUmemoryPool pool)
{
    return is_of_device(location, type) ? set_pool(location->id, pool) : CUDA_ERROR_INVALID_VALUE;
}

API cuMemPoolCreate(CUmemoryPool *out, const CUmemPoolProps *props)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || !props || props->allocType != CU_MEM_ALLOCATION_TYPE_PINNED ||
        props->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(props->location.id)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    struct pool *pool = pool_new(props->location.id);
    if (!pool) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    pool->is_shareable = props->handleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    *out = (CUmemoryPool)pool;
    return sim_leave(CUDA_SUCCESS);
}

API cuMemPoolDestroy(CUmemoryPool handle)
{
    struct pool *pool;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    /* A pool may be destroyed before its own allocations, but not before imported allocations. */
    if (pool->is_default || pool->n_imported) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    trim(pool, 0); /* the memory of outstanding allocations stays until they are freed */
    if (current_pool[pool->device] == pool) current_pool[pool->device] = NULL;
    pool->is_destroyed = true;
    drop_the_empty();
    return sim_leave(CUDA_SUCCESS);
}

API cuMemPoolTrimTo(CUmemoryPool handle, size_t minBytesToKeep)
{
    struct pool *pool;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    result = capture_permits();
    if (!result) trim(pool, minBytesToKeep);
    return sim_leave(result);
}

static uint64_t *counter(struct pool *pool, CUmemPool_attribute attr)
{
    switch (attr) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        return &pool->threshold;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
        return &pool->reserved;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        return &pool->reserved_high;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
        return &pool->used;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        return &pool->used_high;
    default:
        return NULL;
    }
}

API cuMemPoolGetAttribute(CUmemoryPool handle, CUmemPool_attribute attr, void *value)
{
    struct pool *pool;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    const uint64_t *number = counter(pool, attr);
    if (!value || (!number && ((int)attr < 1 || (int)attr > 3))) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (number)
        *(cuuint64_t *)value = *number + (attr == CU_MEMPOOL_ATTR_USED_MEM_CURRENT ? pool->unseen : 0);
    else
        *(int *)value = pool->reuse[attr - 1];
    return sim_leave(CUDA_SUCCESS);
}

API cuMemPoolSetAttribute(CUmemoryPool handle, CUmemPool_attribute attr, void *value)
{
    struct pool *pool;
    CUresult result = pool_enter(handle, &pool);
    if (result) return result;
    uint64_t *number = counter(pool, attr);
    bool is_current = attr == CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT || attr == CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
    if (!value || is_current || (!number && ((int)attr < 1 || (int)attr > 3)))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (number == &pool->threshold)
        *number = *(cuuint64_t *)value;
    else if (number && *(cuuint64_t *)value)
        return sim_leave(CUDA_ERROR_INVALID_VALUE); /* a high-water mark can only be reset */
    else if (number)
        *number = attr == CU_MEMPOOL_ATTR_USED_MEM_HIGH ? pool->used : pool->reserved;
    else
        pool->reuse[attr - 1] = *(int *)value;
    return sim_leave(CUDA_SUCCESS);
}
