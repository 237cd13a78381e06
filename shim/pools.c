/*
 * pools.c: which pool is meant. Owns the table of this process's pools, mapped when the first one is used; reserve.c
 * keeps their part of the ledger.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "pool.h"

#define POOLS 32

struct table {
    struct pool pools[POOLS + FGPU_DEVICES]; /* the last ones: all further pools of a device in one */
    _Atomic(struct pool *) current[FGPU_DEVICES];
};
static _Atomic(void *) table;        /* mapped when a first pool is used; most programs use none */
static _Atomic uint32_t generations; /* goes on after a fork, so that the parent's notes are worth nothing */
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

static struct pool *find(CUmemoryPool handle)
{
    struct pool *pools = fgpu_pool_number(0);
    for (unsigned i = 0; pools && i < POOLS; i++)
        if (atomic_load_explicit(&pools[i].handle, memory_order_acquire) == (uint64_t)handle) return &pools[i];
    return NULL;
}

/* All pools of a device that found no room, as one that cannot be measured: what it was granted only grows. */
static struct pool *rest_of(CUdevice ordinal)
{
    struct pool *pools = fgpu_pool_number(0);
    if (!pools || ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    struct pool *rest = &pools[POOLS + ordinal];
    atomic_store(&rest->ordinal, ordinal);
    return rest;
}

static struct pool *enter(CUmemoryPool handle, CUdevice ordinal)
{
    struct table *own = own_table();
    if (!own) return &nowhere;
    for (unsigned i = 0; i < POOLS; i++) {
        struct pool *pool = &own->pools[i];
        uint64_t none = 0;
        if (!atomic_compare_exchange_strong(&pool->handle, &none, 1)) continue; /* 1: no handle that a driver gives */
        atomic_store(&pool->ordinal, ordinal);
        atomic_store(&pool->generation, atomic_fetch_add(&generations, 1) + 1);
        atomic_store_explicit(&pool->handle, (uint64_t)handle, memory_order_release);
        return pool;
    }
    return rest_of(ordinal);
}

/* A pool that nobody saw being made is a device's default, or lives where the program is now. */
struct pool *fgpu_pool_of(CUmemoryPool handle)
{
    struct pool *pool = find(handle);
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
    return enter(handle, ordinal);
}

/* The pool from which a device's plain calls are served; NULL: the driver does not say, and will refuse the call. */
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
    pool = find(handle);
    if (!pool) pool = enter(handle, ordinal);
    atomic_store_explicit(&own->current[ordinal], pool, memory_order_relaxed);
    return pool;
}

void fgpu_forget_current(void)
{
    struct table *known = known_table();
    for (int i = 0; known && i < FGPU_DEVICES; i++) atomic_store(&known->current[i], NULL);
}

/* -- pools themselves */

EXPORT CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *poolProps)
{
    __typeof__(&cuMemPoolCreate) driver = REAL(cuMemPoolCreate);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(pool, poolProps);
    if (result != CUDA_SUCCESS || !pool || !poolProps) return result;
    switch ((int)poolProps->location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
        enter(*pool, poolProps->location.id);
        break;
    case CU_MEM_LOCATION_TYPE_HOST:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT:
        enter(*pool, FGPU_HOST_POOL);
        break;
    default: /* managed, of no place: of the program's device when it first takes something */
        break;
    }
    return result;
}

EXPORT CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
    __typeof__(&cuMemPoolDestroy) driver = REAL(cuMemPoolDestroy);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    struct pool *entry = pool ? find(pool) : NULL;
    uint64_t used = entry ? fgpu_pool_in_use(entry) : 0;
    CUresult result = driver(pool);
    if (result != CUDA_SUCCESS || !entry) return result;
    fgpu_forget_current();
    fgpu_pool_destroyed(entry, rest_of(atomic_load(&entry->ordinal)), used);
    atomic_store(&entry->generation, 0);
    atomic_store_explicit(&entry->handle, 0, memory_order_release);
    return result;
}

EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t minBytesToKeep)
{
    __typeof__(&cuMemPoolTrimTo) driver = REAL(cuMemPoolTrimTo);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(pool, minBytesToKeep);
    struct pool *entry = result == CUDA_SUCCESS && pool ? find(pool) : NULL;
    if (entry) fgpu_pool_trimmed(entry);
    return result;
}

EXPORT CUresult cuDeviceSetMemPool(CUdevice dev, CUmemoryPool pool)
{
    __typeof__(&cuDeviceSetMemPool) driver = REAL(cuDeviceSetMemPool);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(dev, pool);
    fgpu_forget_current();
    return result;
}

EXPORT CUresult cuMemSetMemPool(CUmemLocation *location, CUmemAllocationType type, CUmemoryPool pool)
{
    __typeof__(&cuMemSetMemPool) driver = REAL(cuMemSetMemPool);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(location, type, pool);
    fgpu_forget_current();
    return result;
}
