/* The state of libnvidia-ml: the devices as the server described them, and the number of calls of nvmlInit. Numbers
 * that change are requested at each call. */
#ifndef FGPU_SIM_NVML_STATE_H
#define FGPU_SIM_NVML_STATE_H

/* Gives every function its own name. Without it nvml.h redefines nvmlInit as nvmlInit_v2. */
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#include "wire/wire.h"

#include <stdbool.h>
#include <stddef.h>

#define NVML_API __attribute__((visibility("default"))) nvmlReturn_t DECLDIR

/* Makes the checks of nearly every query: NVML is initialised, the handle is valid, and there is a place for the
 * result. */
nvmlReturn_t nvml_enter(nvmlDevice_t handle, const void *out, const struct sim_device **device);
bool nvml_is_ready(void);
/* Sends one request about a device. A forked process gets a new connection, because the server identifies processes
 * by their connections. */
nvmlReturn_t nvml_ask(uint32_t op, uint32_t device, struct sim_reply *reply, void *payload, size_t room);
/* Does the same for the first event after number `known`. */
nvmlReturn_t nvml_ask_after(uint32_t op, uint32_t device, uint64_t known, void *payload, size_t room);
/* Sends a request and a descriptor, which the caller keeps (-1: none). */
nvmlReturn_t nvml_ask_file(struct sim_request request, void *payload, size_t room, int file);
nvmlReturn_t nvml_text(char *out, unsigned int length, const char *text);
uint32_t nvml_count(void);
const struct sim_device *nvml_device(uint32_t index);

#endif
