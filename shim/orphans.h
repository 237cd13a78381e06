/* orphans.h: what the usage pages say of bytes whose process has ended. Between orphans.c, admit.c and reclaim.c. */
#ifndef FGPU_ORPHANS_H
#define FGPU_ORPHANS_H

#include "shim.h"

#define FGPU_PATIENCE_NS 4000000000ULL /* the device lets go of what a process held within this, or not by itself */

enum fgpu_prospect { FGPU_FITS, FGPU_FITS_SOON, FGPU_FITS_NEVER };

HIDDEN bool fgpu_has_orphans(struct fgpu_view view, int index); /* at a level that enforces a limit */
HIDDEN enum fgpu_prospect fgpu_prospect(struct fgpu_view view, int index, uint64_t bytes, unsigned kind,
                                        uint64_t now_ns);

#endif
