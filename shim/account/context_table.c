/*
 * context_table.c: the contexts that were created, retained or destroyed, and the last managed allocations. Owns these
 * lists.
 */
#include "account/account.h"

#define CREATED 16
#define MANAGED 128

/* The contexts created last. A context for which there is no room in this list keeps its managed memory charged, as the
 * primary context does. */
static _Atomic uint64_t created[CREATED], managed[MANAGED];
static _Atomic unsigned creations, takings;

/* The contexts destroyed last. One of them may still be current in a thread. */
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

void fgpu_context_note_end(uint64_t context)
{
    keep(ended, CREATED, &endings, context);
    atomic_store(&fgpu_contexts_ended, true);
}

/* Return whether the current context was destroyed. Ask the driver too: another context may have the same handle by
 * now. */
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

bool fgpu_primary_enter(CUdevice device, CUcontext context)
{
    return atomic_exchange(&primaries[device], (uint64_t)context) != (uint64_t)context;
}

void fgpu_context_note_life(CUcontext context) { forget(ended, CREATED, (uint64_t)context); }

uint64_t fgpu_primary_of(CUdevice device) { return atomic_load(&primaries[device]); }

void fgpu_contexts_add(CUcontext context) { keep(created, CREATED, &creations, (uint64_t)context); }

void fgpu_managed_made(CUdeviceptr at) { keep(managed, MANAGED, &takings, at); }
bool fgpu_context_is_created(CUcontext context) { return context && place_of(created, CREATED, (uint64_t)context); }
bool fgpu_context_is_known(CUcontext context)
{
    return fgpu_context_is_created(context) || (context && place_of(primaries, FGPU_DEVICES, (uint64_t)context));
}

/* Free the managed memory of a context before the context is destroyed, by calls that have a probe. NVML never shows
 * managed memory, and no probe reports which context becomes current, so only the driver can return the context of an
 * allocation. The frees wait for the same work as the destruction of the context. */
static void free_managed(CUcontext context)
{
    __typeof__(&cuPointerGetAttribute) ask = REAL(cuPointerGetAttribute);
    __typeof__(&cuMemFree_v2) driver = REAL(cuMemFree_v2);
    if (!ask || !driver) return;
    CUstreamCaptureMode mode = fgpu_relax();
    for (_Atomic uint64_t *place = managed; place < managed + MANAGED; place++) {
        CUcontext its = NULL;
        uint64_t at = atomic_load(place);
        bool is_known = at && ask(&its, CU_POINTER_ATTRIBUTE_CONTEXT, at) == CUDA_SUCCESS; /* not freed meanwhile */
        if (!at || (is_known && its != context)) continue;
        if (atomic_compare_exchange_strong(place, &at, 0) && is_known) driver(at);
    }
    fgpu_unrelax(mode);
}

void fgpu_contexts_remove(CUcontext context)
{
    _Atomic uint64_t *place = context ? place_of(created, CREATED, (uint64_t)context) : NULL;
    if (place) free_managed(context);
    if (place) atomic_store(place, 0);
}
