/* Devices and processes, as every output shows them. */
#include "smi/smi.h"

#include <string.h>
#include <strings.h>
#include <time.h>

static const char *wanted; /* the argument of -i: indices, UUIDs or bus ids; NULL: all devices */

unsigned smi_mib(unsigned long long bytes) { return (unsigned)((bytes + (1u << 20) - 1) >> 20); }

bool smi_memory(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    *memory = (nvmlMemory_v2_t){.version = nvmlMemory_v2};
    return !nvml.nvmlDeviceGetMemoryInfo_v2(device, memory);
}

void smi_processes(nvmlDevice_t device, struct processes *processes)
{
    processes->n = MAX_PROCESSES;
    if (nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, &processes->n, processes->lines)) processes->n = 0;
}

void smi_process_name(unsigned pid, char *name, unsigned room)
{
    if (nvml.nvmlSystemGetProcessName(pid, name, room)) snprintf(name, room, "[Not Found]");
    /* A process chooses its own name. No control sequence in it may reach a terminal. */
    for (char *c = name; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?';
}

unsigned smi_index(nvmlDevice_t device)
{
    unsigned index = 0;
    nvml.nvmlDeviceGetIndex(device, &index);
    return index;
}

void smi_now(char *text, unsigned room, const char *format)
{
    time_t now = time(NULL);
    struct tm tm;
    strftime(text, room, format, localtime_r(&now, &tm));
}

const char *smi_base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static bool is_wanted(nvmlDevice_t device)
{
    char uuid[96] = "", index[16];
    nvmlPciInfo_t pci = {.busId = ""};
    nvml.nvmlDeviceGetUUID(device, uuid, sizeof uuid);
    nvml.nvmlDeviceGetPciInfo_v3(device, &pci);
    snprintf(index, sizeof index, "%u", smi_index(device));
    for (const char *at = wanted; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        size_t length = strcspn(at, ",");
        const char *names[] = {index, uuid, pci.busId};
        for (int i = 0; i < 3; i++)
            if (strlen(names[i]) == length && !strncasecmp(names[i], at, length)) return true;
    }
    return !wanted;
}

unsigned smi_devices(nvmlDevice_t *devices)
{
    unsigned n = 0, chosen = 0;
    nvml.nvmlDeviceGetCount_v2(&n);
    n = n < MAX_GPUS ? n : MAX_GPUS;
    for (unsigned i = 0; i < n && !nvml.nvmlDeviceGetHandleByIndex_v2(i, &devices[chosen]); i++)
        chosen += is_wanted(devices[chosen]);
    return chosen;
}

void smi_select(const char *ids) { wanted = ids; }
