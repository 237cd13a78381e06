/* account.h: requests to the kernel's ledger, for the files that allocate memory. */
#ifndef FGPU_ACCOUNT_H
#define FGPU_ACCOUNT_H

#include "base/view.h"
#include "core/hook_table.h"

#define SMALL_ALIGNMENT 512ULL
#define TOO_MUCH (FGPU_MOST_BYTES + 1) /* the kernel refuses it, and counts the refusal */

/* -- capture_mode.c: for driver calls that the shim itself makes. They must not break a stream capture of the program.
 * In every capture mode, the only permitted query of a capturing stream is whether it captures. */
HIDDEN CUstreamCaptureMode fgpu_relax(void);
HIDDEN void fgpu_unrelax(CUstreamCaptureMode mode);

/* -- context_table.c: the contexts of this process, and its managed memory, as far as hooks have recorded them */
extern HIDDEN _Atomic bool fgpu_contexts_ended; /* a context of this process was destroyed */
HIDDEN bool fgpu_current_is_gone(void);
HIDDEN void fgpu_contexts_add(CUcontext context);                   /* cuCtxCreate made it */
HIDDEN void fgpu_contexts_remove(CUcontext context);                /* about to be destroyed: free its managed memory */
HIDDEN bool fgpu_primary_enter(CUdevice device, CUcontext context); /* a context was retained; true: it is a new one */
HIDDEN uint64_t fgpu_primary_of(CUdevice device);                   /* the context retained last; 0: none */
HIDDEN void fgpu_context_note_life(CUcontext context);              /* the handle is that of an existing context */
HIDDEN void fgpu_context_note_end(uint64_t context);                /* it has ended */
HIDDEN void fgpu_managed_made(CUdeviceptr at);
HIDDEN bool fgpu_context_is_created(CUcontext context); /* created by cuCtxCreate, and not destroyed */
HIDDEN bool fgpu_context_is_known(CUcontext context);   /* the same, or a primary context that was retained */

/* -- device.c */
HIDDEN bool fgpu_current(CUdevice *device);                                      /* the device of the current context */
HIDDEN CUcontext fgpu_current_context(void);                                     /* NULL: there is none */
HIDDEN int fgpu_index(const struct fgpu_control_page *control, CUdevice device); /* the ledger's index, or -1 */
HIDDEN int fgpu_index_of_uuid(const struct fgpu_control_page *control, const uint8_t uuid[16]);
HIDDEN bool fgpu_is_device(CUdevice ordinal);
HIDDEN uint64_t fgpu_granule(CUdevice ordinal);
HIDDEN uint64_t fgpu_taken(uint64_t bytes, uint64_t granule);

#define FGPU_CONTEXT_BYTES (512ULL << 20) /* of a context that was never measured; as in the kernel's ledger */

/* -- admit.c: one admission. It is begun once, and requested once or several times. */
struct admission {
    CUresult refusal;   /* CUDA_SUCCESS: call the driver */
    int index;          /* the ledger's index, if something was admitted; else -1 */
    bool by_standalone; /* admitted by the standalone ledger, which also needs the result of the call */
    bool patient;       /* refused for now: bytes of exited processes may make room, and the refusal was not counted */
    unsigned kind;
    uint64_t ticket, bytes;
};
HIDDEN struct admission fgpu_admission_begin(struct fgpu_view view, CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN void fgpu_ask_once(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient);
HIDDEN CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_settled_standalone(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_failed(int index, uint64_t bytes, CUresult result);
HIDDEN void fgpu_give_back(int index, uint64_t bytes); /* bytes of pools */

/* The part of the ledger of a pool, or of a device's graphs: bytes that are admitted, and that this process has not
 * released. */
struct portion {
    _Atomic uint64_t admitted;
    _Atomic int index; /* the ledger's index, once something was admitted */
};
HIDDEN bool fgpu_give_back_above(struct portion *portion, uint64_t keep); /* true: some bytes were released */
HIDDEN bool fgpu_is_limited(struct fgpu_view view); /* a limit may be in force: request admission */
HIDDEN bool fgpu_is_held(void);                     /* a limit is in force, of an agent or of the image */
struct fgpu_room {
    uint64_t left, limit; /* bytes; FGPU_MOST_BYTES if no limit is in force */
};
HIDDEN struct fgpu_room fgpu_room(CUdevice ordinal);

/* -- pool_shrink.c */
HIDDEN bool fgpu_pools_yield(CUdevice ordinal); /* true: some bytes were released */

/* The number of synchronisations after a free in stream order at which the shim checks whether the bytes have become
 * free. One is not enough, because other threads may wait for other streams in between. */
#define FGPU_SYNCS 8

/* -- unseen.c: frees of this process that no probe reports. The memory becomes free at once, or when the program waits
 * for a stream. */
HIDDEN void fgpu_frees_unseen(void);
HIDDEN void fgpu_freed_unseen(void);
HIDDEN void fgpu_freed_by_a_wait(void);                      /* the program has waited for a stream */
HIDDEN uint64_t fgpu_freed_unseen_ns(struct fgpu_view view); /* the last, by any program of the level; 0: none */

/* -- reclaim.c: requests admission; after a refusal, makes room if it can, and requests again. It may wait for memory
 * of exited processes; `patience` has the start of the wait, for all requests of one call. NULL: do not wait. */
struct patience {
    uint64_t since_ns; /* 0: no request has waited yet */
};
HIDDEN struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN struct admission fgpu_admission_with(struct patience *patience, CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN CUresult fgpu_ask_up_to(struct portion *portion, CUdevice ordinal, uint64_t need, struct patience *patience);

/* -- room.c: a request for memory, with one or several calls of the driver */
struct fgpu_request {
    CUdevice ordinal;
    uint64_t bytes;
    unsigned kind;
    const void *handle; /* where the driver writes the handle of the memory, 64 bits; NULL: the ledger needs none */
    CUresult result;    /* of the last call of the driver */
    bool called;
    uint64_t since_ns; /* when the driver was first out of memory; 0: not yet */
    struct admission admission;
};
/* Begin a request on the device of the current context. Returns false if there is none. */
HIDDEN bool fgpu_request_here(struct fgpu_request *request, uint64_t bytes, unsigned kind, const void *handle);
/* Return whether to call the driver now: the request is admitted, for the first time or after room was made. If not,
 * `result` is that of the request. */
HIDDEN bool fgpu_attempt(struct fgpu_request *request);
/* The driver was out of memory for an admitted request. Wait while the agent makes room, and return whether to repeat
 * the request. `since_ns` is as in fgpu_request. */
HIDDEN bool fgpu_room_comes(int index, uint64_t bytes, uint64_t *since_ns);

#endif
