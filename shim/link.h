/* link.h: between link.c (when to say hello) and hello.c (how). */
#ifndef FGPU_LINK_H
#define FGPU_LINK_H

#include <stdatomic.h>

#include "shim.h"

/* Of the gatekeeper that gave a set of pages. Who has slept over two hellos may read it while it is written anew. */
struct fgpu_note {
    _Atomic uint64_t boot[2];
    _Atomic uint64_t epoch;
};
enum fgpu_outcome { FGPU_IS_SILENT, FGPU_IS_ABSENT, FGPU_IS_EMPTY, FGPU_IS_FREE, FGPU_IS_HELD, FGPU_IS_RETRY };

HIDDEN void fgpu_say(const char *text);
HIDDEN char *fgpu_set(unsigned set); /* control, status, usage pages leaf first; NULL before a hello succeeded */
HIDDEN void fgpu_read_note(const struct fgpu_control_page *control, struct fgpu_note *note);

/* A socket at which the gatekeeper was asked; -1: it could not be. */
HIDDEN int fgpu_knock(const struct fgpu_note *before);

/* Asks the gatekeeper until the deadline; fills the pages of `set`, its note and levels when FREE or HELD. The first
 * answer is looked for where it was `asked` already; that is -1 and closed afterwards. */
HIDDEN enum fgpu_outcome fgpu_hello(int *asked, uint64_t deadline, const struct fgpu_note *before, unsigned set,
                                    struct fgpu_note *note, unsigned *levels);

#endif
