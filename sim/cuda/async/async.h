/* Work in streams, which a capture can record: launches and events. */
#ifndef FGPU_SIM_CUDA_ASYNC_ASYNC_H
#define FGPU_SIM_CUDA_ASYNC_ASYNC_H

#include "cuda/code/code.h"
#include "cuda/stream/stream.h"

/* launch.c */

/* Gives a checked kernel to a stream. */
CUresult kernel_begin(struct context *context, struct stream *stream, const struct kernel_run *run);

/* event.c */

/* Frees the events of a context. */
void events_end(struct context *context);

#endif
