/*
 * pool_table.c: the memory pools of this process. Owns their table, which is mapped at the first use of a pool.
 * pool_shrink.c and pool_growth.c maintain the numbers in it.
 */
#include <errno.h>

#include "account/pool.h"

#define POOLS 256
#define ENTRIES (FGPU_DEVICES + POOLS)

struct table {
    struct pool pools[ENTRIES]; /* the first entries: one for the destroyed pools of each device */
    _Atomic(struct pool *) current[FGPU_DEVICES];
    _Atomic uint32_t choices; /* how often the current pools were forgotten */
    _Atomic uint32_t used;    /* entries that have had a pool */
    _Atomic uint64_t busy_until_ns;
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
    return known && n < FGPU_DEVICES + atomic_load_explicit(&known->used, memory_order_relaxed) ? &known->pools[n]
                                                                                                : NULL;
}

struct pool *fgpu_pool_at(unsigned slot, uint32_t generation)
{
    struct pool *pool = fgpu_pool_number(slot);
    return pool && atomic_load_explicit(&pool->generation, memory_order_relaxed) == generation ? pool : NULL;
}

struct pool *fgpu_pool_find(CUmemoryPool handle)
{
    struct pool *pool;
    for (unsigned i = FGPU_DEVICES; (pool = fgpu_pool_number(i)); i++)
        if (atomic_load_explicit(&pool->handle, memory_order_acquire) == (uint64_t)handle) return pool;
    return NULL;
}

struct pool *fgpu_pool_rest(CUdevice ordinal)
{
    struct table *known = known_table();
    if (!known || ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    atomic_store(&known->pools[ordinal].ordinal, ordinal);
    return &known->pools[ordinal];
}

/* Return the entry of a pool that was created or found. Two threads may find the same pool, so they take turns. A pool
 * without room in the table gets no memory while a limit is in force. */
struct pool *fgpu_pool_enter(CUmemoryPool handle, CUdevice ordinal)
{
    struct table *own = own_table();
    if (!own) return &nowhere;
    int saved = errno;
    uint64_t turn = fgpu_take_turn(&own->busy_until_ns), none;
    struct pool *pool = fgpu_pool_find(handle);
    for (unsigned i = 0; !pool && i < POOLS; i++) {
        if (atomic_load(&own->used) <= i) atomic_store(&own->used, i + 1);
        none = 0;
        if (atomic_compare_exchange_strong(&own->pools[FGPU_DEVICES + i].handle, &none, FGPU_NO_HANDLE))
            pool = &own->pools[FGPU_DEVICES + i];
    }
    if (!pool) {
        pool = &nowhere;
    } else {
        atomic_store(&pool->ordinal, ordinal);
        if (!atomic_load(&pool->generation)) atomic_store(&pool->generation, atomic_fetch_add(&generations, 1) + 1);
        atomic_store_explicit(&pool->handle, (uint64_t)handle, memory_order_release);
    }
    fgpu_end_turn(&own->busy_until_ns, turn);
    errno = saved;
    return pool;
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
    uint32_t choices;
    do { /* again, if another thread has chosen a pool since the driver was asked */
        choices = atomic_load(&own->choices);
        int saved = errno;
        CUstreamCaptureMode mode = fgpu_relax();
        CUresult result = get ? get(&handle, ordinal) : CUDA_ERROR_NOT_SUPPORTED;
        fgpu_unrelax(mode);
        errno = saved;
        if (result != CUDA_SUCCESS) return NULL;
        pool = fgpu_pool_enter(handle, ordinal);
        atomic_store(&own->current[ordinal], pool);
    } while (atomic_load(&own->choices) != choices);
    return pool;
}

void fgpu_forget_current(void)
{
    struct table *known = known_table();
    if (known) atomic_fetch_add(&known->choices, 1); /* first: a thread that stores its pool now asks again */
    for (int i = 0; known && i < FGPU_DEVICES; i++) atomic_store(&known->current[i], NULL);
}
