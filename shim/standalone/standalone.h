/* standalone.h: an image's own limit if no agent decides, for link.c, account/ and hooks/. standalone.c has the file,
 * ledger.c its content, allocations.c the allocations of this process, limit.c the limit. */
#ifndef FGPU_STANDALONE_H
#define FGPU_STANDALONE_H

#include "base/view.h"

enum fgpu_standalone {
    FGPU_STANDALONE_FREE,  /* no limit in the image */
    FGPU_STANDALONE_BARE,  /* the limit could not be read now: no memory is admitted, and a later attempt may succeed */
    FGPU_STANDALONE_ALONE, /* the limit applies to this process alone: there is no place for a ledger */
    FGPU_STANDALONE_WITH,  /* the limit applies to all processes of the container together */
};

/* -- limit.c: the file in the image. -1: cannot be read now; 0: there is none; else *bytes is set (0: not a valid
 * size) */
HIDDEN int fgpu_image_limit(uint64_t *bytes);

/* -- ledger.c: one ledger for all processes that map the same file. Bytes are counted in units of 512. */
#define FGPU_STANDALONE 0x80000000u /* flag of a control page: it was made here, from the ledger */
#define FGPU_SEATS 256              /* most processes that can hold device memory at the same time */
struct fgpu_ledger {
    uint64_t magic;
    _Atomic uint64_t seats; /* number of seats that were ever taken: all others are free */
    uint64_t spare[6];
    _Atomic uint64_t devices[FGPU_DEVICES]; /* hashes of their UUIDs; 0: none yet. The index in this array is the
                                               device's index. */
    struct {
        _Atomic uint64_t last; /* the last charge: seat, number of units, its number on that seat */
        uint64_t apart[7];
    } turns[FGPU_DEVICES];
    _Atomic uint64_t lives[FGPU_SEATS]; /* names that show whether a process is alive (liveness.c); 0: free */
    _Atomic uint64_t held[FGPU_DEVICES][FGPU_SEATS]; /* units, and the number of the last charge included */
};
#define FGPU_LEDGER_BYTES 40960
#define FGPU_LEDGER_MAGIC 0x31736b6f6f427570ULL /* "puBooks1" */
_Static_assert(sizeof(struct fgpu_ledger) <= FGPU_LEDGER_BYTES, "whole pages");

HIDDEN int fgpu_ledger_seat(struct fgpu_ledger *ledger, uint64_t life); /* -1: living processes have all seats */
HIDDEN bool fgpu_ledger_charge(struct fgpu_ledger *ledger, unsigned device, unsigned seat, uint64_t bytes,
                               uint64_t limit);
HIDDEN void fgpu_ledger_release(struct fgpu_ledger *ledger, unsigned device, unsigned seat, uint64_t bytes);
HIDDEN uint64_t fgpu_ledger_used(struct fgpu_ledger *ledger, unsigned device);
HIDDEN uint64_t fgpu_ledger_held(const struct fgpu_ledger *ledger, unsigned device, unsigned seat);
HIDDEN bool fgpu_ledger_sweep(struct fgpu_ledger *ledger);                         /* true: a process had died */
HIDDEN int fgpu_ledger_device(struct fgpu_ledger *ledger, const uint8_t uuid[16]); /* -1: no room */

/* -- liveness.c: how a process determines whether another process is alive */
HIDDEN uint64_t fgpu_liveness_begin(void); /* 0: this kernel has no System V shared memory */
HIDDEN bool fgpu_liveness_lasts(uint64_t life, uint32_t *pid);

/* -- standalone.c */
HIDDEN enum fgpu_standalone fgpu_standalone_join(void); /* join the ledger; once joined, release the memory of exited
                                                           processes */
HIDDEN struct fgpu_view fgpu_standalone_view(void);
HIDDEN void fgpu_standalone_refresh(void); /* update the usage page with the memory that living processes hold */
HIDDEN bool fgpu_standalone_charge(unsigned index, uint64_t bytes);
HIDDEN void fgpu_standalone_release(unsigned index, uint64_t bytes);
HIDDEN int fgpu_standalone_device(const uint8_t uuid[16]);
HIDDEN unsigned fgpu_standalone_rows(int index, struct fgpu_row *rows, unsigned most);

/* -- allocations.c: the allocations that the ledger has admitted for this process, by the driver's handles */
struct fgpu_grant {
    uint64_t handle; /* a pointer, an array, a context, a handle of cuMemCreate, or an address at which a handle is
                        mapped */
    uint64_t bytes;
    uint64_t owner; /* a context's number; of a mapping: its handle */
    uint32_t space; /* enum fgpu_space */
    uint32_t index; /* the ledger's */
};
struct fgpu_ending { /* a context that may be about to be destroyed */
    bool primary;
    struct fgpu_grant of, name;
};
extern HIDDEN _Atomic bool fgpu_grants_any;
#define fgpu_has_grants() (!LIKELY(!atomic_load_explicit(&fgpu_grants_any, memory_order_relaxed)))
HIDDEN void fgpu_grant_keep(struct fgpu_grant grant);
HIDDEN bool fgpu_grant_take(enum fgpu_space space, uint64_t handle, struct fgpu_grant *grant);
HIDDEN void fgpu_grant_made(unsigned index, uint64_t bytes, unsigned kind, uint64_t handle, uint64_t context);
HIDDEN void fgpu_grant_ended(const struct fgpu_grant *grant,
                             CUresult result);                          /* `grant` was taken with fgpu_grant_take */
HIDDEN bool fgpu_grant_drop(uint64_t handle, struct fgpu_grant *grant); /* drop a reference to mapped memory */
HIDDEN void fgpu_grant_dropped(const struct fgpu_grant *grant, CUresult result);
HIDDEN bool fgpu_grant_refer(uint64_t handle);
HIDDEN void fgpu_primary_made(CUdevice ordinal, uint64_t context);
HIDDEN void fgpu_context_leaves(struct fgpu_ending *ending, CUcontext context);
HIDDEN void fgpu_primary_leaves(struct fgpu_ending *ending, CUdevice ordinal);
HIDDEN void fgpu_context_left(struct fgpu_ending *ending, bool ended);

#endif
