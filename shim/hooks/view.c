/*
 * view.c: shows a tenant its share of a device. Owns nothing; reads the pages.
 *
 * The driver is always called first: its errors, its checks of arguments, and its own numbers if they are smaller, are
 * kept. A device that is not on the tenant's pages is shown as the driver shows it.
 */
#include <errno.h>
#include <string.h>

#include "account/account.h"
#include "hooks/view.h"
#include "link/link.h"
#include "standalone/standalone.h"

struct share {
    uint64_t total, free, used;
};

/* Find the smallest limit and the least room of the levels that enforce a limit here. Returns false if there is none:
 * then the driver's numbers are shown. `used` is the tenant's, but no more than the limit: programs subtract the two
 * numbers. The part of a limit for contexts is neither in the total nor in `used`. */
static bool share_of(struct fgpu_view view, int index, struct share *share)
{
    bool limited = false;
    for (unsigned level = 0; level < view.levels; level++) {
        const struct fgpu_usage *usage = &view.usage[level].devices[index];
        uint64_t limit = __atomic_load_n(&usage->limit, __ATOMIC_RELAXED);
        uint64_t used = __atomic_load_n(&usage->used, __ATOMIC_RELAXED);
        uint64_t outside = __atomic_load_n(&view.usage[level].outside[index], __ATOMIC_RELAXED);
        if (!level) share->used = used > outside ? used - outside : 0;
        if (limit == FGPU_NO_LIMIT || fgpu_observes(&view.usage[level])) continue;
        uint64_t left = limit > used ? limit - used : 0, shown = limit > outside ? limit - outside : 0;
        if (shown < share->total) share->total = shown;
        if (left < share->free) share->free = left;
        limited = true;
    }
    if (share->used > share->total) share->used = share->total;
    if (share->free > share->total - share->used) share->free = share->total - share->used;
    return limited;
}

/* Return the numbers to show; false: the driver's. If the link is closed, no agent responds: no memory is shown as
 * free. */
static bool narrowed(struct fgpu_view view, int index, uint64_t total, uint64_t free, struct share *share)
{
    *share = (struct share){total, 0, total};
    if (view.link == FGPU_CLOSED) return true;
    if (view.link != FGPU_HELD || index < 0) return false;
    if (view.cooperative) fgpu_standalone_refresh();
    share->free = free;
    return share_of(view, index, share);
}

/* Frameworks size their pools by these numbers: memory that is shown as free must be obtainable. A program may pass
 * only one of the pointers; the limit needs both numbers. */
EXPORT CUresult cuMemGetInfo_v2(size_t *free, size_t *total)
{
    __typeof__(&cuMemGetInfo_v2) driver = REAL(cuMemGetInfo_v2);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    fgpu_hold(); /* the driver returns CUDA_ERROR_OPERATING_SYSTEM while the process is parked */
    CUresult result = driver(free, total);
    if (result != CUDA_SUCCESS || !(free || total)) return result;
    size_t spare, *left = free ? free : &spare, *all = total ? total : &spare;
    if (!(free && total) && driver(left, all) != CUDA_SUCCESS) return result;
    struct fgpu_view view = fgpu_look();
    CUdevice device;
    int index = -1;
    if (view.link == FGPU_HELD && fgpu_current(&device)) index = fgpu_index(view.control, device);
    struct share share;
    if (narrowed(view, index, *all, *left, &share)) {
        *all = share.total;
        *left = share.free;
    }
    return result;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev)
{
    __typeof__(&cuDeviceTotalMem_v2) driver = REAL(cuDeviceTotalMem_v2);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(bytes, dev);
    if (result != CUDA_SUCCESS || !bytes) return result;
    struct fgpu_view view = fgpu_look();
    int index = view.link == FGPU_HELD ? fgpu_index(view.control, dev) : -1;
    struct share share;
    if (narrowed(view, index, *bytes, *bytes, &share)) *bytes = share.total;
    return result;
}

/* The 32-bit calls: a number that does not fit is shown as the largest number that does. */
static unsigned int narrow(size_t bytes) { return bytes > UINT32_MAX ? UINT32_MAX : (unsigned int)bytes; }

EXPORT CUresult cuMemGetInfo(unsigned int *free, unsigned int *total)
{
    __typeof__(&cuMemGetInfo) driver = REAL(cuMemGetInfo);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(free, total);
    if (result != CUDA_SUCCESS || !REAL(cuMemGetInfo_v2)) return result;
    size_t free_bytes, total_bytes;
    if (cuMemGetInfo_v2(&free_bytes, &total_bytes) != CUDA_SUCCESS) return result;
    if (free && narrow(free_bytes) < *free) *free = narrow(free_bytes);
    if (total && narrow(total_bytes) < *total) *total = narrow(total_bytes);
    return result;
}

EXPORT CUresult cuDeviceTotalMem(unsigned int *bytes, CUdevice dev)
{
    __typeof__(&cuDeviceTotalMem) driver = REAL(cuDeviceTotalMem);
    size_t total;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(bytes, dev);
    if (result != CUDA_SUCCESS || !bytes || !REAL(cuDeviceTotalMem_v2)) return result;
    if (cuDeviceTotalMem_v2(&total, dev) == CUDA_SUCCESS && narrow(total) < *bytes) *bytes = narrow(total);
    return result;
}

/* -- NVML */

static int digit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

/* Parse "GPU-8-4-4-4-12"; a text with another prefix (MIG-) is not a device of the ledger. */
static bool parse_uuid(const char *text, uint8_t uuid[16])
{
    if (strncmp(text, "GPU-", 4)) return false;
    text += 4;
    for (int i = 0; i < 16; i++) {
        if (*text == '-') text++;
        int high = digit(text[0]), low = high < 0 ? -1 : digit(text[1]);
        if (low < 0) return false;
        uuid[i] = (uint8_t)(high << 4 | low);
        text += 2;
    }
    return !*text;
}

/* NVML has device handles of its own; only the UUID is the same for both libraries. */
int fgpu_nvml_index(struct fgpu_view view, nvmlDevice_t device)
{
    char text[NVML_DEVICE_UUID_V2_BUFFER_SIZE] = "";
    uint8_t uuid[16];
    if (view.link != FGPU_HELD || !REAL(nvmlDeviceGetUUID)) return -1;
    int saved = errno;
    nvmlReturn_t result = REAL(nvmlDeviceGetUUID)(device, text, sizeof text);
    errno = saved;
    return result == NVML_SUCCESS && parse_uuid(text, uuid) ? fgpu_index_of_uuid(view.control, uuid) : -1;
}

/* These hooks change no result. They register the program, so that a program that only monitors is registered too. */
EXPORT nvmlReturn_t nvmlInit(void)
{
    fgpu_arrive(fgpu_announce());
    return REAL(nvmlInit) ? REAL(nvmlInit)() : NVML_ERROR_FUNCTION_NOT_FOUND;
}

EXPORT nvmlReturn_t nvmlInit_v2(void)
{
    fgpu_arrive(fgpu_announce());
    return REAL(nvmlInit_v2) ? REAL(nvmlInit_v2)() : NVML_ERROR_FUNCTION_NOT_FOUND;
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    fgpu_arrive(fgpu_announce());
    return REAL(nvmlInitWithFlags) ? REAL(nvmlInitWithFlags)(flags) : NVML_ERROR_FUNCTION_NOT_FOUND;
}

/* With confidential computing all memory of a tenant is protected memory, so this call shows the same numbers. */
#define SHOW_MEMORY(name)                                                                                              \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, nvmlMemory_t *memory)                                                \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;                                                             \
        nvmlReturn_t result = driver(device, memory);                                                                  \
        if (result != NVML_SUCCESS) return result;                                                                     \
        struct fgpu_view view = fgpu_look();                                                                           \
        struct share share;                                                                                            \
        if (narrowed(view, fgpu_nvml_index(view, device), memory->total, memory->free, &share)) {                      \
            memory->total = share.total;                                                                               \
            memory->free = share.free;                                                                                 \
            memory->used = share.used;                                                                                 \
        }                                                                                                              \
        return result;                                                                                                 \
    }

SHOW_MEMORY(nvmlDeviceGetMemoryInfo)
SHOW_MEMORY(nvmlDeviceGetConfComputeProtectedMemoryUsage)

/* The driver has checked the caller's version field. */
EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    __typeof__(&nvmlDeviceGetMemoryInfo_v2) driver = REAL(nvmlDeviceGetMemoryInfo_v2);
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    nvmlReturn_t result = driver(device, memory);
    if (result != NVML_SUCCESS) return result;
    struct fgpu_view view = fgpu_look();
    struct share share;
    if (narrowed(view, fgpu_nvml_index(view, device), memory->total, memory->free, &share)) {
        memory->total = share.total;
        memory->free = share.free;
        memory->used = share.used;
        /* As in the driver's own numbers, the three add up to the total. The driver's reserve is outside every share.
         * Memory that other tenants hold of a group's limit, or of an overcommitted device, is neither used nor free
         * here. */
        memory->reserved = share.total - share.free - share.used;
    }
    return result;
}
