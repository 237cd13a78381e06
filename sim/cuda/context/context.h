/* Contexts: their beginning and their end. */
#ifndef FGPU_SIM_CUDA_CONTEXT_CONTEXT_H
#define FGPU_SIM_CUDA_CONTEXT_CONTEXT_H

#include "cuda/core/driver.h"

/* context.c */

/* Makes a context on the device, and on the server. */
CUresult context_begin(struct context *context, int device, unsigned flags);

/* primary.c. The caller has the lock. */

/* Adds a reference to the primary context. The first reference begins the context. A green context has a reference. */
CUresult primary_retain(int device);
/* Removes a reference. The primary context ends with the last. */
void primary_leave(int device);

/* teardown.c */

/* Ends a context and everything in it. */
void context_stop(struct context *context);

/* peer.c */

/* Removes the context from the peers of others, and frees its own. */
void peers_end(struct context *context);

#endif
