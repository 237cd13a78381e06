/* orphans.h: what the usage pages say of bytes whose process has ended. Between orphans.c, admit.c and reclaim.c. */
#ifndef FGPU_ORPHANS_H
#define FGPU_ORPHANS_H

#include "shim.h"

/* The device has freed what an ended process held within 4 s, or does not by itself; an agent that is replaced begins to
 * look again within 10 s. */
#define FGPU_PATIENCE_NS 10000000000ULL

enum fgpu_prospect { FGPU_FITS, FGPU_FITS_SOON, FGPU_FITS_NEVER };

HIDDEN bool fgpu_has_orphans(struct fgpu_view view, int index); /* at a level that enforces a limit */
HIDDEN enum fgpu_prospect fgpu_prospect(struct fgpu_view view, int index, uint64_t bytes, unsigned kind,
                                        uint64_t now_ns);

#endif
