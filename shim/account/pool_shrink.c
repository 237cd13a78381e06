/*
 * pool_shrink.c: measures what memory pools hold, and releases the rest in the kernel's ledger. Owns nothing; the
 * kernel owns the sum.
 *
 * A pool that cannot be measured keeps what was admitted for it, and the agent charges what NVML shows beyond that. No
 * function here waits long.
 */
#include <errno.h>

#include "account/graph_memory.h"
#include "account/pool.h"

/* Read from the driver how much of the pool is in use, and how much it holds in all. */
bool fgpu_pool_measure(const struct pool *pool, uint64_t *used, uint64_t *reserved)
{
    __typeof__(&cuMemPoolGetAttribute) get = REAL(cuMemPoolGetAttribute);
    CUmemoryPool handle = (CUmemoryPool)atomic_load(&pool->handle);
    cuuint64_t in_use = 0, in_all = 0;
    if (!get || (uint64_t)handle <= FGPU_NO_HANDLE ||
        get(handle, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &in_use) != CUDA_SUCCESS ||
        get(handle, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &in_all) != CUDA_SUCCESS)
        return false;
    *reserved = in_all > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_all;
    *used = in_use > *reserved ? *reserved : in_use; /* memory freed by cuMemFree stays in the driver's count for
                                                        ever */
    return true;
}

static void forget_credits(struct pool *pool)
{
    atomic_store_explicit(&pool->unclaimed, 0, memory_order_relaxed);
    for (int i = 0; i < FGPU_CREDITS; i++) {
        atomic_store_explicit(&pool->credits[i].bytes, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->credits[i].stream, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->credits[i].piece, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->credits[i].rest, 0, memory_order_relaxed);
    }
}

/* Return the bytes that streams may get again without growth of the pool. If the pool holds less than these and the
 * bytes in use, it was trimmed, and no credit is valid. */
uint64_t fgpu_pool_credits(struct pool *pool, uint64_t used, uint64_t reserved)
{
    uint64_t sum = used + atomic_load_explicit(&pool->unclaimed, memory_order_relaxed);
    for (int i = 0; i < FGPU_CREDITS; i++)
        sum += atomic_load_explicit(&pool->credits[i].bytes, memory_order_relaxed) +
               atomic_load_explicit(&pool->credits[i].rest, memory_order_relaxed);
    if (sum <= reserved) return sum - used;
    forget_credits(pool);
    return 0;
}

/* Release what the pool no longer holds. Admitted calls that have not returned keep their bytes. A pool that holds a
 * block or more beyond the admitted bytes contains memory of a request that was refused after the driver's call. */
static bool settle_down(struct pool *pool)
{
    __typeof__(&cuMemPoolTrimTo) trim = REAL(cuMemPoolTrimTo);
    uint64_t used, reserved, admitted = atomic_load(&pool->portion.admitted);
    if (!admitted || !fgpu_pool_measure(pool, &used, &reserved)) return false;
    if (trim && reserved >= admitted + FGPU_BLOCK &&
        trim((CUmemoryPool)atomic_load(&pool->handle), admitted) == CUDA_SUCCESS &&
        !fgpu_pool_measure(pool, &used, &reserved))
        return false;
    fgpu_pool_credits(pool, used, reserved);
    return fgpu_give_back_above(&pool->portion, fgpu_larger(reserved, fgpu_blocks(used + atomic_load(&pool->pending))));
}

static bool is_on(const struct pool *pool, CUdevice ordinal)
{
    return atomic_load(&pool->portion.admitted) && (ordinal < 0 || atomic_load(&pool->ordinal) == ordinal);
}

/* Release the bytes that were in use in a device's pools when the pools were destroyed. */
static bool let_go(struct pool *rest)
{
    uint64_t bytes = atomic_exchange(&rest->unclaimed, 0), admitted = atomic_load(&rest->portion.admitted);
    if (bytes > admitted) bytes = admitted;
    if (!bytes) return false;
    atomic_fetch_sub(&rest->spent, bytes);
    return fgpu_give_back_above(&rest->portion, admitted - bytes);
}

/* Make pools free unused memory before a request is refused, as the driver does when a device is full. */
bool fgpu_pools_yield(CUdevice ordinal)
{
    bool more = fgpu_graphs_yield(ordinal);
    __typeof__(&cuMemPoolTrimTo) trim = REAL(cuMemPoolTrimTo);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    struct pool *pool;
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++) {
        uint64_t handle = atomic_load(&pool->handle);
        if (!is_on(pool, ordinal)) continue;
        if (!handle) {
            more |= let_go(pool);
            continue;
        }
        if (trim && handle != FGPU_NO_HANDLE) trim((CUmemoryPool)handle, 0);
        more |= settle_down(pool);
    }
    fgpu_unrelax(mode);
    errno = saved;
    return more;
}

/* A context was destroyed: measure the pools. A pool and its memory outlive contexts. Bytes that were freed in the
 * context are released now, and its streams lose their credit, because other streams may get their handles. `ordinal` <
 * 0: on any device. */
void fgpu_pools_measure(CUdevice ordinal)
{
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    struct pool *pool;
    fgpu_forget_current();
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++) {
        if (!is_on(pool, ordinal)) continue;
        forget_credits(pool);
        settle_down(pool);
        atomic_store(&pool->spent, atomic_load(&pool->portion.admitted)); /* the next call measures the pool */
    }
    fgpu_unrelax(mode);
    errno = saved;
}

/* Memory was freed, perhaps in a pool: which pool is not known, so the next waits measure all. */
void fgpu_pools_unsettled(void)
{
    struct pool *pool;
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++)
        if (is_on(pool, -1)) atomic_store_explicit(&pool->unsettled, FGPU_SYNCS, memory_order_relaxed);
}

/* Measure the pools in which memory was freed since the last measurement. Most programs have no pool at all. */
void fgpu_pools_synchronized(void)
{
    struct pool *pool;
    fgpu_freed_by_a_wait();
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++) {
        int left = atomic_load_explicit(&pool->unsettled, memory_order_relaxed);
        if (LIKELY(!left)) continue;
        atomic_store_explicit(&pool->unsettled, left - 1, memory_order_relaxed);
        fgpu_pool_trimmed(pool);
    }
}

/* -- for calls of the program that shrink a pool */

void fgpu_pool_trimmed(struct pool *pool)
{
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    settle_down(pool);
    fgpu_unrelax(mode);
    errno = saved;
}

uint64_t fgpu_pool_in_use(const struct pool *pool)
{
    uint64_t used, reserved;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    if (!fgpu_pool_measure(pool, &used, &reserved)) used = atomic_load(&pool->portion.admitted);
    fgpu_unrelax(mode);
    errno = saved;
    return used;
}

/* A pool was destroyed. Bytes that are still in use stay charged, and no call will show when they are freed. So they
 * are released before a request is refused because of them, and the agent charges those that NVML still shows. */
void fgpu_pool_destroyed(struct pool *pool, struct pool *rest, uint64_t used)
{
    fgpu_give_back_above(&pool->portion, fgpu_blocks(used));
    uint64_t left = atomic_exchange(&pool->portion.admitted, 0);
    if (rest) {
        atomic_store(&rest->portion.index, atomic_load(&pool->portion.index));
        atomic_fetch_add(&rest->unclaimed, left);
        atomic_fetch_add(&rest->spent, left);
        atomic_fetch_add(&rest->portion.admitted, left);
    }
    forget_credits(pool);
    atomic_store(&pool->spent, 0);
    atomic_store(&pool->pending, 0);
}
