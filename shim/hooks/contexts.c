/*
 * contexts.c: calls that create and destroy contexts, and what is released with a context: launches in flight,
 * admissions of pools and graphs, and managed memory. Owns nothing.
 */
#include <errno.h>

#include "account/graph_memory.h"
#include "account/pool.h"
#include "account/stream.h"
#include "code/local_memory.h"
#include "gate/gate.h"
#include "link/link.h"
#include "standalone/standalone.h"

/* -- contexts that are created: half a GiB each on a large device. Only the kernel's ledger has their size, so the
 * request is for 0 bytes. */

/* Request room for a context. */
static struct admission admission_of(CUdevice device)
{
    fgpu_arrive(fgpu_announce()); /* the driver opens device nodes */
    return fgpu_admission(device, 0, FGPU_CONTEXT);
}

static void primary_seen(CUdevice device, CUcontext context)
{
    if (device < 0 || device >= FGPU_DEVICES) return;
    if (fgpu_primary_enter(device, context)) fgpu_area_begins();
    fgpu_context_note_life(context);
}

static void context_made(CUcontext context)
{
    fgpu_context_note_life(context);
    fgpu_contexts_add(context);
    fgpu_area_begins();
}

/* Threads that create a primary context. Each requests room for it, because none knows which of them the driver will
 * serve first; the others' bytes are released when they return. */
static _Atomic unsigned creating;

/* Return whether another thread has created the context that was refused to this thread. Wait until such threads have
 * returned, and with them the charge, 2 s at most. A fork copies the counts of threads that do not exist in the child.
 */
static bool is_made_meanwhile(CUdevice device, __typeof__(&cuDevicePrimaryCtxGetState) state)
{
    unsigned flags;
    int active = 0;
    for (unsigned round = 0; atomic_load(&creating) && round < 1000; round++) fgpu_nap(2000000);
    return state && state(device, &flags, &active) == CUDA_SUCCESS && active;
}

static CUresult retain_further(CUcontext *pctx, CUdevice device, __typeof__(&cuDevicePrimaryCtxRetain) driver)
{
    CUresult result = driver(pctx, device);
    if (result == CUDA_SUCCESS && pctx) primary_seen(device, *pctx);
    return result;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    __typeof__(&cuDevicePrimaryCtxRetain) driver = REAL(cuDevicePrimaryCtxRetain);
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned flags;
    int active = 0;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult known = state ? state(dev, &flags, &active) : CUDA_SUCCESS;
    if (active) fgpu_device_seen(dev);
    /* A further reference allocates nothing. The driver refuses a device that does not exist. */
    if (!pctx || known != CUDA_SUCCESS || active) return retain_further(pctx, dev, driver);
    atomic_fetch_add(&creating, 1);
    struct admission admission = admission_of(dev);
    if (admission.refusal) {
        atomic_fetch_sub(&creating, 1);
        return is_made_meanwhile(dev, state) ? retain_further(pctx, dev, driver) : admission.refusal;
    }
    CUresult result = driver(pctx, dev);
    if (result == CUDA_SUCCESS) fgpu_device_seen(dev);
    if (result == CUDA_SUCCESS) primary_seen(dev, *pctx);
    fgpu_settled(&admission, result, result ? 0 : (uint64_t)*pctx);
    if (result == CUDA_SUCCESS) fgpu_primary_made(dev, (uint64_t)*pctx);
    atomic_fetch_sub(&creating, 1);
    return result;
}

/* The driver refuses a device that does not exist, in every state of the link; an out-of-memory would hide that
 * error. */
#define CREATE_CONTEXT(name, device, ...)                                                                              \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!pctx || !fgpu_is_device(device)) return driver(__VA_ARGS__);                                              \
        struct admission admission = admission_of(device);                                                             \
        if (admission.refusal) return admission.refusal;                                                               \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        if (result == CUDA_SUCCESS) fgpu_device_seen(device);                                                          \
        if (result == CUDA_SUCCESS) context_made(*pctx);                                                               \
        return fgpu_settled(&admission, result, result ? 0 : (uint64_t)*pctx);                                         \
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

#define NO_HANDLE 0x100ULL

/* A green context uses the device's primary context, and creates it if there is none. Then the size of a context is
 * requested, which the probe settles. */
EXPORT CUresult cuGreenCtxCreate(CUgreenCtx *phCtx, CUdevResourceDesc desc, CUdevice dev, unsigned int flags)
{
    __typeof__(&cuGreenCtxCreate) driver = REAL(cuGreenCtxCreate);
    __typeof__(&cuDevicePrimaryCtxGetState) state = REAL(cuDevicePrimaryCtxGetState);
    unsigned set;
    int active = 0;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult known = state ? state(dev, &set, &active) : CUDA_SUCCESS;
    struct admission admission = {.index = -1};
    if (known == CUDA_SUCCESS && !active && fgpu_is_device(dev)) {
        admission = admission_of(dev);
        if (admission.refusal) return admission.refusal;
    }
    CUresult result = driver(phCtx, desc, dev, flags);
    if (result == CUDA_SUCCESS) fgpu_device_seen(dev);
    /* The handle of the primary context is not known here. */
    fgpu_settled_standalone(&admission, result, NO_HANDLE + (uint64_t)dev);
    if (result == CUDA_SUCCESS) fgpu_primary_made(dev, NO_HANDLE + (uint64_t)dev);
    return result;
}

/* -- contexts that end */

static void note_end(uint64_t context)
{
    if (!context) return;
    fgpu_area_ends(context);
    fgpu_data_of_context_ends(context);
    fgpu_context_note_end(context);
    fgpu_freed_unseen();
}

/* Measure what pools and graphs still hold. `ordinal` < 0: on all devices. */
static void measure(CUdevice ordinal)
{
    fgpu_graphs_measure(ordinal);
    fgpu_pools_measure(ordinal);
}

/* A context is about to be destroyed. If cuCtxCreate did not return its handle, the driver may refuse to destroy it. */
static void leave(CUcontext context)
{
    int saved = errno;
    fgpu_contexts_remove(context);
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
        measure(-1);                                                                                                   \
        return result;                                                                                                 \
    }
END_CREATED(cuCtxDestroy)
END_CREATED(cuCtxDestroy_v2)

/* Return whether the primary context exists: it exists until its last release. */
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
    if (device < FGPU_DEVICES) note_end(fgpu_primary_of(device));
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
        measure(dev);                                                                                                  \
        return result;                                                                                                 \
    }
END_PRIMARY(cuDevicePrimaryCtxRelease)
END_PRIMARY(cuDevicePrimaryCtxRelease_v2)
END_PRIMARY(cuDevicePrimaryCtxReset)
END_PRIMARY(cuDevicePrimaryCtxReset_v2)

/* A green context is about to be destroyed. Returns false if nothing was ever in flight. */
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

/* A green context is destroyed at once, and its work continues in the primary context, which may be destroyed with
 * it. */
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
    measure(-1);
    return result;
}
