/* Pools of stream-ordered allocations, and what it takes to share them. */
#ifndef FGPU_SIM_CUDA_POOL_H
#define FGPU_SIM_CUDA_POOL_H

#include "cuda_state.h"

struct pool {
    int device;
    bool is_default;
    bool is_destroyed; /* by its program, while something of it was in use */
    bool is_shareable; /* by a file descriptor */
    bool is_imported;  /* allocates nothing; its memory is another pool's */
    uint64_t key[2];   /* not 0: other processes may have it */
    uint64_t reserved, used, reserved_high, used_high;
    uint64_t n_imported; /* allocations, of an imported pool */
    uint64_t threshold;
    int reuse[3]; /* event dependencies, opportunistic, internal dependencies */
    struct pool *next;
};

/* cuda_pool.c */
struct pool *pool_new(int device);
bool pool_is_known(const struct pool *pool);
CUresult pool_enter(CUmemoryPool handle, struct pool **pool); /* with the lock held afterwards */

#endif
