/*
 * hold.c: holds a call back while this process is parked, or is about to be. Owns nothing.
 *
 * Calls that need the device wait inside the driver then. Calls that only read whether work is done do not: they read a
 * word that the driver has unmapped, and the process ends by SIGSEGV (driver 580). So the shim waits before these
 * calls. The agent finds the thread here, and wakes the tenant.
 */
#include "link/link.h"

#define NAP_NS 1000000L

void fgpu_hold(void)
{
    struct fgpu_view view;
    while (view = fgpu_glance(), view.link == FGPU_HELD && __atomic_load_n(&view.usage->held, __ATOMIC_ACQUIRE))
        fgpu_nap(NAP_NS);
}
