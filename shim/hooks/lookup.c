/*
 * lookup.c: how a program reaches the hooks. Owns the table of hooks; decides nothing.
 *
 * A program reaches a hook in four ways: by the exported names (programs linked to the driver), by dlsym, by
 * cuGetProcAddress, which returns pointers without a symbol lookup, and by the driver's own symbol table
 * (core/exports.c): lookups that do not find the exported names end there. For a name that this driver lacks, lookups
 * still find nothing.
 *
 * A hook calls the driver of its thread. That is the first driver, unless the call came through an entry of the second
 * driver below, which sets fgpu_calls_second during the call. Calls that allocate memory with an admission of their
 * own, and calls that free it, have an entry. Allocations from pools have an entry that refuses them under a limit,
 * because the shim counts the pools of one driver only. All other calls go to the second driver directly, launches too,
 * and no gate holds these launches back.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>

#include "account/account.h"
#include "core/symbols.h"
#include "link/link.h"

#define FGPU_PASS ((void *)1) /* jumps.S uses this number: jump to the real function */

/* The offset of each hook from this table; 0: the name has none. With pointers, the loader of every program would have
 * to process one relocation for each hook. */
#define HOOK(name) ".long " #name " - hooks\n"
#define NEED(name) ".long 0\n"
__asm__(".pushsection .rodata\n.balign 4\nhooks:\n" FGPU_DRIVER_TABLE(HOOK, NEED)
            FGPU_NVML_TABLE(HOOK, NEED) ".popsection");
extern HIDDEN const int32_t hooks[FGPU_NAMES];

static void *hook_at(enum fgpu_name at) { return fgpu_hook(hooks, at); }

HIDDEN void *fgpu_lookup(void *handle, const char *name);
HIDDEN void *fgpu_before_dlopen(const char *file, int flags);

#pragma GCC push_options
#pragma GCC optimize("Os") /* until the end of the entries: no program makes many such calls */

/* -- entries of the second driver */

#define ENTRY(name, params, args)                                                                                      \
    static CUresult name##_second params                                                                               \
    {                                                                                                                  \
        bool before = fgpu_calls_second;                                                                               \
        fgpu_calls_second = true;                                                                                      \
        CUresult result = name args;                                                                                   \
        fgpu_calls_second = before;                                                                                    \
        return result;                                                                                                 \
    }

/* The shim counts the pools of one driver only. */
#define POOL(name, params, args)                                                                                       \
    static CUresult name##_second params                                                                               \
    {                                                                                                                  \
        bool before = fgpu_calls_second;                                                                               \
        fgpu_calls_second = true;                                                                                      \
        __typeof__(&name) driver = REAL(name);                                                                         \
        fgpu_calls_second = before;                                                                                    \
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

#define PLACE(name, params, args) {FGPU_AT_##name, (void *)name##_second},
static const struct {
    enum fgpu_name at;
    void *entry;
} entries[] = {ENTRIES(PLACE, PLACE)};

static void *entry_of_second(enum fgpu_name at)
{
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (entries[i].at == at) return entries[i].entry;
    return NULL;
}

static void *hook_of_second(enum fgpu_name at, void *found)
{
    void *entry = entry_of_second(at);
    return entry && fgpu_is_of_second(found) ? entry : NULL;
}

#pragma GCC pop_options

/* -- lookups */

static enum fgpu_name hooked(const char *name)
{
    /* Nearly every lookup of nearly every program returns here. */
    if (!(name[0] == 'c' && name[1] == 'u') && !(name[0] == 'n' && name[1] == 'v')) return FGPU_NAMES;
    enum fgpu_name at = fgpu_name_at(name);
    return at != FGPU_NAMES && hooks[at] ? at : FGPU_NAMES;
}

/* Return the result of dlsym for the program, or FGPU_PASS. The program's own lookup comes last, so that dlerror
 * reports that lookup. */
void *fgpu_lookup(void *handle, const char *name)
{
    if (!fgpu_real_dlsym) fgpu_resolve_dlsym();
    if (!name || !fgpu_real_dlsym) return FGPU_PASS;
    enum fgpu_name at = hooked(name);
    if (at == FGPU_NAMES) return FGPU_PASS;
    int saved = errno;
    void *hook = hook_at(at), *driver = fgpu_find_anew(at, hooks), *second;
    if (handle == RTLD_NEXT) { /* the symbol that the caller finds is hooked now, unless it is another wrapper */
        errno = saved;
        return FGPU_PASS;
    }
    void *found = fgpu_real_dlsym(handle, name);
    if (found == hook) {
        /* A search of the whole program finds the shim's own export first: decide by the driver behind it. */
        if (!driver) driver = fgpu_real_dlsym(RTLD_NEXT, name);
        found = driver ? hook : NULL;
    } else if (found && found == driver) {
        found = hook;
    } else if (found && !driver && handle != RTLD_DEFAULT) {
        fgpu_keep_foreign(at, found);
        found = hook;
    } else if (found && (second = hook_of_second(at, found))) {
        found = hook = second;
    } /* else a function of another preload, or of the second driver without an entry: leave it unchanged; probes report
         its calls */
    errno = saved;
    return found;
}

/* A file that is opened with RTLD_DEEPBIND looks names up in itself and in its dependencies before the shim, so the
 * driver must have the hooks by then. Such files are rare. */
void *fgpu_before_dlopen(const char *file, int flags)
{
    if (!fgpu_real_dlsym) fgpu_resolve_dlsym();
    if (file && (flags & (RTLD_DEEPBIND | RTLD_NOLOAD)) == RTLD_DEEPBIND && fgpu_real_dlopen) {
        int saved = errno;
        fgpu_load_for_good(FGPU_AT_cuInit, file, hooks);
        fgpu_load_for_good(FGPU_AT_nvmlDeviceGetMemoryInfo, file, hooks);
        errno = saved;
    }
    return FGPU_PASS;
}

/* Replace a function of the driver by its hook. `asked` has no version ("cuCtxCreate"); only the address shows which
 * version was returned. */
static void substitute(const char *asked, void **answer)
{
    size_t length = strlen(asked);
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++) {
        const char *name = fgpu_name_of(at);
        if (!hooks[at] || strncmp(name, asked, length) || (name[length] && name[length] != '_')) continue;
        if (fgpu_real(at) != *answer) continue;
        void *hook = fgpu_calls_second ? entry_of_second(at) : hook_at(at);
        if (!hook) return;
        *answer = hook;
        return;
    }
}

EXPORT CUresult cuGetProcAddress(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags)
{
    __typeof__(&cuGetProcAddress) driver = REAL(cuGetProcAddress);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(symbol, pfn, cudaVersion, flags);
    if (result == CUDA_SUCCESS && symbol && pfn && *pfn) substitute(symbol, pfn);
    return result;
}

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult *symbolStatus)
{
    __typeof__(&cuGetProcAddress_v2) driver = REAL(cuGetProcAddress_v2);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(symbol, pfn, cudaVersion, flags, symbolStatus);
    if (result == CUDA_SUCCESS && symbol && pfn && *pfn) substitute(symbol, pfn);
    return result;
}

EXPORT CUresult cuInit(unsigned int Flags)
{
    struct fgpu_asked announced = fgpu_announce();
    __typeof__(&cuInit) driver = REAL(cuInit);
    CUresult result = driver ? driver(Flags) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_arrive(announced);
    return result;
}
