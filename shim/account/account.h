/* account.h: between the files that allocate and the kernel's ledger. */
#ifndef FGPU_ACCOUNT_H
#define FGPU_ACCOUNT_H

#include "base/view.h"
#include "core/hook_table.h"

#define SMALL_ALIGNMENT 512ULL
#define TOO_MUCH (FGPU_MOST_BYTES + 1) /* the kernel refuses it, and counts the refusal */

/* -- capture_mode.c: around calls of the driver that the shim makes for itself. They must not break a capture of the
 * program. In every mode, the only question that a capturing stream may be asked is whether it captures. */
HIDDEN CUstreamCaptureMode fgpu_relax(void);
HIDDEN void fgpu_unrelax(CUstreamCaptureMode mode);

/* -- context_table.c: the contexts of this process and its managed memory, as far as they are known */
extern HIDDEN _Atomic bool fgpu_contexts_ended; /* some context of this process has ended */
HIDDEN bool fgpu_current_is_gone(void);
HIDDEN void fgpu_contexts_add(CUcontext context);                   /* cuCtxCreate made it */
HIDDEN void fgpu_contexts_remove(CUcontext context);                /* it is about to end: free its managed memory */
HIDDEN bool fgpu_primary_enter(CUdevice device, CUcontext context); /* retained; true: it is a new one */
HIDDEN uint64_t fgpu_primary_of(CUdevice device);                   /* the context retained last; 0: none */
HIDDEN void fgpu_context_note_life(CUcontext context);              /* the handle names a living context */
HIDDEN void fgpu_context_note_end(uint64_t context);                /* it has ended */
HIDDEN void fgpu_managed_made(CUdeviceptr at);
HIDDEN bool fgpu_context_is_created(CUcontext context); /* by cuCtxCreate, and has not ended */
HIDDEN bool fgpu_context_is_known(CUcontext context);   /* likewise, or a primary context that was retained */

/* -- device.c */
HIDDEN bool fgpu_current(CUdevice *device);                                      /* the device of the current context */
HIDDEN int fgpu_index(const struct fgpu_control_page *control, CUdevice device); /* the ledger's index, or -1 */
HIDDEN int fgpu_index_of_uuid(const struct fgpu_control_page *control, const uint8_t uuid[16]);
HIDDEN bool fgpu_is_device(CUdevice ordinal);
HIDDEN uint64_t fgpu_granule(CUdevice ordinal);
HIDDEN uint64_t fgpu_taken(uint64_t bytes, uint64_t granule);

#define FGPU_CONTEXT_BYTES (512ULL << 20) /* of a context that was never measured; the kernel's ledger has it too */

/* -- admit.c: one question. An admission begins, is asked as often as it makes sense, and ends. */
struct admission {
    CUresult refusal;   /* CUDA_SUCCESS: go on */
    int index;          /* the ledger's index, where something was granted; else -1 */
    bool settles;       /* no return probe on this kernel: the shim reports how the call went */
    bool by_standalone; /* granted by the standalone ledger, which also has to be told how the call went */
    bool patient;       /* refused for now: bytes of ended processes may make room, and nothing was counted */
    unsigned kind;
    uint64_t ticket, bytes;
};
HIDDEN struct admission fgpu_admission_begin(struct fgpu_view view, CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN void fgpu_ask_once(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient);
HIDDEN void fgpu_admission_end(struct admission *admission, struct fgpu_view view);
HIDDEN CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_settled_standalone(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_failed(int index, uint64_t bytes, CUresult result);
HIDDEN void fgpu_give_back(int index, uint64_t bytes); /* bytes of pools */
HIDDEN bool fgpu_is_limited(struct fgpu_view view);    /* a limit may be in force: ask for what will be taken */
HIDDEN bool fgpu_is_held(void);                        /* to a limit, by an agent that answers or by the image */
struct fgpu_room {
    uint64_t left, limit; /* bytes; FGPU_MOST_BYTES where no limit is in force */
};
HIDDEN struct fgpu_room fgpu_room(CUdevice ordinal);

/* -- pool_shrink.c */
HIDDEN bool fgpu_pools_yield(CUdevice ordinal); /* true: something went back to the kernel */

#define FGPU_SYNCS 8 /* after a free in the order of a stream: other threads wait for other streams in between */

/* -- unseen.c: memory of this process is freed and no probe sees that, when the program waits for a stream, or now */
HIDDEN void fgpu_frees_unseen(void);
HIDDEN void fgpu_freed_unseen(void);
HIDDEN void fgpu_freed_by_a_wait(void);     /* the program has waited */
HIDDEN uint64_t fgpu_freed_unseen_ns(void); /* 0: nothing was freed so */

/* -- reclaim.c: ask; after a refusal make what room can be made, and ask again. That may wait for memory of ended
 * processes; `patience` says since when, for all questions of one call. NULL: do not wait. */
struct patience {
    uint64_t since_ns; /* 0: nothing was waited for yet */
};
HIDDEN struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN struct admission fgpu_admission_with(struct patience *patience, CUdevice ordinal, uint64_t bytes, unsigned kind);

#endif
