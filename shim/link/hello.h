/* hello.h: the interface of hello.c (how to register) for link.c (when to register). */
#ifndef FGPU_HELLO_H
#define FGPU_HELLO_H

#include "base/own.h"
#include "link/link.h"

enum fgpu_outcome {
    FGPU_IS_SILENT,
    FGPU_IS_ABSENT,
    FGPU_IS_EMPTY,
    FGPU_IS_FREE,
    FGPU_IS_HELD,
    FGPU_IS_RETRY,
    FGPU_IS_REFUSED
};

HIDDEN void fgpu_say(const char *text);
extern HIDDEN const char *_Atomic fgpu_silence; /* why no agent could be reached, as a message; NULL: the reason is
                                                   not known */
HIDDEN const char *fgpu_mps(void);              /* the variable that makes the driver use MPS; NULL: not on this host */
HIDDEN bool fgpu_is_hidden(void);               /* no agent was found, but this host has one; sets the message */
HIDDEN char *fgpu_set(unsigned set);            /* control, status, usage pages innermost first; NULL before the first
                                                   registration */
HIDDEN void fgpu_read_note(const struct fgpu_control_page *control, struct fgpu_note *note);

HIDDEN struct fgpu_asked fgpu_knock(const struct fgpu_note *before); /* send a hello to the gatekeeper */
HIDDEN void fgpu_forget(struct fgpu_asked *asked);                   /* close the descriptors */

/* Register with the gatekeeper before the deadline; fill the pages of `set`, its note and levels if FREE or HELD. The
 * first reply is read from `asked`, if a hello was sent; afterwards that is FGPU_NOT_ASKED. */
HIDDEN enum fgpu_outcome fgpu_hello(struct fgpu_asked *asked, uint64_t deadline, const struct fgpu_note *before,
                                    unsigned set, struct fgpu_note *note, unsigned *levels);

#endif
