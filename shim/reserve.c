/*
 * reserve.c: what memory pools hold and what the kernel granted them. Owns no table; the kernel owns the sum.
 *
 * A pool takes memory in blocks and keeps it, so it is admitted in blocks and committed at once: no probe sees a call
 * of half a microsecond. What cannot be measured is counted as held, and NVML corrects it; nothing here waits long.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "link.h"
#include "pool.h"

#define TURN_NS 10000000ULL /* a thread that died or jumped away in its turn holds it no longer than this */
#define TURN_TRIES 200

/* What the pool has in use and in all, as the driver has it. */
static bool measure(const struct pool *pool, uint64_t *used, uint64_t *reserved)
{
    __typeof__(&cuMemPoolGetAttribute) get = REAL(cuMemPoolGetAttribute);
    CUmemoryPool handle = (CUmemoryPool)atomic_load(&pool->handle);
    cuuint64_t in_use = 0, in_all = 0;
    if (!get || !handle || get(handle, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &in_use) != CUDA_SUCCESS ||
        get(handle, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &in_all) != CUDA_SUCCESS)
        return false;
    *used = in_use > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_use;
    *reserved = in_all > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_all;
    return true;
}

static uint64_t blocks(uint64_t bytes) { return (bytes + FGPU_BLOCK - 1) & ~(FGPU_BLOCK - 1); }
static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

static void forget_credits(struct pool *pool)
{
    atomic_store_explicit(&pool->unclaimed, 0, memory_order_relaxed);
    for (int i = 0; i < FGPU_CREDITS; i++) {
        atomic_store_explicit(&pool->credits[i].bytes, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->credits[i].stream, 0, memory_order_relaxed);
    }
}

/* What streams may be handed again without the pool growing. When the pool holds less than that and what is in use, it
 * was trimmed, and nobody's credit is worth anything. */
static uint64_t credits_of(struct pool *pool, uint64_t used, uint64_t reserved)
{
    uint64_t sum = used + atomic_load_explicit(&pool->unclaimed, memory_order_relaxed);
    for (int i = 0; i < FGPU_CREDITS; i++) sum += atomic_load_explicit(&pool->credits[i].bytes, memory_order_relaxed);
    if (sum <= reserved) return sum - used;
    forget_credits(pool);
    return 0;
}

/* Down to `keep`; true when there was more. */
static bool give_back_above(struct pool *pool, uint64_t keep)
{
    uint64_t admitted = atomic_load(&pool->admitted);
    while (admitted > keep)
        if (atomic_compare_exchange_weak(&pool->admitted, &admitted, keep)) {
            fgpu_give_back(atomic_load(&pool->index), admitted - keep);
            return true;
        }
    return false;
}

/* Up to `need`. The grant may be more than was asked: it is what the driver takes for that. */
static CUresult ask_up_to(struct pool *pool, uint64_t need, struct patience *patience)
{
    uint64_t admitted = atomic_load(&pool->admitted);
    if (need <= admitted) return CUDA_SUCCESS;
    CUdevice ordinal = atomic_load(&pool->ordinal);
    struct admission admission = fgpu_admission_with(patience, ordinal, need - admitted, FGPU_POOL);
    if (admission.index >= 0) {
        atomic_store(&pool->index, admission.index);
        atomic_fetch_add(&pool->admitted, admission.bytes);
    }
    return admission.refusal;
}

/* What the pool will hold: whole blocks of what is in use, being handed out, and free for one stream alone. */
static bool forecast(struct pool *pool, uint64_t *exact, uint64_t *need)
{
    uint64_t used, reserved;
    if (!measure(pool, &used, &reserved)) return false;
    *exact = used + credits_of(pool, used, reserved) + atomic_load(&pool->pending);
    *need = larger(reserved, blocks(*exact));
    atomic_store(&pool->spent, *exact);
    return true;
}

static bool fits(const struct pool *pool, uint64_t need)
{
    uint64_t admitted = atomic_load(&pool->admitted);
    return need <= admitted || need - admitted <= fgpu_room(atomic_load(&pool->ordinal));
}

/* In whole units that an admission is rounded to: more would not fit. */
static uint64_t room_left(const struct pool *pool)
{
    CUdevice ordinal = atomic_load(&pool->ordinal);
    uint64_t granule = fgpu_granule(ordinal), room = fgpu_room(ordinal);
    if (room >= FGPU_BLOCK) return 0;
    return granule ? room & ~(granule - 1) : room;
}

/* With the turn, or after waiting long enough for it: then both may ask too much, which the next measure gives back. */
static CUresult grow(struct pool *pool)
{
    struct patience patience = {0};
    uint64_t exact, need;
    if (!forecast(pool, &exact, &need)) return ask_up_to(pool, atomic_load(&pool->spent), &patience);
    if (need + FGPU_BLOCK <= atomic_load(&pool->admitted)) give_back_above(pool, need); /* trimmed since */
    if (fits(pool, need)) return ask_up_to(pool, need, &patience);
    fgpu_pools_yield(atomic_load(&pool->ordinal));
    if (!forecast(pool, &exact, &need)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (fits(pool, need)) return ask_up_to(pool, need, &patience);
    /* Too near the limit for a whole block: what is in use may still fit. All that is left is asked for, since the pool
     * takes its block all the same. More than a block beyond what was granted is memory that the pool took in some
     * other way, and no reason to hand out more. */
    CUresult refusal = ask_up_to(pool, larger(exact, atomic_load(&pool->admitted) + room_left(pool)), &patience);
    if (refusal) refusal = ask_up_to(pool, exact, &patience);
    return !refusal && need >= atomic_load(&pool->admitted) + FGPU_BLOCK ? CUDA_ERROR_OUT_OF_MEMORY : refusal;
}

uint64_t fgpu_take_turn(_Atomic uint64_t *busy_until_ns)
{
    for (int i = 0; i < TURN_TRIES; i++) {
        uint64_t now = fgpu_now(), until = now + TURN_NS, was = atomic_load(busy_until_ns);
        if (was <= now && atomic_compare_exchange_strong(busy_until_ns, &was, until)) return until;
        syscall(SYS_sched_yield);
    }
    return 0;
}

void fgpu_end_turn(_Atomic uint64_t *busy_until_ns, uint64_t turn)
{
    if (turn) atomic_compare_exchange_strong(busy_until_ns, &turn, 0);
}

CUresult fgpu_pool_grow(struct pool *pool, uint64_t bytes)
{
    enum fgpu_link link = fgpu_look().link;
    atomic_fetch_add(&pool->pending, bytes);
    if (link == FGPU_OPEN || link == FGPU_UNMANAGED) {
        atomic_store(&pool->spent, 0); /* nobody counts; whoever begins to will measure */
        return CUDA_SUCCESS;
    }
    CUresult refusal = CUDA_ERROR_OUT_OF_MEMORY;
    if (link == FGPU_HELD && bytes <= FGPU_MOST_BYTES) {
        int saved = errno;
        CUstreamCaptureMode mode = fgpu_relax();
        uint64_t turn = fgpu_take_turn(&pool->busy_until_ns);
        refusal = grow(pool);
        fgpu_end_turn(&pool->busy_until_ns, turn);
        fgpu_unrelax(mode);
        errno = saved;
    }
    if (refusal) atomic_fetch_sub(&pool->pending, bytes);
    return refusal;
}

/* The driver has answered. What it really took is asked for now; a refusal is too late and shows at the next growth. */
void fgpu_pool_grown(struct pool *pool, uint64_t bytes)
{
    uint64_t used, reserved;
    enum fgpu_link link = fgpu_look().link;
    atomic_fetch_sub(&pool->pending, bytes);
    if (link != FGPU_HELD) return;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    if (measure(pool, &used, &reserved) && reserved >= atomic_load(&pool->admitted) + FGPU_BLOCK &&
        ask_up_to(pool, reserved, NULL))
        atomic_store(&pool->spent, atomic_load(&pool->admitted)); /* none goes by unmeasured from here */
    fgpu_unrelax(mode);
    errno = saved;
}

/* What the pool no longer holds goes back; calls that were granted and have not returned keep theirs. */
static bool settle_down(struct pool *pool)
{
    uint64_t used, reserved;
    if (!atomic_load(&pool->admitted) || !measure(pool, &used, &reserved)) return false;
    credits_of(pool, used, reserved);
    return give_back_above(pool, larger(reserved, blocks(used + atomic_load(&pool->pending))));
}

static bool is_on(const struct pool *pool, CUdevice ordinal)
{
    return atomic_load(&pool->admitted) && (ordinal < 0 || atomic_load(&pool->ordinal) == ordinal);
}

/* Of a device's rest: what was in use of pools when they were destroyed. */
static bool let_go(struct pool *rest)
{
    uint64_t bytes = atomic_exchange(&rest->unclaimed, 0), admitted = atomic_load(&rest->admitted);
    if (bytes > admitted) bytes = admitted;
    if (!bytes) return false;
    atomic_fetch_sub(&rest->spent, bytes);
    return give_back_above(rest, admitted - bytes);
}

/* As the driver does when a device is full: pools let go of what nobody uses before anybody is refused. */
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
        if (trim) trim((CUmemoryPool)handle, 0);
        more |= settle_down(pool);
    }
    fgpu_unrelax(mode);
    errno = saved;
    return more;
}

/* A pool and its memory outlive contexts. What was freed in one that ended goes then, and its streams have no credit
 * any more: their handles may be others' next. `ordinal` < 0: of any device. */
void fgpu_pools_measure(CUdevice ordinal)
{
    fgpu_graphs_measure(ordinal);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    struct pool *pool;
    fgpu_forget_current();
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++) {
        if (!is_on(pool, ordinal)) continue;
        forget_credits(pool);
        settle_down(pool);
        atomic_store(&pool->spent, atomic_load(&pool->admitted)); /* the next call measures */
    }
    fgpu_unrelax(mode);
    errno = saved;
}

/* Only where something was freed since, and most programs have no pool at all. */
void fgpu_pools_synchronized(void)
{
    struct pool *pool;
    for (unsigned i = 0; (pool = fgpu_pool_number(i)); i++) {
        int left = atomic_load_explicit(&pool->unsettled, memory_order_relaxed);
        if (LIKELY(!left)) continue;
        atomic_store_explicit(&pool->unsettled, left - 1, memory_order_relaxed);
        fgpu_pool_trimmed(pool);
    }
}

/* -- what pools.c tells of the program's own calls */

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
    if (!measure(pool, &used, &reserved)) used = atomic_load(&pool->admitted);
    fgpu_unrelax(mode);
    errno = saved;
    return used;
}

/* What is still in use stays charged, and nobody will see it freed: so it is let go before anybody is refused for it,
 * and NVML charges what of it is still there. */
void fgpu_pool_destroyed(struct pool *pool, struct pool *rest, uint64_t used)
{
    give_back_above(pool, blocks(used));
    uint64_t left = atomic_exchange(&pool->admitted, 0);
    if (rest) {
        atomic_store(&rest->index, atomic_load(&pool->index));
        atomic_fetch_add(&rest->unclaimed, left);
        atomic_fetch_add(&rest->spent, left);
        atomic_fetch_add(&rest->admitted, left);
    }
    forget_credits(pool);
    atomic_store(&pool->spent, 0);
    atomic_store(&pool->pending, 0);
}
