/* Models of devices, as data. One row describes one board. */
#ifndef FGPU_SIM_MODELS_H
#define FGPU_SIM_MODELS_H

#include "wire/wire.h"

/* Fills in device number `index` of the model with this name ("h200", "a100", "t4"), with `memory` bytes (0: the
 * model's own). Returns 0, or -1 if there is no such model. */
int model_device(const char *model, uint32_t index, uint64_t memory, struct sim_device *device);

#endif
