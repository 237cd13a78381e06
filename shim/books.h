/* books.h: standalone mode, between admit.c and link.c (who use it), standalone.c (where the books lie), books.c (what
 * they say), grants.c (what of it is this process's, and for what) and limit.c (how much the image allows). */
#ifndef FGPU_BOOKS_H
#define FGPU_BOOKS_H

#include <stdatomic.h>

#include "link.h"

enum fgpu_standing {
    FGPU_STANDS_FREE,  /* no limit in the image */
    FGPU_STANDS_BARE,  /* what would decide could not be read just now: no memory, and try again */
    FGPU_STANDS_ALONE, /* the limit holds for this process by itself: no place for books */
    FGPU_STANDS_WITH,  /* it holds for all processes of the container together */
};

/* -- limit.c: the file in the image. -1: cannot be read now; 0: there is none; else *bytes (0: it makes no sense) */
HIDDEN int fgpu_image_limit(uint64_t *bytes);

/* -- books.c: one answerer for all processes that map the same books. Bytes are counted in units of 512. */
#define FGPU_STANDALONE 0x80000000u /* flag of a control page: made here, from the books */
#define FGPU_SEATS 256              /* processes that hold device memory at once */
struct fgpu_books {
    uint64_t magic;
    _Atomic uint64_t seats; /* taken so far: those beyond never were */
    uint64_t spare[6];
    _Atomic uint64_t devices[FGPU_DEVICES]; /* made of their UUIDs; 0: none yet. Its place is its index. */
    struct {
        _Atomic uint64_t last; /* the last charge: seat, how many units, its number on that seat */
        uint64_t apart[7];
    } turns[FGPU_DEVICES];
    _Atomic uint64_t lives[FGPU_SEATS];              /* by what a process is known to live; 0: free */
    _Atomic uint64_t held[FGPU_DEVICES][FGPU_SEATS]; /* units, and the number of the last charge among them */
};
#define FGPU_BOOKS_BYTES 40960
#define FGPU_BOOKS_MAGIC 0x31736b6f6f427570ULL /* "puBooks1" */
_Static_assert(sizeof(struct fgpu_books) <= FGPU_BOOKS_BYTES, "whole pages");

HIDDEN int fgpu_books_seat(struct fgpu_books *books, uint64_t life); /* -1: all are taken by the living */
HIDDEN bool fgpu_books_charge(struct fgpu_books *books, unsigned device, unsigned seat, uint64_t bytes, uint64_t limit);
HIDDEN void fgpu_books_release(struct fgpu_books *books, unsigned device, unsigned seat, uint64_t bytes);
HIDDEN uint64_t fgpu_books_used(struct fgpu_books *books, unsigned device);
HIDDEN uint64_t fgpu_books_held(const struct fgpu_books *books, unsigned device, unsigned seat);
HIDDEN bool fgpu_books_sweep(struct fgpu_books *books);                         /* true: somebody had died */
HIDDEN int fgpu_books_device(struct fgpu_books *books, const uint8_t uuid[16]); /* -1: no room */

/* -- life.c: how one process knows that another lives */
HIDDEN uint64_t fgpu_life_begin(void); /* 0: this kernel has no such thing */
HIDDEN bool fgpu_life_lasts(uint64_t life, uint32_t *pid);

/* -- standalone.c */
HIDDEN enum fgpu_standing fgpu_stand(void); /* join, or look after what was joined */
HIDDEN struct fgpu_view fgpu_standing_view(void);
HIDDEN void fgpu_standing_refresh(void); /* the usage page: what the living hold now */
HIDDEN bool fgpu_stand_charge(unsigned index, uint64_t bytes);
HIDDEN void fgpu_stand_release(unsigned index, uint64_t bytes);
HIDDEN int fgpu_stand_device(const uint8_t uuid[16]);
HIDDEN unsigned fgpu_stand_rows(int index, struct fgpu_row *rows, unsigned most);

/* -- grants.c: what this process was granted by the books, by what the driver calls it */
struct fgpu_grant {
    uint64_t handle; /* a pointer, an array, a context, a handle of cuMemCreate, an address that one is mapped at */
    uint64_t bytes;
    uint64_t whose; /* a context's number; of a mapping: its handle */
    uint32_t space; /* enum fgpu_space */
    uint32_t index; /* the books' */
};
struct fgpu_ending { /* a context that is about to end, perhaps */
    bool primary;
    struct fgpu_grant of, name;
};
extern HIDDEN _Atomic bool fgpu_grants_any;
#define fgpu_has_grants() (!LIKELY(!atomic_load_explicit(&fgpu_grants_any, memory_order_relaxed)))
HIDDEN void fgpu_grant_keep(struct fgpu_grant grant);
HIDDEN bool fgpu_grant_take(enum fgpu_space space, uint64_t handle, struct fgpu_grant *grant);
HIDDEN void fgpu_grant_made(unsigned index, uint64_t bytes, unsigned kind, uint64_t handle, uint64_t context);
HIDDEN void fgpu_grant_ended(const struct fgpu_grant *grant, CUresult result); /* that was taken */
HIDDEN bool fgpu_grant_drop(uint64_t handle, struct fgpu_grant *grant);        /* a reference to what is mapped */
HIDDEN void fgpu_grant_dropped(const struct fgpu_grant *grant, CUresult result);
HIDDEN bool fgpu_grant_refer(uint64_t handle);
HIDDEN void fgpu_primary_made(CUdevice ordinal, uint64_t context);
HIDDEN void fgpu_context_leaves(struct fgpu_ending *ending, CUcontext context);
HIDDEN void fgpu_primary_leaves(struct fgpu_ending *ending, CUdevice ordinal);
HIDDEN void fgpu_context_left(struct fgpu_ending *ending, bool ended);

#endif
