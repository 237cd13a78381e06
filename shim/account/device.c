/*
 * device.c: facts about devices: UUID, index in the ledger, granule of memory. Owns a cache of them.
 */
#include <errno.h>
#include <string.h>

#include "account/account.h"
#include "standalone/standalone.h"

static struct device {
    _Atomic uint64_t uuid[2];
    _Atomic bool known;
    _Atomic uint64_t granule;
} devices[FGPU_DEVICES]; /* by the driver's ordinal */

/* Compare UUIDs. Another thread may be writing the UUID of a page that is made from the standalone ledger. */
static bool is_uuid(const uint8_t its[16], const uint8_t uuid[16])
{
    const uint64_t *at = (const uint64_t *)(const void *)its;
    uint64_t words[2] = {__atomic_load_n(&at[0], __ATOMIC_RELAXED), __atomic_load_n(&at[1], __ATOMIC_RELAXED)};
    return !memcmp(words, uuid, sizeof words);
}

int fgpu_index_of_uuid(const struct fgpu_control_page *control, const uint8_t uuid[16])
{
    unsigned count = control->device_count;
    for (unsigned i = 0; i < count && i < FGPU_DEVICES; i++)
        if (is_uuid(control->devices[i].uuid, uuid))
            return control->devices[i].index < FGPU_DEVICES ? (int)control->devices[i].index : -1;
    return control->flags & FGPU_STANDALONE ? fgpu_standalone_device(uuid) : -1;
}

union words_of_uuid {
    CUuuid uuid;
    uint64_t words[2];
};

static CUresult read_uuid(CUdevice ordinal, union words_of_uuid *answer)
{
    __typeof__(&cuDeviceGetUuid_v2) get = REAL(cuDeviceGetUuid_v2);
    if (!get) get = REAL(cuDeviceGetUuid);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult result = get ? get(&answer->uuid, ordinal) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_unrelax(mode);
    errno = saved;
    return result;
}

/* Return the facts about a device; NULL: the driver returns no UUID for it. The UUID of an ordinal never changes in a
 * process. Threads that fill the entry at the same time write the same values. */
static struct device *device_of(CUdevice ordinal)
{
    union words_of_uuid answer;
    if (ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    struct device *device = &devices[ordinal];
    if (atomic_load_explicit(&device->known, memory_order_acquire)) return device;
    if (read_uuid(ordinal, &answer) != CUDA_SUCCESS) return NULL;
    for (int i = 0; i < 2; i++) atomic_store_explicit(&device->uuid[i], answer.words[i], memory_order_relaxed);
    atomic_store_explicit(&device->known, true, memory_order_release);
    return device;
}

/* Return whether the driver has this device; false also if no driver's functions are known. The table has no room for
 * some devices: their memory is refused. */
bool fgpu_is_device(CUdevice ordinal)
{
    union words_of_uuid answer;
    return device_of(ordinal) || read_uuid(ordinal, &answer) == CUDA_SUCCESS;
}

/*
 * Return the ledger's index of a device, found by UUID: CUDA's ordinals depend on CUDA_VISIBLE_DEVICES. The page is
 * searched each time, because a registration may have replaced it. Sixteen comparisons cost little compared with the
 * call that follows.
 */
int fgpu_index(const struct fgpu_control_page *control, CUdevice ordinal)
{
    struct device *device = device_of(ordinal);
    if (!device) return -1;
    uint64_t words[2] = {atomic_load_explicit(&device->uuid[0], memory_order_relaxed),
                         atomic_load_explicit(&device->uuid[1], memory_order_relaxed)};
    return fgpu_index_of_uuid(control, (const uint8_t *)words);
}

/* Return the granule in which the driver allocates memory of this device; the driver is asked once. 0: the driver does
 * not report it, and sizes are not rounded. */
uint64_t fgpu_granule(CUdevice ordinal)
{
    struct device *device = device_of(ordinal);
    if (!device) return 0;
    uint64_t granule = atomic_load_explicit(&device->granule, memory_order_relaxed);
    if (LIKELY(granule)) return granule;
    __typeof__(&cuMemGetAllocationGranularity) get = REAL(cuMemGetAllocationGranularity);
    CUmemAllocationProp where;
    memset(&where, 0, sizeof where);
    where.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    where.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    where.location.id = ordinal;
    size_t answer = 0;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult result = get ? get(&answer, &where, CU_MEM_ALLOC_GRANULARITY_MINIMUM) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_unrelax(mode);
    errno = saved;
    if (result != CUDA_SUCCESS) return 0;
    if (answer > FGPU_MOST_BYTES || (answer & (answer - 1))) return 0; /* the rounding below needs a power of two */
    atomic_store_explicit(&device->granule, answer, memory_order_relaxed);
    return answer;
}

/* Return how much the driver allocates for a request. Requests of up to half a granule share a granule (measured); a
 * larger request gets whole granules. */
uint64_t fgpu_taken(uint64_t bytes, uint64_t granule)
{
    if (bytes > FGPU_MOST_BYTES) return TOO_MUCH;
    uint64_t unit = granule && bytes > granule / 2 ? granule : SMALL_ALIGNMENT;
    return (bytes + unit - 1) & ~(unit - 1);
}

/* Find the device of the current context. For a destroyed context the driver still reports the device, but refuses
 * every call that needs the context. */
bool fgpu_current(CUdevice *device)
{
    __typeof__(&cuCtxGetDevice) get = REAL(cuCtxGetDevice);
    int saved = errno;
    bool known = get && get(device) == CUDA_SUCCESS;
    if (atomic_load_explicit(&fgpu_contexts_ended, memory_order_relaxed)) known = known && !fgpu_current_is_gone();
    errno = saved;
    return known;
}

CUcontext fgpu_current_context(void)
{
    __typeof__(&cuCtxGetCurrent) get = REAL(cuCtxGetCurrent);
    CUcontext context = NULL;
    int saved = errno;
    bool known = get && get(&context) == CUDA_SUCCESS;
    errno = saved;
    return known ? context : NULL;
}
