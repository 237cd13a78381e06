/*
 * beside.c: further drivers in the same process (a second file of libcuda, loaded for somebody's own use). Owns which
 * they are; they are never let go.
 *
 * A hook calls the driver of its thread: the first one, unless the call came by one of the entries here, which say for
 * as long as it lasts whose it is. What takes memory and can be asked about call by call has an entry. Pools cannot: a
 * further driver has none where a limit holds. The rest is the driver's own, launches too, and no gate holds those.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>

#include "shim.h"

HIDDEN __thread bool fgpu_beside __attribute__((tls_model("initial-exec"))) = false;

/* One; a third driver of a process has no hooks, and the kernel sees what it takes. */
static _Atomic(void *) further, further_base; /* its handle, and where it lies, which is set last */

/* Looked up at every call: nobody makes many of them, and what is not kept takes no room in other programs. */
void *fgpu_real_beside(enum fgpu_name at) { return fgpu_symbol(atomic_load(&further), at); }

/* -- the entries */

#define ENTRY(name, params, args)                                                                                      \
    static CUresult name##_beside params                                                                               \
    {                                                                                                                  \
        bool before = fgpu_beside;                                                                                     \
        fgpu_beside = true;                                                                                            \
        CUresult result = name args;                                                                                   \
        fgpu_beside = before;                                                                                          \
        return result;                                                                                                 \
    }

/* The shim's books of pools are of one driver's. */
#define POOL(name, params, args)                                                                                       \
    static CUresult name##_beside params                                                                               \
    {                                                                                                                  \
        bool before = fgpu_beside;                                                                                     \
        fgpu_beside = true;                                                                                            \
        __typeof__(&name) driver = REAL(name);                                                                         \
        fgpu_beside = before;                                                                                          \
        return driver && !fgpu_is_limited(fgpu_look()) ? driver args : CUDA_ERROR_NOT_SUPPORTED;                       \
    }

#define ENTRIES(ENTRY, POOL)                                                                                           \
    ENTRY(cuInit, (unsigned flags), (flags))                                                                           \
    ENTRY(cuGetProcAddress, (const char *name, void **out, int version, cuuint64_t flags),                             \
          (name, out, version, flags))                                                                                 \
    ENTRY(cuGetProcAddress_v2,                                                                                         \
          (const char *name, void **out, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *how),          \
          (name, out, version, flags, how))                                                                            \
    ENTRY(cuMemAlloc_v2, (CUdeviceptr * out, size_t bytes), (out, bytes))                                              \
    ENTRY(cuMemAllocPitch_v2, (CUdeviceptr * out, size_t * pitch, size_t width, size_t height, unsigned element),      \
          (out, pitch, width, height, element))                                                                        \
    ENTRY(cuMemAllocManaged, (CUdeviceptr * out, size_t bytes, unsigned flags), (out, bytes, flags))                   \
    ENTRY(cuMemCreate,                                                                                                 \
          (CUmemGenericAllocationHandle * out, size_t bytes, const CUmemAllocationProp *prop, unsigned long long f),   \
          (out, bytes, prop, f))                                                                                       \
    ENTRY(cuArrayCreate_v2, (CUarray * out, const CUDA_ARRAY_DESCRIPTOR *shape), (out, shape))                         \
    ENTRY(cuArray3DCreate_v2, (CUarray * out, const CUDA_ARRAY3D_DESCRIPTOR *shape), (out, shape))                     \
    ENTRY(cuMipmappedArrayCreate, (CUmipmappedArray * out, const CUDA_ARRAY3D_DESCRIPTOR *shape, unsigned levels),     \
          (out, shape, levels))                                                                                        \
    ENTRY(cuMemFree_v2, (CUdeviceptr at), (at))                                                                        \
    ENTRY(cuArrayDestroy, (CUarray array), (array))                                                                    \
    ENTRY(cuMipmappedArrayDestroy, (CUmipmappedArray array), (array))                                                  \
    ENTRY(cuMemRelease, (CUmemGenericAllocationHandle handle), (handle))                                               \
    ENTRY(                                                                                                             \
        cuMemMap,                                                                                                      \
        (CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags),  \
        (at, bytes, offset, handle, flags))                                                                            \
    ENTRY(cuMemUnmap, (CUdeviceptr at, size_t bytes), (at, bytes))                                                     \
    ENTRY(cuMemRetainAllocationHandle, (CUmemGenericAllocationHandle * out, void *at), (out, at))                      \
    ENTRY(cuMemGetInfo_v2, (size_t * available, size_t * total), (available, total))                                   \
    ENTRY(cuDeviceTotalMem_v2, (size_t * total, CUdevice device), (total, device))                                     \
    ENTRY(cuDevicePrimaryCtxRetain, (CUcontext * out, CUdevice device), (out, device))                                 \
    ENTRY(cuCtxCreate_v2, (CUcontext * out, unsigned flags, CUdevice device), (out, flags, device))                    \
    ENTRY(cuCtxCreate_v3, (CUcontext * out, CUexecAffinityParam * params, int count, unsigned flags, CUdevice device), \
          (out, params, count, flags, device))                                                                         \
    ENTRY(cuCtxCreate_v4, (CUcontext * out, CUctxCreateParams * params, unsigned flags, CUdevice device),              \
          (out, params, flags, device))                                                                                \
    ENTRY(cuGreenCtxCreate, (CUgreenCtx * out, CUdevResourceDesc what, CUdevice device, unsigned flags),               \
          (out, what, device, flags))                                                                                  \
    POOL(cuMemAllocAsync, (CUdeviceptr * out, size_t bytes, CUstream stream), (out, bytes, stream))                    \
    POOL(cuMemAllocAsync_ptsz, (CUdeviceptr * out, size_t bytes, CUstream stream), (out, bytes, stream))               \
    POOL(cuMemAllocFromPoolAsync, (CUdeviceptr * out, size_t bytes, CUmemoryPool pool, CUstream stream),               \
         (out, bytes, pool, stream))                                                                                   \
    POOL(cuMemAllocFromPoolAsync_ptsz, (CUdeviceptr * out, size_t bytes, CUmemoryPool pool, CUstream stream),          \
         (out, bytes, pool, stream))

ENTRIES(ENTRY, POOL)

#define PLACE(name, params, args) {FGPU_AT_##name, (void *)name##_beside},
static const struct {
    enum fgpu_name at;
    void *entry;
} entries[] = {ENTRIES(PLACE, PLACE)};

void *fgpu_entry_beside(enum fgpu_name at)
{
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (entries[i].at == at) return entries[i].entry;
    return NULL;
}

/* -- which driver it is */

static void *base_of(void *address, const char **path)
{
    int (*ask)(const void *, Dl_info *) = (__typeof__(ask))fgpu_real_dlsym(RTLD_DEFAULT, "dladdr");
    Dl_info info;
    if (!address || !ask || !ask(address, &info)) return NULL;
    *path = info.dli_fname;
    return info.dli_fbase;
}

/* The whole of a driver is in one file; another preload that stands in for a function of it is no driver. */
static void *open_driver(const char *path, const void *base)
{
    const char *other;
    void *library = fgpu_open_loaded(path);
    if (!library || base_of(fgpu_real_dlsym(library, "cuDriverGetVersion"), &other) == base) return library;
    fgpu_close(library);
    return NULL;
}

static bool is_further(const char *path, void *base)
{
    void *nobody = NULL, *known = atomic_load(&further_base);
    if (known) return known == base;
    void *library = open_driver(path, base);
    if (!library) return false;
    if (atomic_compare_exchange_strong(&further, &nobody, library)) {
        atomic_store(&further_base, base);
        return true;
    }
    fgpu_close(library); /* another thread was first; this is the same file, as a rule */
    return nobody == library;
}

void *fgpu_hook_beside(enum fgpu_name at, void *found)
{
    const char *path = NULL;
    void *entry = fgpu_entry_beside(at), *base = entry ? base_of(found, &path) : NULL;
    return base && is_further(path, base) ? entry : NULL;
}
