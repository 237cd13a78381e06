/* async_memory.h: a lookup of pointers, for free.c. */
#ifndef FGPU_ASYNC_MEMORY_H
#define FGPU_ASYNC_MEMORY_H

#include "account/pool.h"

/* Return the pool that gave a pointer, and forget the pointer. NULL: no pool did, or its note was lost. */
HIDDEN struct pool *fgpu_take_pool_of(CUdeviceptr pointer);

#endif
