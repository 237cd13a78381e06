/*
 * pool_growth.c: admissions for memory pools. Owns nothing; the kernel owns the sum.
 *
 * A pool allocates memory in blocks and keeps it. So it is admitted in blocks, committed at once: a call of half a
 * microsecond has no probe. A pool that cannot be measured keeps what was admitted for it, and the agent charges what
 * NVML shows beyond that. The growth of a pool may wait as long as any request (reclaim.c).
 */
#include <errno.h>

#include "account/pool.h"
#include "link/link.h"

static CUresult ask_up_to(struct pool *pool, uint64_t need, struct patience *patience)
{
    return fgpu_ask_up_to(&pool->portion, atomic_load(&pool->ordinal), need, patience);
}

/* Compute what the pool will hold: whole blocks for the bytes in use, the bytes being given out, and the bytes that are
 * free for one stream alone. Returns false if the pool cannot be measured. */
static bool forecast(struct pool *pool, uint64_t *exact, uint64_t *need)
{
    uint64_t used, reserved;
    if (!fgpu_pool_measure(pool, &used, &reserved)) return false;
    *exact = used + fgpu_pool_credits(pool, used, reserved) + atomic_load(&pool->pending);
    *need = fgpu_larger(reserved, fgpu_blocks(*exact));
    atomic_store(&pool->spent, *exact);
    return true;
}

static bool fits(const struct pool *pool, uint64_t need)
{
    uint64_t admitted = atomic_load(&pool->portion.admitted);
    return need <= admitted || need - admitted <= fgpu_room(atomic_load(&pool->ordinal)).left;
}

/* Return the remaining room, in whole units of an admission: more would not fit. 0: there is room for a whole block. */
static uint64_t room_left(const struct pool *pool)
{
    CUdevice ordinal = atomic_load(&pool->ordinal);
    uint64_t granule = fgpu_granule(ordinal), room = fgpu_room(ordinal).left;
    if (room >= FGPU_BLOCK) return 0;
    return granule ? room & ~(granule - 1) : room;
}

/* Request what the pool needs. The caller has the turn, or has waited for it long enough. In the second case two
 * threads may both request too much, which the next measurement releases. */
static CUresult grow(struct pool *pool)
{
    struct patience patience = {0};
    uint64_t exact, need;
    if (!forecast(pool, &exact, &need)) return ask_up_to(pool, atomic_load(&pool->spent), &patience);
    if (need + FGPU_BLOCK <= atomic_load(&pool->portion.admitted))
        fgpu_give_back_above(&pool->portion, need); /* the pool was trimmed since */
    if (fits(pool, need)) return ask_up_to(pool, need, &patience);
    fgpu_pools_yield(atomic_load(&pool->ordinal));
    if (!forecast(pool, &exact, &need)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (fits(pool, need)) return ask_up_to(pool, need, &patience);
    /* Too near the limit for a whole block, but the bytes in use may still fit. Request all that is left, since the
     * pool allocates a block in any case. If the pool has a block or more beyond the admitted bytes, it got that in
     * another way, and nothing more is admitted here. */
    CUresult refusal =
        ask_up_to(pool, fgpu_larger(exact, atomic_load(&pool->portion.admitted) + room_left(pool)), &patience);
    if (refusal) refusal = ask_up_to(pool, exact, &patience);
    return !refusal && need >= atomic_load(&pool->portion.admitted) + FGPU_BLOCK ? CUDA_ERROR_OUT_OF_MEMORY : refusal;
}

CUresult fgpu_pool_grow(struct pool *pool, uint64_t bytes)
{
    enum fgpu_link link = fgpu_look().link;
    atomic_fetch_add(&pool->pending, bytes);
    if (link == FGPU_OPEN || link == FGPU_UNMANAGED) {
        atomic_store(&pool->spent, 0); /* no ledger counts this; the first growth with a ledger measures the pool */
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

/* Return whether the pool holds a block or more beyond the admitted bytes, and gets no admission for it. */
static bool is_beyond(struct pool *pool, struct patience *patience)
{
    uint64_t used, reserved;
    return fgpu_pool_measure(pool, &used, &reserved) && reserved >= atomic_load(&pool->portion.admitted) + FGPU_BLOCK &&
           ask_up_to(pool, reserved, patience) != CUDA_SUCCESS;
}

/* The driver has returned. Request the bytes that it really allocated: a fragmented pool takes new blocks although it
 * has as many free bytes. After a refusal the caller returns the memory to the pool, and each later call measures. */
CUresult fgpu_pool_grown(struct pool *pool, uint64_t bytes)
{
    bool beyond = false;
    enum fgpu_link link = fgpu_look().link;
    atomic_fetch_sub(&pool->pending, bytes);
    atomic_store_explicit(&pool->given, 0, memory_order_relaxed);
    if (link != FGPU_HELD) return CUDA_SUCCESS;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    if (is_beyond(pool, NULL)) {
        struct patience patience = {0};
        fgpu_pools_yield(atomic_load(&pool->ordinal));
        beyond = is_beyond(pool, &patience);
    }
    if (beyond) atomic_store(&pool->spent, atomic_load(&pool->portion.admitted));
    fgpu_unrelax(mode);
    errno = saved;
    return beyond ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
