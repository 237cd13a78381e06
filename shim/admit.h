/* admit.h: between the files that allocate and admit.c, which asks. */
#ifndef FGPU_ADMIT_H
#define FGPU_ADMIT_H

#include <stdatomic.h>

#include "shim.h"

#define SMALL_ALIGNMENT 512ULL
#define TOO_MUCH (FGPU_MOST_BYTES + 1) /* the kernel refuses it, and counts the refusal */

struct admission {
    CUresult refusal; /* CUDA_SUCCESS: go on */
    int index;        /* the ledger's, where something was granted; else -1 */
    bool settles;     /* no return probe on this kernel: we say how it went */
    bool by_books;    /* granted by the container's own: they too are told how it went */
    bool patient;     /* refused for now: bytes of ended processes may make room, and nothing was counted */
    unsigned kind;
    uint64_t ticket, bytes;
};

/* Around what is asked of the driver on our own: it must not break a capture of the program's. In no mode may a stream
 * that captures be asked anything but whether it does. */
HIDDEN CUstreamCaptureMode fgpu_relax(void);
HIDDEN void fgpu_unrelax(CUstreamCaptureMode mode);

/* -- tables.c: the table, mapped where there is none; NULL: there is no memory for it */
HIDDEN void *fgpu_table(_Atomic(void *) *table, size_t bytes);

/* -- reclaim.c: asks, and where it is refused makes what room it can and asks again. It may wait for memory of ended
 * processes; `patience` says how much longer, for all the questions of one call. NULL: not at all. */
struct patience {
    uint64_t until_ns; /* 0: nothing was waited for yet */
};
HIDDEN struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN struct admission fgpu_admission_with(struct patience *patience, CUdevice ordinal, uint64_t bytes, unsigned kind);

/* -- admit.c: one question. What begins is asked, as often as it makes sense, and ends. */
HIDDEN struct admission fgpu_admission_begin(struct fgpu_view view, CUdevice ordinal, uint64_t bytes, unsigned kind);
HIDDEN void fgpu_ask_once(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient);
HIDDEN void fgpu_admission_end(struct admission *admission, struct fgpu_view view);
HIDDEN CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_settled_books(const struct admission *admission, CUresult result, uint64_t handle);
HIDDEN void fgpu_failed(int index, uint64_t bytes, CUresult result);
HIDDEN void fgpu_give_back(int index, uint64_t bytes); /* of pools */
HIDDEN bool fgpu_is_held(void);                        /* to a limit, by an agent that answers or by the books */
HIDDEN bool fgpu_is_device(CUdevice ordinal);
HIDDEN uint64_t fgpu_room(CUdevice ordinal); /* that the ledger has left; all there is where no limit is in force */
HIDDEN uint64_t fgpu_granule(CUdevice ordinal);
HIDDEN uint64_t fgpu_taken(uint64_t bytes, uint64_t granule);

/* -- reserve.c */
/* One thread at a time asks for more, as a rule: a turn runs out by itself. 0: it could not be had in time. */
HIDDEN uint64_t fgpu_take_turn(_Atomic uint64_t *busy_until_ns);
HIDDEN void fgpu_end_turn(_Atomic uint64_t *busy_until_ns, uint64_t turn);
HIDDEN bool fgpu_pools_yield(CUdevice ordinal);   /* true: something went back to the kernel */
HIDDEN void fgpu_pools_measure(CUdevice ordinal); /* a context has ended; < 0: on any device */

/* -- contexts.c */
extern HIDDEN _Atomic bool fgpu_contexts_ended; /* some context of this process did */
HIDDEN bool fgpu_current_is_gone(void);

/* -- pool.c */
HIDDEN void fgpu_pools_seen(CUdevice ordinal); /* a context is there */

#endif
