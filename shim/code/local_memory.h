/* local_memory.h: the interface of local_memory.c, which requests local memory of threads and the heap of device code,
 * for the hooks. */
#ifndef FGPU_LOCAL_MEMORY_H
#define FGPU_LOCAL_MEMORY_H

#include "code/module_data.h"

#define FGPU_FUNCTIONS 1024 /* a power of two */
#define FGPU_EPOCH_SHIFT 48 /* no address has these bits */

/* Functions whose next launch needs no request. An entry is `epoch << FGPU_EPOCH_SHIFT ^ function`, at an index that
 * depends on the function; so an increment of `epoch` makes all entries invalid. */
struct fgpu_functions {
    _Atomic uint64_t epoch;
    _Atomic uint64_t known[FGPU_FUNCTIONS];
};
extern HIDDEN _Atomic(void *) fgpu_functions; /* a struct fgpu_functions; NULL: nothing was launched yet */

static inline _Atomic uint64_t *fgpu_function_place(struct fgpu_functions *functions, uint64_t function)
{
    return &functions->known[function * 0x9e3779b97f4a7c15ULL >> 54];
}
_Static_assert(FGPU_FUNCTIONS == 1 << (64 - 54), "places");

static inline uint64_t fgpu_function_key(const struct fgpu_functions *functions, uint64_t function)
{
    return function ^ atomic_load_explicit(&functions->epoch, memory_order_relaxed) << FGPU_EPOCH_SHIFT;
}

static inline bool fgpu_function_is_known(CUfunction function)
{
    struct fgpu_functions *functions = atomic_load_explicit(&fgpu_functions, memory_order_acquire);
    return functions && atomic_load_explicit(fgpu_function_place(functions, (uint64_t)function),
                                             memory_order_relaxed) == fgpu_function_key(functions, (uint64_t)function);
}

struct fgpu_area;
struct fgpu_growth { /* of one context's area, admitted before the driver allocates it */
    struct fgpu_area *area;
    uint64_t from, to; /* bytes of a thread */
    uint64_t bytes;    /* admitted; 0: the area does not grow */
    int index;
};
struct fgpu_heap {          /* of device code, admitted before the driver allocates it */
    struct fgpu_area *area; /* NULL: no heap is allocated */
    uint64_t limit;
};
struct fgpu_first { /* a launch of a function that is not in the table */
    struct fgpu_growth growth;
    struct fgpu_load load; /* of its library */
    struct fgpu_heap heap;
    _Atomic uint64_t *place; /* NULL: the table stays unchanged */
    uint64_t key;            /* its key in the table afterwards */
};

/* For use before and after the driver's call. If the request is refused, only `first` has changed. */
HIDDEN CUresult fgpu_first_begins(struct fgpu_first *first, CUfunction function);
HIDDEN CUresult fgpu_first_ends(const struct fgpu_first *first, CUresult result); /* returns `result` */
HIDDEN CUresult fgpu_stack_begins(struct fgpu_growth *growth, size_t bytes);
HIDDEN CUresult fgpu_stack_ends(const struct fgpu_growth *growth, CUresult result, size_t bytes); /* likewise */

HIDDEN void fgpu_heap_limited(size_t bytes); /* of the current context */

HIDDEN void fgpu_functions_forget(void); /* function handles may be used again, or areas have shrunk */
HIDDEN void fgpu_area_begins(void);      /* a context was created */
HIDDEN void fgpu_area_ends(uint64_t context);

#endif
