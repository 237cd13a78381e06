/* orphans.h: the usage pages' information on bytes of exited processes. For orphans.c, admit.c and reclaim.c. */
#ifndef FGPU_ORPHANS_H
#define FGPU_ORPHANS_H

#include "base/view.h"

/* The device frees the memory of an exited process within this time. Memory that the device still holds after this time
 * does not become free by itself. */
#define FGPU_PATIENCE_NS 4000000000ULL
#define FGPU_ABSENCE_NS 30000000000ULL /* a replaced agent examines the device again within this time */

enum fgpu_prospect { FGPU_FITS, FGPU_FITS_SOON, FGPU_FITS_AFTER_A_LOOK, FGPU_FITS_NEVER };

HIDDEN bool fgpu_has_orphans(struct fgpu_view view, int index); /* at a level that enforces a limit */
HIDDEN enum fgpu_prospect fgpu_prospect(const struct fgpu_view *view, int index, uint64_t bytes, unsigned kind,
                                        uint64_t since_ns, uint64_t now_ns);

#endif
