/*
 * contexts.c: contexts that end, and what goes with them: launches in flight, what pools and graphs were granted, and
 * managed memory. Owns which contexts were created and have not ended, and the managed memory taken last.
 */
#include <errno.h>

#include "books.h"
#include "gate.h"
#include "local_memory.h"

#define CREATED 16
#define MANAGED 128

/* The last ones: a context more is one whose managed memory stays charged, as that of the primary one. */
static _Atomic uint64_t created[CREATED], managed[MANAGED];
static _Atomic unsigned creations, takings;

/* Contexts that ended last: one that is current in a thread all the same. */
static _Atomic uint64_t ended[CREATED], primaries[FGPU_DEVICES];
static _Atomic unsigned endings;
_Atomic bool fgpu_contexts_ended;

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

static void forget(_Atomic uint64_t *list, unsigned n, uint64_t what)
{
    _Atomic uint64_t *place = place_of(list, n, what);
    if (place) atomic_compare_exchange_strong(place, &what, 0);
}

static void note_end(uint64_t context)
{
    if (!context) return;
    fgpu_area_ends(context);
    fgpu_data_of_context_ends(context);
    keep(ended, CREATED, &endings, context);
    atomic_store(&fgpu_contexts_ended, true);
}

/* The driver is asked too: a handle may be another context's by now. */
bool fgpu_current_is_gone(void)
{
    __typeof__(&cuCtxGetCurrent) get = REAL(cuCtxGetCurrent);
    __typeof__(&cuMemGetInfo_v2) ask = REAL(cuMemGetInfo_v2);
    CUcontext context;
    size_t available, total;
    if (!get || !ask || get(&context) != CUDA_SUCCESS || !context) return false;
    if (!place_of(ended, CREATED, (uint64_t)context)) return false;
    CUstreamCaptureMode mode = fgpu_relax();
    bool is_gone = ask(&available, &total) != CUDA_SUCCESS;
    fgpu_unrelax(mode);
    return is_gone;
}

void fgpu_primary_seen(CUdevice device, CUcontext context)
{
    if (device < 0 || device >= FGPU_DEVICES) return;
    if (atomic_exchange(&primaries[device], (uint64_t)context) != (uint64_t)context) fgpu_area_begins();
    forget(ended, CREATED, (uint64_t)context);
}

void fgpu_context_made(CUcontext context)
{
    forget(ended, CREATED, (uint64_t)context);
    keep(created, CREATED, &creations, (uint64_t)context);
    fgpu_area_begins();
}
void fgpu_managed_made(CUdeviceptr at) { keep(managed, MANAGED, &takings, at); }
bool fgpu_context_is_created(CUcontext context) { return context && place_of(created, CREATED, (uint64_t)context); }
bool fgpu_context_is_known(CUcontext context)
{
    return fgpu_context_is_created(context) || (context && place_of(primaries, FGPU_DEVICES, (uint64_t)context));
}

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
        leave(ctx);                                                                                                    \
        fgpu_context_leaves(&ending, ctx);                                                                             \
        CUresult result = driver(ctx);                                                                                 \
        fgpu_context_left(&ending, result == CUDA_SUCCESS);                                                            \
        if (result == CUDA_SUCCESS) note_end((uint64_t)ctx);                                                           \
        fgpu_pools_measure(-1);                                                                                        \
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

static void end_primary(CUdevice device)
{
    fgpu_primary_ends(device);
    if (device < FGPU_DEVICES) note_end(atomic_load(&primaries[device]));
}

#define END_PRIMARY(name)                                                                                              \
    EXPORT CUresult name(CUdevice dev)                                                                                 \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_ending ending;                                                                                     \
        fgpu_primary_leaves(&ending, dev);                                                                             \
        CUresult result = driver(dev);                                                                                 \
        bool ends = dev >= 0 && !is_active(dev);                                                                       \
        if (ends) end_primary(dev);                                                                                    \
        fgpu_context_left(&ending, ends);                                                                              \
        fgpu_pools_measure(dev);                                                                                       \
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
    bool flies = leave_green(hCtx);
    CUresult result = driver(hCtx);
    for (CUdevice device = 0; (flies || fgpu_has_grants()) && device < FGPU_DEVICES; device++) {
        struct fgpu_ending ending;
        if (is_active(device)) continue;
        fgpu_primary_leaves(&ending, device);
        fgpu_context_left(&ending, true);
        end_primary(device);
    }
    fgpu_pools_measure(-1);
    return result;
}
