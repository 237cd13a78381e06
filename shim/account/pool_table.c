/*
 * pool_table.c: the memory pools of this process. Owns their table, which is mapped at the first use of a pool.
 * pool_shrink.c and pool_growth.c maintain the numbers in it.
 */
#include <errno.h>

#include "account/pool.h"

#define POOLS 32

struct table {
    struct pool pools[POOLS + FGPU_DEVICES]; /* the last entries: one for all further pools of each device */
    _Atomic(struct pool *) current[FGPU_DEVICES];
};
static _Atomic(void *) table;        /* mapped at the first use of a pool; most programs use none */
static _Atomic uint32_t generations; /* continues after a fork, so that the parent's notes become invalid */
static struct pool nowhere = {.ordinal = FGPU_NO_TABLE};

static struct table *known_table(void) { return atomic_load_explicit(&table, memory_order_acquire); }

static struct table *own_table(void)
{
    struct table *known = known_table();
    return LIKELY(known) ? known : fgpu_table(&table, sizeof *known);
}

unsigned fgpu_pool_slot(const struct pool *pool) { return (unsigned)(pool - known_table()->pools); }

struct pool *fgpu_pool_number(unsigned n)
{
    struct table *known = known_table();
    return known && n < POOLS + FGPU_DEVICES ? &known->pools[n] : NULL;
}

struct pool *fgpu_pool_at(unsigned slot, uint32_t generation)
{
    struct pool *pool = fgpu_pool_number(slot);
    return pool && atomic_load_explicit(&pool->generation, memory_order_relaxed) == generation ? pool : NULL;
}

struct pool *fgpu_pool_find(CUmemoryPool handle)
{
    struct pool *pools = fgpu_pool_number(0);
    for (unsigned i = 0; pools && i < POOLS; i++)
        if (atomic_load_explicit(&pools[i].handle, memory_order_acquire) == (uint64_t)handle) return &pools[i];
    return NULL;
}

/* Return the entry for all pools of a device without room in the table. It counts as a pool that cannot be measured:
 * its admitted bytes grow, and only the bytes of destroyed pools are released. */
struct pool *fgpu_pool_rest(CUdevice ordinal)
{
    struct pool *pools = fgpu_pool_number(0);
    if (!pools || ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    struct pool *rest = &pools[POOLS + ordinal];
    atomic_store(&rest->ordinal, ordinal);
    return rest;
}

struct pool *fgpu_pool_enter(CUmemoryPool handle, CUdevice ordinal)
{
    struct table *own = own_table();
    if (!own) return &nowhere;
    for (unsigned i = 0; i < POOLS; i++) {
        struct pool *pool = &own->pools[i];
        uint64_t none = 0;
        if (!atomic_compare_exchange_strong(&pool->handle, &none, 1))
            continue; /* 1: the driver never returns this
                         handle */
        atomic_store(&pool->ordinal, ordinal);
        atomic_store(&pool->generation, atomic_fetch_add(&generations, 1) + 1);
        atomic_store_explicit(&pool->handle, (uint64_t)handle, memory_order_release);
        return pool;
    }
    return fgpu_pool_rest(ordinal);
}

/* Return the entry of a pool. A pool that is not in the table yet is a device's default pool, or counts as a pool of
 * the current device. */
struct pool *fgpu_pool_of(CUmemoryPool handle)
{
    struct pool *pool = fgpu_pool_find(handle);
    if (LIKELY(pool)) return pool;
    CUdevice ordinal;
    if (!fgpu_current(&ordinal)) return NULL;
    __typeof__(&cuDeviceGetDefaultMemPool) get = REAL(cuDeviceGetDefaultMemPool);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    for (CUdevice other = 0; get && other < FGPU_DEVICES; other++) {
        CUmemoryPool its;
        if (get(&its, other) != CUDA_SUCCESS) break;
        if (its == handle) ordinal = other;
    }
    fgpu_unrelax(mode);
    errno = saved;
    return fgpu_pool_enter(handle, ordinal);
}

/* Return the pool from which a device's calls allocate that name no pool; NULL: the driver does not report it, and will
 * refuse the call. */
struct pool *fgpu_current_pool(CUdevice ordinal)
{
    if (ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    struct table *own = own_table();
    if (!own) return &nowhere;
    struct pool *pool = atomic_load_explicit(&own->current[ordinal], memory_order_relaxed);
    if (LIKELY(pool)) return pool;
    __typeof__(&cuDeviceGetMemPool) get = REAL(cuDeviceGetMemPool);
    CUmemoryPool handle;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult result = get ? get(&handle, ordinal) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_unrelax(mode);
    errno = saved;
    if (result != CUDA_SUCCESS) return NULL;
    pool = fgpu_pool_find(handle);
    if (!pool) pool = fgpu_pool_enter(handle, ordinal);
    atomic_store_explicit(&own->current[ordinal], pool, memory_order_relaxed);
    return pool;
}

void fgpu_forget_current(void)
{
    struct table *known = known_table();
    for (int i = 0; known && i < FGPU_DEVICES; i++) atomic_store(&known->current[i], NULL);
}
