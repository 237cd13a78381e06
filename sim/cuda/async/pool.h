/* Pools of stream-ordered allocations, and sharing them. */
#ifndef FGPU_SIM_CUDA_ASYNC_POOL_H
#define FGPU_SIM_CUDA_ASYNC_POOL_H

#include "cuda/memory/memory.h"

struct pool {
    int device;
    bool is_default;
    bool is_destroyed; /* by the program, while memory of the pool was in use */
    bool is_shareable; /* by a file descriptor */
    bool is_imported;  /* allocates nothing; its memory belongs to a pool of another process */
    uint64_t key[2];   /* not 0: other processes may have opened it */
    uint64_t unseen;   /* bytes that cuMemFree has freed: the real driver counts them as used for ever */
    uint64_t reserved, used, reserved_high, used_high;
    uint64_t n_imported; /* of an imported pool: its allocations that this process has opened */
    uint64_t threshold;
    int reuse[3]; /* event dependencies, opportunistic, internal dependencies */
    struct pool *next;
};

struct pool *pool_new(int device);
bool pool_is_known(const struct pool *pool);
/* Takes the lock, and finds a pool. */
CUresult pool_enter(CUmemoryPool handle, struct pool **pool);
/* Frees an allocation of a pool at once, as cuMemFree does: for struct range's `free`. */
CUresult pool_free(struct range *range);
/* Frees the memory that a synchronisation with a stream, or with the context (NULL), frees: reserves of pools above
 * their thresholds, and other memory after its cuMemFreeAsync. */
void pools_settle(struct context *context, const struct stream *stream);

#endif
