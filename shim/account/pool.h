/* pool.h: memory pools of this process and their part of the ledger. */
#ifndef FGPU_POOL_H
#define FGPU_POOL_H

#include "account/account.h"

#define FGPU_BLOCK (32ULL << 20) /* the step in which a pool takes memory from its device (measured) */
#define FGPU_CREDITS 8

#define FGPU_UNMEASURED (8ULL << 20) /* given out, perhaps not from a freed piece, until the pool is measured */

/* Bytes freed by one stream: a pool may give them to the same stream again at once, and to no other. `bytes` are in
 * pieces of `piece` bytes without gaps, each of which serves a request of at most that size: a pool does not move
 * memory, and takes more of the device for a larger request. `rest` was freed in smaller pieces. */
struct credit {
    _Atomic uint64_t stream, bytes, piece, rest;
};

struct pool {
    _Atomic uint64_t handle;     /* 0: no pool; an entry for destroyed pools always has 0 */
    _Atomic int ordinal;         /* the driver's device, FGPU_HOST_POOL or FGPU_NO_TABLE */
    _Atomic uint32_t generation; /* a new number whenever the entry is used for another pool; 0: it has none */
    struct portion portion;
    _Atomic uint64_t spent;   /* upper bound of the bytes in use: as measured last, and all given out since */
    _Atomic uint64_t pending; /* admitted for calls that have not returned yet */
    _Atomic uint64_t busy_until_ns;
    _Atomic uint64_t unclaimed; /* freed by streams without room in the table of credits */
    _Atomic uint64_t given;     /* since the pool was last measured, perhaps not from a freed piece */
    _Atomic int unsettled;      /* synchronisations that may still shrink the pool */
    struct credit credits[FGPU_CREDITS];
};
#define FGPU_NO_HANDLE 1    /* of an entry that is taken: the driver neither returns this handle nor gets it */
#define FGPU_HOST_POOL (-2) /* not device memory: not charged */
#define FGPU_NO_TABLE                                                                                                  \
    (-3) /* no room in the table, or no memory for it: nothing is admitted where a limit is in force */

/* -- pool_table.c */
HIDDEN struct pool *fgpu_pool_of(CUmemoryPool handle);
HIDDEN struct pool *fgpu_pool_find(CUmemoryPool handle); /* NULL: it is not in the table */
HIDDEN struct pool *fgpu_pool_enter(CUmemoryPool handle, CUdevice ordinal);
HIDDEN struct pool *fgpu_pool_rest(CUdevice ordinal); /* the entry for the destroyed pools of a device */
HIDDEN struct pool *fgpu_current_pool(CUdevice ordinal);
HIDDEN struct pool *fgpu_pool_number(unsigned n);                     /* NULL: there are no more */
HIDDEN struct pool *fgpu_pool_at(unsigned slot, uint32_t generation); /* NULL: the entry has another pool now */
HIDDEN unsigned fgpu_pool_slot(const struct pool *pool);
HIDDEN void fgpu_forget_current(void);

/* -- pool_shrink.c; account.h declares fgpu_pools_yield */
HIDDEN bool fgpu_pool_measure(const struct pool *pool, uint64_t *used, uint64_t *reserved);
HIDDEN uint64_t fgpu_pool_credits(struct pool *pool, uint64_t used, uint64_t reserved);
HIDDEN void fgpu_pools_measure(CUdevice ordinal); /* a context was destroyed; < 0: on any device */
HIDDEN void fgpu_pools_unsettled(void);
HIDDEN void fgpu_pools_synchronized(void);
HIDDEN void fgpu_pool_trimmed(struct pool *pool);
HIDDEN uint64_t fgpu_pool_in_use(const struct pool *pool);
HIDDEN void fgpu_pool_destroyed(struct pool *pool, struct pool *rest, uint64_t used);

static inline uint64_t fgpu_blocks(uint64_t bytes) { return (bytes + FGPU_BLOCK - 1) & ~(FGPU_BLOCK - 1); }
static inline uint64_t fgpu_larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* -- pool_growth.c */
HIDDEN CUresult fgpu_pool_grow(struct pool *pool, uint64_t bytes);  /* `bytes` are pending until fgpu_pool_grown */
HIDDEN CUresult fgpu_pool_grown(struct pool *pool, uint64_t bytes); /* `bytes` were pending */

#endif
