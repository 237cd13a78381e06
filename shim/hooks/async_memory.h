/* async_memory.h: what free.c asks about a pointer. */
#ifndef FGPU_ASYNC_MEMORY_H
#define FGPU_ASYNC_MEMORY_H

#include "account/pool.h"

/* Return the pool that gave a pointer, and forget the pointer. NULL: no pool did, or that is not known any more. */
HIDDEN struct pool *fgpu_take_pool_of(CUdeviceptr pointer);

#endif
