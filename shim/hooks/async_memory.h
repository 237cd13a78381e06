/* async_memory.h: a lookup of pointers, for free.c. */
#ifndef FGPU_ASYNC_MEMORY_H
#define FGPU_ASYNC_MEMORY_H

#include "account/pool.h"

/* Return the pool that returned a pointer, and delete the pointer's note. NULL: no pool returned the pointer, or the
 * note was lost. */
HIDDEN struct pool *fgpu_take_pool_of(CUdeviceptr pointer);

#endif
