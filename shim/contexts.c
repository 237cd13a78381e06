/*
 * contexts.c: contexts that end, and what goes with them: launches in flight, what pools and graphs were granted, and
 * managed memory. Owns which contexts were created and have not ended, and the managed memory taken last.
 */
#include <errno.h>

#include "books.h"
#include "gate.h"

#define CREATED 16
#define MANAGED 128

/* The last ones: a context more is one whose managed memory stays charged, as that of the primary one. */
static _Atomic uint64_t created[CREATED], managed[MANAGED];
static _Atomic unsigned creations, takings;

static _Atomic uint64_t *place_of(_Atomic uint64_t *list, unsigned n, uint64_t what)
{
    for (unsigned i = 0; i < n; i++)
        if (atomic_load_explicit(&list[i], memory_order_relaxed) == what) return &list[i];
    return NULL;
}

static void keep(_Atomic uint64_t *list, unsigned n, _Atomic unsigned *turn, uint64_t what)
{
    uint64_t none = 0;
    if (place_of(list, n, what)) return;
    for (_Atomic uint64_t *room; (room = place_of(list, n, 0)); none = 0)
        if (atomic_compare_exchange_strong(room, &none, what)) return;
    atomic_store(&list[atomic_fetch_add(turn, 1) % n], what);
}

void fgpu_context_made(CUcontext context) { keep(created, CREATED, &creations, (uint64_t)context); }
void fgpu_managed_made(CUdeviceptr at) { keep(managed, MANAGED, &takings, at); }
bool fgpu_context_is_created(CUcontext context) { return context && place_of(created, CREATED, (uint64_t)context); }

/* NVML never shows managed memory, and the kernel sees no context become current: so whose it is, only the driver can
 * tell. It is freed before its context takes it along, by a call that the kernel sees. Both wait for the same work. */
static void free_managed(CUcontext context)
{
    __typeof__(&cuPointerGetAttribute) ask = REAL(cuPointerGetAttribute);
    __typeof__(&cuMemFree_v2) driver = REAL(cuMemFree_v2);
    if (!ask || !driver) return;
    CUstreamCaptureMode mode = fgpu_relax();
    for (_Atomic uint64_t *place = managed; place < managed + MANAGED; place++) {
        CUcontext whose = NULL;
        uint64_t at = atomic_load(place);
        bool is_known = at && ask(&whose, CU_POINTER_ATTRIBUTE_CONTEXT, at) == CUDA_SUCCESS; /* not freed long since */
        if (!at || (is_known && whose != context)) continue;
        if (atomic_compare_exchange_strong(place, &at, 0) && is_known) driver(at);
    }
    fgpu_unrelax(mode);
}

/* A handle that no cuCtxCreate gave may be one that the driver refuses to end. */
static void leave(CUcontext context)
{
    int saved = errno;
    _Atomic uint64_t *place = context ? place_of(created, CREATED, (uint64_t)context) : NULL;
    if (place) free_managed(context);
    if (place) atomic_store(place, 0);
    if (context) fgpu_context_ends(context);
    errno = saved;
}

#define END_CREATED(name)                                                                                              \
    EXPORT CUresult name(CUcontext ctx)                                                                                \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_ending ending;                                                                                     \
        fgpu_pools_leave(-1);                                                                                          \
        leave(ctx);                                                                                                    \
        fgpu_context_leaves(&ending, ctx);                                                                             \
        CUresult result = driver(ctx);                                                                                 \
        fgpu_context_left(&ending, result == CUDA_SUCCESS);                                                            \
        fgpu_pools_return(-1);                                                                                         \
        return result;                                                                                                 \
    }
END_CREATED(cuCtxDestroy)
END_CREATED(cuCtxDestroy_v2)

/* A primary context outlives all but its last release. */
static bool is_active(CUdevice device)
{
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned flags;
    int active = 0, saved = errno;
    bool known = state && state(device, &flags, &active) == CUDA_SUCCESS;
    errno = saved;
    return known && active;
}

#define END_PRIMARY(name)                                                                                              \
    EXPORT CUresult name(CUdevice dev)                                                                                 \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_ending ending;                                                                                     \
        fgpu_pools_leave(dev);                                                                                         \
        fgpu_primary_leaves(&ending, dev);                                                                             \
        CUresult result = driver(dev);                                                                                 \
        bool ended = dev >= 0 && !is_active(dev);                                                                      \
        if (ended) fgpu_primary_ends(dev);                                                                             \
        fgpu_context_left(&ending, ended);                                                                             \
        fgpu_pools_return(dev);                                                                                        \
        return result;                                                                                                 \
    }
END_PRIMARY(cuDevicePrimaryCtxRelease)
END_PRIMARY(cuDevicePrimaryCtxRelease_v2)
END_PRIMARY(cuDevicePrimaryCtxReset)
END_PRIMARY(cuDevicePrimaryCtxReset_v2)

/* Soon; false: nothing was ever in flight. */
static bool leave_green(CUgreenCtx green)
{
    __typeof__(&cuCtxFromGreenCtx) of = REAL(cuCtxFromGreenCtx);
    CUcontext context = NULL;
    int index = 0, saved = errno;
    while (index < FGPU_DEVICES && !fgpu_flight_is_used(index)) index++;
    if (index == FGPU_DEVICES) return false;
    CUstreamCaptureMode mode = fgpu_relax();
    if (!of || of(&context, green) != CUDA_SUCCESS) context = NULL;
    fgpu_unrelax(mode);
    for (; index < FGPU_DEVICES; index++)
        if (fgpu_flight_is_used(index)) fgpu_flight_leave(index, context);
    errno = saved;
    return true;
}

/* It ends at once, and its work goes on: in the primary context, whose end it may be. */
EXPORT CUresult cuGreenCtxDestroy(CUgreenCtx hCtx)
{
    __typeof__(&cuGreenCtxDestroy) driver = REAL(cuGreenCtxDestroy);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    fgpu_pools_leave(-1);
    bool flies = leave_green(hCtx);
    CUresult result = driver(hCtx);
    for (CUdevice device = 0; (flies || fgpu_has_grants()) && device < FGPU_DEVICES; device++) {
        struct fgpu_ending ending;
        if (is_active(device)) continue;
        fgpu_primary_leaves(&ending, device);
        fgpu_context_left(&ending, true);
        fgpu_primary_ends(device);
    }
    fgpu_pools_return(-1);
    return result;
}
