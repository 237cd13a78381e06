/* view.h: the shim's view of the decisions about this process, at one moment. link.c creates it. */
#ifndef FGPU_VIEW_H
#define FGPU_VIEW_H

#include "base/shim.h"

enum fgpu_link { FGPU_FRESH, FGPU_OPEN, FGPU_CLOSED, FGPU_UNMANAGED, FGPU_HELD }; /* HELD: managed */
struct fgpu_view {
    enum fgpu_link link;
    unsigned levels;
    bool cooperative;                        /* the image's own limit is in force: the pages are made from its ledger */
    const struct fgpu_control_page *control; /* NULL unless UNMANAGED or HELD */
    const struct fgpu_usage_page *usage;     /* `levels` pages, innermost first; NULL unless HELD */
    struct fgpu_status_page *status;         /* NULL unless HELD */
};

/* Return whether a level only counts: then the program must see no difference from an unmanaged process. */
static inline bool fgpu_observes(const struct fgpu_usage_page *page)
{
    return __atomic_load_n(&page->flags, __ATOMIC_RELAXED) & FGPU_OBSERVE;
}

/* Return one bit for each of the ledger's devices. It is set if the limit of a level does not count against the device
 * yet: then every request for memory of the device is refused. */
static inline uint64_t fgpu_uncommitted(struct fgpu_view view)
{
    uint64_t flags = 0;
    for (unsigned level = 0; level < view.levels; level++)
        flags |= __atomic_load_n(&view.usage[level].flags, __ATOMIC_RELAXED);
    return flags >> FGPU_UNCOMMITTED_SHIFT;
}

#endif
