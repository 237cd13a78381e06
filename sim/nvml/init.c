/* nvmlInit and nvmlShutdown, queries of the system, and finding devices. */
#include "nvml/state.h"
#include "wire/link.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

static struct link connection = LINK_INIT;
static int node =
    -1; /* open from the first nvmlInit to the last nvmlShutdown, as the devices of the real library are */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned references;
static uint32_t n_devices;
static struct sim_device devices[SIM_MAX_DEVICES];
static bool is_lost[SIM_MAX_DEVICES]; /* lost since the library was initialised; the device has no handle */

bool nvml_is_ready(void) { return __atomic_load_n(&references, __ATOMIC_ACQUIRE) > 0; }

uint32_t nvml_count(void) { return n_devices; }

const struct sim_device *nvml_device(uint32_t index) { return &devices[index]; }

static nvmlReturn_t result_of(int status)
{
    switch (status) {
    case SIM_OK:
        return NVML_SUCCESS;
    case SIM_LOST:
        return NVML_ERROR_GPU_IS_LOST;
    case SIM_NOT_SUPPORTED:
        return NVML_ERROR_NOT_SUPPORTED;
    case SIM_NOT_ALLOWED:
        return NVML_ERROR_NO_PERMISSION;
    case SIM_INVALID:
        return NVML_ERROR_INVALID_ARGUMENT;
    case SIM_NOT_FOUND:
        return NVML_ERROR_NOT_FOUND;
    case SIM_NO_MEMORY:
        return NVML_ERROR_INSUFFICIENT_RESOURCES; /* of the server's tables: NVML takes no memory */
    default:
        return NVML_ERROR_UNKNOWN;
    }
}

static nvmlReturn_t ask(struct sim_request request, struct sim_reply *reply, void *payload, size_t room, int file)
{
    uint32_t n;
    char self[16] = "";
    request.flags = SIM_FLAG_NVML;
    if (connection.owner != getpid()) {
        pthread_mutex_init(&connection.lock, NULL); /* another thread of the parent may have held it during the fork */
        if (link_open(&connection, FGPU_SIM_DIR, &n)) return NVML_ERROR_UNKNOWN;
    }
    /* If /proc belongs to another pid namespace, the pids in a list would name other processes. The driver then lists
     * none. */
    ssize_t length = request.op == SIM_PROCESSES ? readlink("/proc/self", self, sizeof self - 1) : 0;
    char mine[16];
    snprintf(mine, sizeof mine, "%d", (int)getpid());
    if (length > 0 && strcmp(self, mine)) request.flags |= SIM_FLAG_FOREIGN_PROC;
    return result_of(link_call_file(&connection, request, reply, payload, room, &file));
}

nvmlReturn_t nvml_ask(uint32_t op, uint32_t device, struct sim_reply *reply, void *payload, size_t room)
{
    return ask((struct sim_request){.op = op, .device = device}, reply, payload, room, -1);
}

nvmlReturn_t nvml_ask_after(uint32_t op, uint32_t device, uint64_t known, void *payload, size_t room)
{
    return ask((struct sim_request){.op = op, .device = device, .requested = known}, NULL, payload, room, -1);
}

nvmlReturn_t nvml_ask_file(struct sim_request request, void *payload, size_t room, int file)
{
    return ask(request, NULL, payload, room, file);
}

nvmlReturn_t nvml_enter(nvmlDevice_t handle, const void *out, const struct sim_device **device)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    const struct sim_device *d = (const struct sim_device *)handle;
    for (uint32_t i = 0; i < n_devices; i++) {
        if (d == &devices[i]) {
            *device = d;
            return out ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
        }
    }
    return NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvml_text(char *out, unsigned int length, const char *text)
{
    if (strlen(text) >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

static nvmlReturn_t connect_devices(void)
{
    uint32_t n;
    if (link_open(&connection, FGPU_SIM_DIR, &n)) return NVML_ERROR_DRIVER_NOT_LOADED;
    uint32_t n_lost = 0;
    memset(devices, 0, sizeof devices);
    for (uint32_t i = 0; i < n; i++) {
        nvmlReturn_t result = nvml_ask(SIM_DEVICE, i, NULL, &devices[i], sizeof devices[i]);
        if (result && result != NVML_ERROR_GPU_IS_LOST) return NVML_ERROR_DRIVER_NOT_LOADED;
        is_lost[i] = result;
        n_lost += is_lost[i];
    }
    if (n && n_lost == n) return NVML_ERROR_DRIVER_NOT_LOADED;
    if (node < 0) node = open(FGPU_SIM_DIR "/" SIM_NODE_NAME, O_RDONLY | O_CLOEXEC);
    if (node < 0 && errno == EPERM) return NVML_ERROR_UNKNOWN; /* as of the real library, on an H200 */
    n_devices = n;
    return NVML_SUCCESS;
}

/* References are counted: several libraries in one program may call nvmlInit and nvmlShutdown. */
static nvmlReturn_t initialise(unsigned flags)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = references ? NVML_SUCCESS : connect_devices();
    if (!result && !n_devices && !(flags & NVML_INIT_FLAG_NO_GPUS)) result = NVML_ERROR_DRIVER_NOT_LOADED;
    if (!result) __atomic_add_fetch(&references, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return result;
}

NVML_API nvmlInit(void) { return initialise(0); }

NVML_API nvmlInit_v2(void) { return initialise(0); }

NVML_API nvmlInitWithFlags(unsigned int flags) { return initialise(flags); }

NVML_API nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = references ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (!result && !__atomic_sub_fetch(&references, 1, __ATOMIC_RELEASE)) {
        link_close(&connection);
        if (node >= 0) close(node);
        node = -1;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static nvmlReturn_t system_text(char *out, unsigned int length, const char *text)
{
    SIM_FRAME();
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    return out ? nvml_text(out, length, text) : NVML_ERROR_INVALID_ARGUMENT;
}

NVML_API nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    return system_text(version, length, SIM_DRIVER_VERSION);
}

NVML_API nvmlSystemGetNVMLVersion(char *version, unsigned int length)
{
    SIM_FRAME();
    return version ? nvml_text(version, length, SIM_NVML_VERSION) : NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t cuda_version(int *version)
{
    SIM_FRAME();
    if (!version) return NVML_ERROR_INVALID_ARGUMENT;
    *version = SIM_CUDA_VERSION;
    return NVML_SUCCESS;
}

NVML_API nvmlSystemGetCudaDriverVersion(int *version) { return cuda_version(version); }

NVML_API nvmlSystemGetCudaDriverVersion_v2(int *version) { return cuda_version(version); }

NVML_API nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int length)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!name || !length) return NVML_ERROR_INVALID_ARGUMENT;
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "re");
    size_t got = file ? fread(name, 1, length - 1, file) : 0;
    if (file) fclose(file);
    name[got] = 0; /* only the first argument: each argument ends with a null byte */
    return got ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

static nvmlReturn_t get_count(unsigned int *count)
{
    SIM_FRAME();
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!count) return NVML_ERROR_INVALID_ARGUMENT;
    *count = n_devices;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetCount(unsigned int *count) { return get_count(count); }

NVML_API nvmlDeviceGetCount_v2(unsigned int *count) { return get_count(count); }

static nvmlReturn_t by_index(unsigned int index, nvmlDevice_t *device)
{
    SIM_FRAME();
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!device || index >= n_devices) return NVML_ERROR_INVALID_ARGUMENT;
    if (is_lost[index]) return NVML_ERROR_GPU_IS_LOST;
    *device = (nvmlDevice_t)&devices[index];
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t *device) { return by_index(index, device); }

NVML_API nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) { return by_index(index, device); }

NVML_API nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!uuid || !device) return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < n_devices; i++)
        if (!strcasecmp(devices[i].uuid, uuid)) return by_index(i, device);
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!serial || !device) return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < n_devices; i++)
        if (!strcmp(devices[i].serial, serial)) return by_index(i, device);
    return NVML_ERROR_NOT_FOUND;
}

static nvmlReturn_t by_bus(const char *bus_id, nvmlDevice_t *device)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    unsigned domain, bus, slot;
    if (!bus_id || !device || sscanf(bus_id, "%8x:%2x:%2x", &domain, &bus, &slot) != 3)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < n_devices; i++)
        if (devices[i].pci_domain == domain && devices[i].pci_bus == bus && devices[i].pci_slot == slot)
            return by_index(i, device);
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlDeviceGetHandleByPciBusId(const char *pciBusId, nvmlDevice_t *device) { return by_bus(pciBusId, device); }

NVML_API nvmlDeviceGetHandleByPciBusId_v2(const char *pciBusId, nvmlDevice_t *device)
{
    return by_bus(pciBusId, device);
}
