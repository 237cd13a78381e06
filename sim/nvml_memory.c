/* Memory and processes of a device: the numbers that move. */
#include "nvml_state.h"

#include <time.h>

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
    /* The first version of this question knows no reserve: it counts as used. */
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

/* Process lists: three ages of the same question, which differ in what a line holds. */

struct list {
    struct sim_process lines[SIM_MAX_CLIENTS];
    unsigned n;
};

/* With too little room: how much there would have to be, and the error that says so, as the real library. */
static nvmlReturn_t ask_processes(nvmlDevice_t handle, unsigned *count, const void *infos, struct list *list)
{
    const struct sim_device *device;
    nvmlReturn_t result = nvml_enter(handle, count, &device);
    if (result) return result;
    if (*count && !infos) return NVML_ERROR_INVALID_ARGUMENT;
    struct sim_reply reply;
    result = nvml_ask(SIM_PROCESSES, device->index, &reply, list->lines, sizeof list->lines);
    if (result) return result;
    list->n = reply.count < SIM_MAX_CLIENTS ? reply.count : SIM_MAX_CLIENTS;
    bool fits = list->n <= *count;
    *count = list->n;
    return fits ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

NVML_API nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_v1_t *infos)
{
    struct list list;
    nvmlReturn_t result = ask_processes(device, count, infos, &list);
    for (unsigned i = 0; !result && i < list.n; i++)
        infos[i] = (nvmlProcessInfo_v1_t){list.lines[i].pid, list.lines[i].bytes};
    return result;
}

static nvmlReturn_t compute_processes(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *infos)
{
    struct list list;
    nvmlReturn_t result = ask_processes(device, count, infos, &list);
    for (unsigned i = 0; !result && i < list.n; i++)
        infos[i] = (nvmlProcessInfo_v2_t){list.lines[i].pid, list.lines[i].bytes, ~0u, ~0u};
    return result;
}

NVML_API nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *infos)
{
    return compute_processes(device, count, infos);
}

NVML_API nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *infos)
{
    return compute_processes(device, count, infos);
}

/* No graphics and no MPS here: empty lists, which is an answer. */
static nvmlReturn_t no_processes(nvmlDevice_t handle, unsigned *count)
{
    const struct sim_device *device;
    nvmlReturn_t result = nvml_enter(handle, count, &device);
    if (!result) *count = 0;
    return result;
}

#define NO_PROCESSES(name, type)                                                                                       \
    NVML_API name(nvmlDevice_t device, unsigned int *count, type *infos)                                               \
    {                                                                                                                  \
        (void)infos;                                                                                                   \
        return no_processes(device, count);                                                                            \
    }

NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses, nvmlProcessInfo_v1_t)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlProcessInfo_v2_t)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, nvmlProcessInfo_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses, nvmlProcessInfo_v1_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, nvmlProcessInfo_v2_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, nvmlProcessInfo_t)

#define SAMPLES 100 /* what the driver keeps, and so what it asks room for */

NVML_API nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *utilization,
                                         unsigned int *count, unsigned long long lastSeenTimeStamp)
{
    struct list list;
    struct timespec now;
    unsigned room = SIM_MAX_CLIENTS, busy = 0;
    (void)lastSeenTimeStamp;
    nvmlReturn_t result = count ? ask_processes(device, &room, &list, &list) : NVML_ERROR_INVALID_ARGUMENT;
    if (result) return result;
    if (!utilization) {
        *count = SAMPLES;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    clock_gettime(CLOCK_REALTIME, &now);
    for (unsigned i = 0; i < list.n && busy < *count; i++) {
        if (!list.lines[i].busy_us) continue;
        utilization[busy++] = (nvmlProcessUtilizationSample_t){.pid = list.lines[i].pid,
                                                               .timeStamp = (unsigned long long)now.tv_sec * 1000000u +
                                                                            (unsigned long long)now.tv_nsec / 1000u,
                                                               .smUtil = list.lines[i].busy_us / 10000};
    }
    *count = busy;
    return busy ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}
