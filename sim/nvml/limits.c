/* Limits of a cgroup on the memory of a device. Driver r615 added these functions; the simulated driver has them only
 * if its server is told so. */
#include "nvml/state.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* nvml.h has these types from CUDA 13.4 on. */
typedef struct {
    const char *nameSpace; /* the folder of the cgroup */
    unsigned long long softLimit, hardLimit;
} nvmlSetMemoryLimits_v1_t;

typedef struct {
    const char *nameSpace;
    unsigned long long softLimit, hardLimit, currentUsed;
} nvmlGetMemoryLimits_v1_t;

/* Sends the folder itself, not its name: the server can have other mounts. The server refuses a missing folder, after
 * it has checked whether the program may ask at all. */
static nvmlReturn_t ask_limits(struct sim_request request, const char *folder, struct sim_limits *now)
{
    if (!folder) return NVML_ERROR_INVALID_ARGUMENT;
    int saved = errno, file = *folder == '/' ? open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    nvmlReturn_t result = nvml_ask_file(request, now, now ? sizeof *now : 0, file);
    if (file >= 0) close(file);
    errno = saved;
    return result;
}

NVML_API nvmlDeviceSetMemoryLimits_v1(nvmlDevice_t device, const nvmlSetMemoryLimits_v1_t *limits)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, limits, &d);
    if (result) return result;
    struct sim_request request = {
        .op = SIM_SET_LIMITS, .device = d->index, .bytes = limits->hardLimit, .requested = limits->softLimit};
    return ask_limits(request, limits->nameSpace, NULL);
}

NVML_API nvmlDeviceGetMemoryLimits_v1(nvmlDevice_t device, nvmlGetMemoryLimits_v1_t *limits)
{
    const struct sim_device *d;
    struct sim_limits now;
    nvmlReturn_t result = nvml_enter(device, limits, &d);
    if (!result)
        result = ask_limits((struct sim_request){.op = SIM_GET_LIMITS, .device = d->index}, limits->nameSpace, &now);
    if (result) return result;
    limits->softLimit = now.soft;
    limits->hardLimit = now.hard;
    limits->currentUsed = now.used;
    return NVML_SUCCESS;
}
