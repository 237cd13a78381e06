/* view.h: a function of view.c for processes.c. */
#ifndef FGPU_HOOKS_VIEW_H
#define FGPU_HOOKS_VIEW_H

#include "base/view.h"

HIDDEN int fgpu_nvml_index(struct fgpu_view view, nvmlDevice_t device); /* the ledger's index of the device, or -1 */

#endif
