/* link.h: the connection of this process to the agent's gatekeeper, and questions to the kernel's ledger. */
#ifndef FGPU_LINK_H
#define FGPU_LINK_H

#include "base/view.h"

/* -- link.c: hello, pages, state */
HIDDEN int fgpu_announce(void);            /* send a hello and do not wait; returns what fgpu_arrive takes */
HIDDEN void fgpu_arrive(int announced);    /* wait for the answer */
HIDDEN struct fgpu_view fgpu_look(void);   /* say hello if it is due; report once that nothing is enforced */
HIDDEN struct fgpu_view fgpu_glance(void); /* what is known: no hello, no report, no clock */
HIDDEN struct fgpu_view fgpu_insist(void); /* say hello again: the probes did not answer */
HIDDEN void fgpu_report_crowd(void);       /* report once that memory of any size is refused */

/* -- verdict.c. Returns a verdict, or -1: the kernel does not answer. */
HIDDEN int fgpu_ask(struct fgpu_view view, unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);
#define FGPU_HELLO_ROUNDS 4
/* Return whether the kernel answers a hello on these pages. */
HIDDEN bool fgpu_is_heard(struct fgpu_view view, uint64_t ticket, unsigned round);

#endif
