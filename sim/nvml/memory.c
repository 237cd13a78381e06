/* Memory of a device: the numbers that change. */
#include "nvml/state.h"

static nvmlReturn_t ask_memory(nvmlDevice_t handle, const void *out, struct sim_memory *memory)
{
    const struct sim_device *device;
    nvmlReturn_t result = nvml_enter(handle, out, &device);
    return result ? result : nvml_ask(SIM_MEMORY, device->index, NULL, memory, sizeof *memory);
}

NVML_API nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    struct sim_memory now;
    nvmlReturn_t result = ask_memory(device, memory, &now);
    if (result) return result;
    /* The first version of this query has no reserved memory, and counts it as used. */
    memory->total = now.total;
    memory->used = now.used + now.reserved;
    memory->free = now.total - memory->used;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    struct sim_memory now;
    nvmlReturn_t result = ask_memory(device, memory, &now);
    if (result) return result;
    if (memory->version != nvmlMemory_v2) return NVML_ERROR_FUNCTION_NOT_FOUND;
    memory->total = now.total;
    memory->reserved = now.reserved;
    memory->used = now.used;
    memory->free = now.total - now.reserved - now.used;
    return NVML_SUCCESS;
}

/* No device here is set up for confidential computing, so none of its memory is protected. */
NVML_API nvmlDeviceGetConfComputeProtectedMemoryUsage(nvmlDevice_t device, nvmlMemory_t *memory)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, memory, &d);
    if (!result) *memory = (nvmlMemory_t){0};
    return result;
}

NVML_API nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *bar1)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, bar1, &d);
    if (result) return result;
    bar1->bar1Total = d->bar1_bytes;
    bar1->bar1Used = 1 << 20;
    bar1->bar1Free = bar1->bar1Total - bar1->bar1Used;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization)
{
    struct sim_memory now;
    nvmlReturn_t result = ask_memory(device, utilization, &now);
    if (result) return result;
    utilization->gpu = (unsigned)(now.busy_us / 10000);
    utilization->memory = 0;
    return NVML_SUCCESS;
}
