/* What libnvidia-ml knows: the devices as the server described them, and how often somebody said nvmlInit. Numbers that
 * move are asked for at each call. */
#ifndef FGPU_SIM_NVML_STATE_H
#define FGPU_SIM_NVML_STATE_H

/* Every function under its own name: no nvmlInit that silently means nvmlInit_v2. */
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#include "wire.h"

#include <stdbool.h>
#include <stddef.h>

#define NVML_API __attribute__((visibility("default"))) nvmlReturn_t DECLDIR

/* Initialised, a handle of ours, and somewhere to write to: what nearly every question begins with. */
nvmlReturn_t nvml_enter(nvmlDevice_t handle, const void *out, const struct sim_device **device);
bool nvml_is_ready(void);
/* One request about a device. A process that forked gets a connection of its own: the server knows processes by theirs.
 */
nvmlReturn_t nvml_ask(uint32_t op, uint32_t device, struct sim_reply *reply, void *payload, size_t room);
/* The same, of what comes after something that is known. */
nvmlReturn_t nvml_ask_after(uint32_t op, uint32_t device, uint64_t known, void *payload, size_t room);
nvmlReturn_t nvml_text(char *out, unsigned int length, const char *text);
uint32_t nvml_count(void);
const struct sim_device *nvml_device(uint32_t index);

#endif
