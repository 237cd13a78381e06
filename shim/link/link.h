/* link.h: the registration of this process with the agent's gatekeeper, and admission requests to the kernel's
 * ledger. */
#ifndef FGPU_LINK_H
#define FGPU_LINK_H

#include "base/view.h"

/* -- link.c: registration, pages, state */
struct fgpu_asked { /* a hello that was sent */
    int socket;     /* the reply comes here; -1: no hello was sent */
    int far;        /* the other end, if the gatekeeper takes it from this process; else -1 */
};
#define FGPU_NOT_ASKED ((struct fgpu_asked){-1, -1})
/* Before the driver opens device nodes: let the kernel allow it, and register. fgpu_announce does not wait, except on
 * a host with MPS; it returns the argument for fgpu_arrive, which waits for the reply to a first hello. */
HIDDEN struct fgpu_asked fgpu_announce(void);
HIDDEN void fgpu_arrive(struct fgpu_asked);
HIDDEN struct fgpu_view fgpu_look(void);   /* register if it is due; report once that nothing is enforced */
HIDDEN struct fgpu_view fgpu_glance(void); /* the present state: no registration, no report, no clock */
HIDDEN struct fgpu_view fgpu_insist(void); /* register again: the probes did not respond */
HIDDEN void fgpu_report_crowd(void);       /* report once that memory of any size is refused */

/* -- hold.c: wait while this process is parked. Before calls of the driver that read whether work is done. */
HIDDEN void fgpu_hold(void);

/* -- verdict.c. Returns a verdict, or -1: there is none. */
HIDDEN void fgpu_tell_called(void); /* tell the kernel that the program calls the driver, see `called_ns` */
HIDDEN int fgpu_ask(struct fgpu_view view, unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);
#define FGPU_HELLO_ROUNDS 4
/* Return whether the kernel confirms these pages, by a verdict on a request of the kind FGPU_HELLO. */
HIDDEN bool fgpu_is_heard(struct fgpu_view view, uint64_t ticket, unsigned round);

#endif
