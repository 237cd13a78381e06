/* Processes of a device: which hold memory, and which keep it busy. */
#include "nvml/state.h"

#include <time.h>

/* Three versions of the same query, with different rows. */

struct list {
    struct sim_process lines[SIM_MAX_CLIENTS];
    unsigned n;
};

/* If there is too little room, returns the necessary number and the error for that, as the real library does. */
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

/* There is no graphics and no MPS here, so these lists are empty. */
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

/* One query for all three kinds (0 compute, 1 graphics, 2 MPS). There are only compute processes here. */
NVML_API nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t handle, nvmlProcessDetailList_t *plist)
{
    struct list list;
    const struct sim_device *device;
    nvmlReturn_t result = nvml_enter(handle, plist, &device);
    if (result) return result;
    if (plist->version != nvmlProcessDetailList_v1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (plist->mode > 2) return NVML_ERROR_INVALID_ARGUMENT;
    if (plist->mode) {
        plist->numProcArrayEntries = 0;
        return NVML_SUCCESS;
    }
    result = ask_processes(handle, &plist->numProcArrayEntries, plist->procArray, &list);
    for (unsigned i = 0; !result && i < list.n; i++)
        plist->procArray[i] = (nvmlProcessDetail_v1_t){list.lines[i].pid, list.lines[i].bytes, ~0u, ~0u, 0};
    return result;
}

#define SAMPLES 100 /* how many the driver keeps, and for how many it requires room */

static unsigned long long now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (unsigned long long)now.tv_sec * 1000000u + (unsigned long long)now.tv_nsec / 1000u;
}

/* Moves the rows with a kernel in flight to the front. */
static nvmlReturn_t ask_busy(nvmlDevice_t handle, const void *out, struct list *list)
{
    unsigned room = SIM_MAX_CLIENTS, busy = 0;
    nvmlReturn_t result = out ? ask_processes(handle, &room, list, list) : NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned i = 0; !result && i < list->n; i++)
        if (list->lines[i].busy_us) list->lines[busy++] = list->lines[i];
    list->n = busy;
    return result;
}

NVML_API nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *utilization,
                                         unsigned int *count, unsigned long long lastSeenTimeStamp)
{
    struct list list;
    (void)lastSeenTimeStamp;
    nvmlReturn_t result = ask_busy(device, count, &list);
    if (result) return result;
    if (!utilization) {
        *count = SAMPLES;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    if (list.n < *count) *count = list.n;
    for (unsigned i = 0; i < *count; i++)
        utilization[i] = (nvmlProcessUtilizationSample_t){
            .pid = list.lines[i].pid, .timeStamp = now_us(), .smUtil = list.lines[i].busy_us / 10000};
    return *count ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, nvmlProcessesUtilizationInfo_t *info)
{
    struct list list;
    nvmlReturn_t result = ask_busy(device, info, &list);
    if (result) return result;
    if (info->version != nvmlProcessesUtilizationInfo_v1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!info->procUtilArray || info->processSamplesCount < list.n) {
        info->processSamplesCount = SAMPLES;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    info->processSamplesCount = list.n;
    for (unsigned i = 0; i < list.n; i++)
        info->procUtilArray[i] = (nvmlProcessUtilizationInfo_v1_t){
            .timeStamp = now_us(), .pid = list.lines[i].pid, .smUtil = list.lines[i].busy_us / 10000};
    return list.n ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

/* No process here encodes or captures frames. Accounting is on, as on the host whose results are recorded, but has no
 * process. */
NVML_API nvmlDeviceGetEncoderSessions(nvmlDevice_t device, unsigned int *count, nvmlEncoderSessionInfo_t *infos)
{
    (void)infos;
    return no_processes(device, count);
}

NVML_API nvmlDeviceGetFBCSessions(nvmlDevice_t device, unsigned int *count, nvmlFBCSessionInfo_t *info)
{
    (void)info;
    return no_processes(device, count);
}

/* Returns an error if the program gives no room, although there is no process to list. */
NVML_API nvmlDeviceGetAccountingPids(nvmlDevice_t device, unsigned int *count, unsigned int *pids)
{
    bool has_room = count && *count;
    nvmlReturn_t result = no_processes(device, count);
    (void)pids;
    return result || has_room ? result : NVML_ERROR_INSUFFICIENT_SIZE;
}

NVML_API nvmlDeviceGetAccountingStats(nvmlDevice_t handle, unsigned int pid, nvmlAccountingStats_t *stats)
{
    const struct sim_device *device;
    nvmlReturn_t result = nvml_enter(handle, stats, &device);
    (void)pid;
    return result ? result : NVML_ERROR_NOT_FOUND;
}
