/* stream.h: facts about streams. */
#ifndef FGPU_STREAM_H
#define FGPU_STREAM_H

#include "account/account.h"

/* -- stream.c */
extern HIDDEN _Atomic int
    fgpu_sole_device; /* 0: no context known yet; n + 1: on device n alone; -1: on several devices */
extern HIDDEN _Atomic bool
    fgpu_streams_captured; /* this program captures streams: captured work allocates no pool memory */
HIDDEN bool fgpu_ask_capturing(CUstream stream, bool per_thread);
HIDDEN bool fgpu_ask_device_of(CUstream stream, bool per_thread, CUdevice *ordinal);
HIDDEN void fgpu_device_seen(CUdevice ordinal); /* a context exists there */

extern HIDDEN __thread uint64_t fgpu_thread_key __attribute__((tls_model("initial-exec"))); /* 0: none yet */
HIDDEN uint64_t fgpu_number_thread(void);

/* Return the key of this thread's default stream. The pointer of a thread is no key: a new thread may have the pointer
 * of an ended one, and has another stream. */
static inline uint64_t fgpu_this_thread(void)
{
    return LIKELY(fgpu_thread_key) ? fgpu_thread_key : fgpu_number_thread();
}

/* Return a key of the stream, never 0. A stream has a handle. The default stream of a thread has none. */
static inline uint64_t fgpu_stream_key(CUstream stream, bool per_thread)
{
    if (stream == CU_STREAM_PER_THREAD || (!stream && per_thread)) return fgpu_this_thread();
    return stream ? (uint64_t)stream : (uint64_t)CU_STREAM_LEGACY;
}

/* Return whether the stream captures. For programs that capture no stream this is one load. */
static inline bool fgpu_is_capturing(CUstream stream, bool per_thread)
{
    return !LIKELY(!atomic_load_explicit(&fgpu_streams_captured, memory_order_relaxed)) &&
           fgpu_ask_capturing(stream, per_thread);
}

/* Find the device of a stream that does not capture: in every mode, asking the driver would break a capture. Returns
 * false if the device is not known. */
static inline bool fgpu_device_of(CUstream stream, bool per_thread, CUdevice *ordinal)
{
    int one = atomic_load_explicit(&fgpu_sole_device, memory_order_relaxed);
    *ordinal = one - 1;
    return one > 0 || fgpu_ask_device_of(stream, per_thread, ordinal);
}

#endif
