/*
 * memory.c: no allocation without admission. Owns what it learned about the devices; keeps no books, the kernel does.
 *
 * Asked is the size that the driver will take, so that what was admitted is what will be charged. A refusal is the
 * driver's own out-of-memory. An error of the driver stays the driver's: the kernel sees the return and gives the
 * admission back.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "shim.h"

#define SMALL_ALIGNMENT 512ULL
#define TOO_MUCH (FGPU_MOST_BYTES + 1) /* the kernel refuses it, and counts the refusal */

static struct device {
    _Atomic uint64_t uuid[2];
    _Atomic bool known;
    _Atomic uint64_t granule;
} devices[FGPU_DEVICES]; /* by the driver's ordinal */

int fgpu_index_of_uuid(const struct fgpu_control_page *control, const uint8_t uuid[16])
{
    unsigned count = control->device_count;
    for (unsigned i = 0; i < count && i < FGPU_DEVICES; i++)
        if (!memcmp(control->devices[i].uuid, uuid, 16))
            return control->devices[i].index < FGPU_DEVICES ? (int)control->devices[i].index : -1;
    return -1;
}

/* The driver's UUID of an ordinal never changes in a process. Threads that fill it at once write the same. */
static struct device *device_of(CUdevice ordinal)
{
    if (ordinal < 0 || ordinal >= FGPU_DEVICES) return NULL;
    struct device *device = &devices[ordinal];
    if (atomic_load_explicit(&device->known, memory_order_acquire)) return device;
    __typeof__(&cuDeviceGetUuid_v2) get = REAL(cuDeviceGetUuid_v2);
    if (!get) get = REAL(cuDeviceGetUuid);
    union {
        CUuuid uuid;
        uint64_t words[2];
    } answer;
    int saved = errno;
    CUresult result = get ? get(&answer.uuid, ordinal) : CUDA_ERROR_NOT_SUPPORTED;
    errno = saved;
    if (result != CUDA_SUCCESS) return NULL;
    for (int i = 0; i < 2; i++) atomic_store_explicit(&device->uuid[i], answer.words[i], memory_order_relaxed);
    atomic_store_explicit(&device->known, true, memory_order_release);
    return device;
}

/*
 * By UUID: CUDA's ordinals are what CUDA_VISIBLE_DEVICES makes of them. The page is searched each time, since a hello
 * may have brought another one; sixteen comparisons are nothing beside the call that follows.
 */
int fgpu_index(const struct fgpu_control_page *control, CUdevice ordinal)
{
    struct device *device = device_of(ordinal);
    if (!device) return -1;
    uint64_t words[2] = {atomic_load_explicit(&device->uuid[0], memory_order_relaxed),
                         atomic_load_explicit(&device->uuid[1], memory_order_relaxed)};
    return fgpu_index_of_uuid(control, (const uint8_t *)words);
}

/* The unit in which the driver takes memory for this device; asked once. 0: it does not say, sizes go as they are. */
static uint64_t granule_of(CUdevice ordinal)
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
    CUresult result = get ? get(&answer, &where, CU_MEM_ALLOC_GRANULARITY_MINIMUM) : CUDA_ERROR_NOT_SUPPORTED;
    errno = saved;
    if (result != CUDA_SUCCESS) return 0;
    if (answer > FGPU_MOST_BYTES || (answer & (answer - 1))) return 0; /* the rounding below wants a power of two */
    atomic_store_explicit(&device->granule, answer, memory_order_relaxed);
    return answer;
}

/* Up to half a granule allocations share one (measured); above, each takes whole ones. */
static uint64_t taken(uint64_t bytes, uint64_t granule)
{
    if (bytes > FGPU_MOST_BYTES) return TOO_MUCH;
    uint64_t unit = granule && bytes > granule / 2 ? granule : SMALL_ALIGNMENT;
    return (bytes + unit - 1) & ~(unit - 1);
}

/* One question to the kernel, and what to tell it when the driver has answered. */
struct admission {
    CUresult refusal; /* CUDA_SUCCESS: go on */
    bool settles;     /* no return probe on this kernel: we say how it went */
    uint64_t ticket, bytes;
};

static CUresult ask_kernel(struct fgpu_view *view, CUdevice ordinal, uint64_t bytes, unsigned kind, uint64_t ticket)
{
    for (int round = 0; round < 2; round++) {
        if (view->link == FGPU_OPEN || view->link == FGPU_FREE) return CUDA_SUCCESS;
        if (view->link != FGPU_HELD) return CUDA_ERROR_OUT_OF_MEMORY;
        int index = fgpu_index(view->control, ordinal); /* not the tenant's: nothing of it is to be had */
        if (index < 0) return CUDA_ERROR_OUT_OF_MEMORY;
        int verdict = fgpu_ask(*view, (unsigned)index, bytes, kind, ticket);
        if (verdict >= 0) return verdict == FGPU_REFUSED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        if (!round) *view = fgpu_insist(); /* pages of a ledger that is gone, perhaps */
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

/* Open and unmanaged links cost one look at the state; nothing is rounded, asked or counted for them. */
static struct admission admit(CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct admission admission = {.refusal = CUDA_SUCCESS, .bytes = bytes};
    struct fgpu_view view = fgpu_look();
    if (view.link == FGPU_OPEN || view.link == FGPU_FREE) return admission;
    if (view.link != FGPU_HELD) {
        admission.refusal = CUDA_ERROR_OUT_OF_MEMORY;
        return admission;
    }
    if (kind == FGPU_MEMORY) admission.bytes = taken(bytes, granule_of(ordinal));
    admission.ticket = fgpu_ticket();
    admission.refusal = ask_kernel(&view, ordinal, admission.bytes, kind, admission.ticket);
    admission.settles = view.control && view.control->flags & FGPU_SETTLE;
    return admission;
}

/* The kernel sees how the driver's call ended, where it has return probes. Where it has none, this tells it. */
static CUresult settled(const struct admission *admission, CUresult result, uint64_t handle)
{
    if (admission->settles) fgpu_settle_here(handle, admission->bytes, result, admission->ticket);
    return result;
}

/* -- memory: on the device of the current context. Without one the driver says so; nothing is asked. */

bool fgpu_current(CUdevice *device)
{
    __typeof__(&cuCtxGetDevice) get = REAL(cuCtxGetDevice);
    int saved = errno;
    bool known = get && get(device) == CUDA_SUCCESS;
    errno = saved;
    return known;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
{
    __typeof__(&cuMemAlloc_v2) driver = REAL(cuMemAlloc_v2);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_current(&device)) return driver(dptr, bytesize);
    struct admission admission = admit(device, bytesize, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, bytesize);
    return settled(&admission, result, result ? 0 : *dptr);
}

/* NVML shows nothing of managed memory, touched or not: admission and witness are all that ever know of it. */
EXPORT CUresult cuMemAllocManaged(CUdeviceptr *dptr, size_t bytesize, unsigned int flags)
{
    __typeof__(&cuMemAllocManaged) driver = REAL(cuMemAllocManaged);
    CUdevice device;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !bytesize || !fgpu_current(&device)) return driver(dptr, bytesize, flags);
    struct admission admission = admit(device, bytesize, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, bytesize, flags);
    return settled(&admission, result, result ? 0 : *dptr);
}

/* Rows are padded to what the hardware reads at once, so the bytes are more than the caller's product. */
EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr *dptr, size_t *pPitch, size_t WidthInBytes, size_t Height,
                                   unsigned int ElementSizeBytes)
{
    __typeof__(&cuMemAllocPitch_v2) driver = REAL(cuMemAllocPitch_v2);
    CUdevice device;
    uint64_t row, bytes;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !WidthInBytes || !Height || !fgpu_current(&device))
        return driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    if (__builtin_add_overflow(WidthInBytes, SMALL_ALIGNMENT - 1, &row) ||
        __builtin_mul_overflow(row & ~(SMALL_ALIGNMENT - 1), Height, &bytes))
        bytes = TOO_MUCH;
    struct admission admission = admit(device, bytes, FGPU_MEMORY);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    return settled(&admission, result, result ? 0 : *dptr);
}

/* Physical memory of its own, mapped later: charged here, whether it is ever mapped or not. */
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags)
{
    __typeof__(&cuMemCreate) driver = REAL(cuMemCreate);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!handle || !size || !prop || prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return driver(handle, size, prop, flags);
    struct admission admission = admit(prop->location.id, size > FGPU_MOST_BYTES ? TOO_MUCH : size, FGPU_VMM);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(handle, size, prop, flags);
    return settled(&admission, result, result ? 0 : *handle);
}

/* -- contexts: half a GiB each on a large device. How much is the kernel's to know, hence 0 bytes. */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    __typeof__(&cuDevicePrimaryCtxRetain) driver = REAL(cuDevicePrimaryCtxRetain);
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned flags;
    int active = 0;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult known = state ? state(dev, &flags, &active) : CUDA_SUCCESS;
    /* One more reference takes nothing; a device that does not exist is the driver's to refuse. */
    if (!pctx || known != CUDA_SUCCESS || active) return driver(pctx, dev);
    struct admission admission = admit(dev, 0, FGPU_CONTEXT);
    if (admission.refusal) return admission.refusal;
    CUresult result = driver(pctx, dev);
    return settled(&admission, result, result ? 0 : (uint64_t)*pctx);
}

/* A device that does not exist is the driver's to refuse, in every link: not ours to hide behind out-of-memory. */
#define CREATE_CONTEXT(name, device, ...)                                                                              \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!pctx || !device_of(device)) return driver(__VA_ARGS__);                                                   \
        struct admission admission = admit(device, 0, FGPU_CONTEXT);                                                   \
        if (admission.refusal) return admission.refusal;                                                               \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        return settled(&admission, result, result ? 0 : (uint64_t)*pctx);                                              \
    } while (0)

EXPORT CUresult cuCtxCreate(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate, dev, pctx, flags, dev);
}

EXPORT CUresult cuCtxCreate_v2(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v2, dev, pctx, flags, dev);
}

EXPORT CUresult cuCtxCreate_v3(CUcontext *pctx, CUexecAffinityParam *paramsArray, int numParams, unsigned int flags,
                               CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v3, dev, pctx, paramsArray, numParams, flags, dev);
}

EXPORT CUresult cuCtxCreate_v4(CUcontext *pctx, CUctxCreateParams *ctxCreateParams, unsigned int flags, CUdevice dev)
{
    CREATE_CONTEXT(cuCtxCreate_v4, dev, pctx, ctxCreateParams, flags, dev);
}
