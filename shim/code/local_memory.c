/*
 * local_memory.c: the driver's memory for local memory of threads. Owns the areas of contexts, and the list of
 * functions that were launched with the present areas.
 *
 * A context has one area: a number of bytes for each thread that can be resident on the device. cuCtxSetLimit sets that
 * number, and the first launch of a function that needs more enlarges the area. No probe reports that. So the shim
 * requests the bytes beforehand, committed at once like those of pools, and releases them when the area shrinks or its
 * context is destroyed. Some memory is not requested here: the first bytes of each thread, which are part of the
 * context's own memory; the areas of green contexts, and of contexts for which the list has no room; the growth for
 * graphs that changed after they were created. NVML shows that memory, and the agent charges it.
 */
#define _GNU_SOURCE
#include "code/local_memory.h"

#include <errno.h>

#define CONTEXTS 32
#define FIRST_BYTES 1024ULL /* of a thread, in a new context */
#define MOST_BYTES (512ULL << 10)
#define UNIT 16ULL
#define FIRST_HEAP (8ULL << 20) /* the limit in a new context */
#define HEAP_UNIT (64ULL << 10)
#define HEAP_HEAD (2ULL << 20) /* beyond the limit */

struct fgpu_area {
    _Atomic uint64_t context; /* 0: free */
    _Atomic uint64_t more;    /* additional bytes of a thread, as far as is known */
    _Atomic uint64_t granted;
    _Atomic uint64_t busy_until_ns;
    _Atomic uint64_t heap_limit; /* 0: the default of a new context, or the heap exists already */
    _Atomic uint64_t heap;       /* granted */
    _Atomic int index;           /* the ledger's index, once something was admitted */
};
struct table { /* mapped at the first launch; zero after a fork, because the child has no context */
    struct fgpu_functions functions;
    struct fgpu_area areas[CONTEXTS];
    _Atomic uint64_t threads[FGPU_DEVICES]; /* number of threads that can be resident on the device; 0: the driver
                                               was not asked yet */
};
_Atomic(void *) fgpu_functions;   /* the table */
static _Atomic bool heaps;        /* a context has a limit other than the default */
static _Atomic unsigned contexts; /* made so far */

static struct table *known_table(void) { return atomic_load_explicit(&fgpu_functions, memory_order_acquire); }

static struct table *own_table(void) { return fgpu_table(&fgpu_functions, sizeof(struct table)); }

/* -- sizes */

static uint64_t threads_of(CUdevice ordinal)
{
    __typeof__(&cuDeviceGetAttribute) get = REAL(cuDeviceGetAttribute);
    _Atomic uint64_t *kept = &known_table()->threads[ordinal];
    uint64_t threads = atomic_load_explicit(kept, memory_order_relaxed);
    int processors = 0, each = 0;
    if (threads || !get) return threads;
    if (get(&processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, ordinal) != CUDA_SUCCESS ||
        get(&each, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, ordinal) != CUDA_SUCCESS || processors <= 0 ||
        each <= 0)
        return 0;
    threads = (uint64_t)processors * (uint64_t)each;
    atomic_store_explicit(kept, threads, memory_order_relaxed);
    return threads;
}

/* Return the size of an area: the nearest number of granules, as the driver computes it (measured). */
static uint64_t area_bytes(uint64_t threads, uint64_t bytes, uint64_t granule)
{
    if (__builtin_mul_overflow(threads, bytes, &bytes) || bytes > FGPU_MOST_BYTES) return TOO_MUCH;
    return granule ? (bytes + granule / 2) & ~(granule - 1) : bytes;
}

/* Return by how much an area is larger than that of a new context. 0: the driver does not report it. */
static uint64_t bytes_beyond(CUdevice ordinal, uint64_t more)
{
    uint64_t threads = threads_of(ordinal), granule = fgpu_granule(ordinal);
    return area_bytes(threads, FIRST_BYTES + more, granule) - area_bytes(threads, FIRST_BYTES, granule);
}

static uint64_t more_of(uint64_t bytes)
{
    uint64_t whole = (bytes + UNIT - 1) & ~(UNIT - 1);
    return whole > FIRST_BYTES ? whole - FIRST_BYTES : 0;
}

/* -- areas */

/* Return the area of a context. NULL: there is no room for it, or the context is a green context, which may use another
 * context's area. */
static struct fgpu_area *area_of(CUcontext context)
{
    struct table *own = own_table();
    if (!own || !fgpu_context_is_known(context)) return NULL;
    for (struct fgpu_area *area = own->areas; area < own->areas + CONTEXTS; area++)
        if (atomic_load(&area->context) == (uint64_t)context) return area;
    for (struct fgpu_area *area = own->areas; area < own->areas + CONTEXTS; area++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&area->context, &none, (uint64_t)context) || none == (uint64_t)context)
            return area;
    }
    return NULL;
}

static void give_back(struct fgpu_area *area, uint64_t bytes)
{
    uint64_t granted = atomic_load(&area->granted), less;
    do less = bytes < granted ? bytes : granted;
    while (!atomic_compare_exchange_weak(&area->granted, &granted, granted - less));
    fgpu_give_back(atomic_load(&area->index), less);
}

/* Request the growth of an area. If another thread is requesting already, this thread waits for its result, but not for
 * long. After that both request, and the surplus is released with the context. */
static CUresult grow(struct fgpu_growth *growth, struct fgpu_area *area, CUdevice ordinal, uint64_t more)
{
    if (more <= atomic_load(&area->more)) return CUDA_SUCCESS;
    uint64_t turn = fgpu_take_turn(&area->busy_until_ns), from = atomic_load(&area->more);
    uint64_t bytes = more > from ? bytes_beyond(ordinal, more) - bytes_beyond(ordinal, from) : 0;
    struct admission admission = {.index = -1};
    if (bytes) admission = fgpu_admission(ordinal, bytes, FGPU_POOL);
    if (admission.index >= 0) {
        *growth = (struct fgpu_growth){area, from, more, admission.bytes, admission.index};
        atomic_store(&area->index, admission.index);
        atomic_fetch_add(&area->granted, admission.bytes);
        atomic_compare_exchange_strong(&area->more, &from, more);
    }
    fgpu_end_turn(&area->busy_until_ns, turn);
    return admission.refusal;
}

/* The driver has failed: release the growth. If the area is larger by now, another call has succeeded with it. */
static void shrink_again(const struct fgpu_growth *growth)
{
    uint64_t more = growth->to;
    if (growth->bytes && atomic_compare_exchange_strong(&growth->area->more, &more, growth->from))
        give_back(growth->area, growth->bytes);
}

void fgpu_area_begins(void)
{
    if (atomic_fetch_add(&contexts, 1)) fgpu_functions_forget();
}

void fgpu_area_ends(uint64_t context)
{
    struct table *known = known_table();
    for (struct fgpu_area *area = known ? known->areas : NULL; area && area < known->areas + CONTEXTS; area++) {
        if (atomic_load(&area->context) != context) continue;
        give_back(area, FGPU_MOST_BYTES);
        fgpu_give_back(atomic_load(&area->index), atomic_exchange(&area->heap, 0));
        atomic_store(&area->heap_limit, 0);
        atomic_store(&area->more, 0);
        atomic_compare_exchange_strong(&area->context, &context, 0);
    }
    fgpu_functions_forget();
}

static bool current_context(CUcontext *context)
{
    __typeof__(&cuCtxGetCurrent) get = REAL(cuCtxGetCurrent);
    return get && get(context) == CUDA_SUCCESS && *context;
}

/* -- cuCtxSetLimit */

CUresult fgpu_stack_begins(struct fgpu_growth *growth, size_t bytes)
{
    CUcontext context;
    CUdevice ordinal;
    CUresult refusal = CUDA_SUCCESS;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    *growth = (struct fgpu_growth){.area = NULL};
    if (bytes <= MOST_BYTES && fgpu_current(&ordinal) && ordinal < FGPU_DEVICES && current_context(&context) &&
        fgpu_is_held()) {
        struct fgpu_area *area = area_of(context);
        growth->area = area;
        if (area) refusal = grow(growth, area, ordinal, more_of(bytes));
    }
    fgpu_unrelax(mode);
    errno = saved;
    return refusal;
}

/* The area was shrunk: release the bytes that were admitted beyond it. Functions that need more will enlarge it
 * again. */
static void shrink(struct fgpu_area *area, uint64_t more)
{
    CUdevice ordinal;
    if (atomic_exchange(&area->more, more) <= more || !fgpu_current(&ordinal) || ordinal >= FGPU_DEVICES) return;
    uint64_t keep = bytes_beyond(ordinal, more), granted = atomic_load(&area->granted);
    if (granted > keep) give_back(area, granted - keep);
}

CUresult fgpu_stack_ends(const struct fgpu_growth *growth, CUresult result, size_t bytes)
{
    int saved = errno;
    if (result != CUDA_SUCCESS)
        shrink_again(growth);
    else if (growth->area)
        shrink(growth->area, more_of(bytes));
    if (result == CUDA_SUCCESS) fgpu_functions_forget();
    errno = saved;
    return result;
}

/* -- the heap of device code: it exists from the first launch of code that uses it until its context is destroyed */

void fgpu_heap_limited(size_t bytes)
{
    CUcontext context;
    int saved = errno;
    struct fgpu_area *area = fgpu_is_held() && current_context(&context) ? area_of(context) : NULL;
    if (area && bytes <= FGPU_MOST_BYTES) {
        uint64_t limit = (bytes + HEAP_UNIT - 1) & ~(HEAP_UNIT - 1);
        atomic_store(&area->heap_limit, limit > FIRST_HEAP ? limit : 0);
        atomic_store(&heaps, true);
        fgpu_functions_forget();
    }
    errno = saved;
}

static bool uses_heap(CUfunction function, bool is_kernel, CUcontext context)
{
    __typeof__(&cuFuncGetModule) get = REAL(cuFuncGetModule);
    CUmodule module;
    if (is_kernel) return fgpu_code_uses_heap((uint64_t)fgpu_library_of((CUkernel)function), 0);
    return get && get(&module, function) == CUDA_SUCCESS && fgpu_code_uses_heap((uint64_t)module, (uint64_t)context);
}

static CUresult take_heap(struct fgpu_heap *heap, struct fgpu_area *area, CUdevice ordinal)
{
    uint64_t limit = atomic_exchange(&area->heap_limit, 0);
    if (!limit) return CUDA_SUCCESS;
    struct admission admission = fgpu_admission(ordinal, limit + HEAP_HEAD, FGPU_POOL);
    if (admission.refusal) {
        atomic_store(&area->heap_limit, limit);
        return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    }
    if (admission.index < 0) return CUDA_SUCCESS;
    atomic_store(&area->index, admission.index);
    atomic_store(&area->heap, admission.bytes);
    *heap = (struct fgpu_heap){area, limit};
    return CUDA_SUCCESS;
}

static void heap_was_not_taken(const struct fgpu_heap *heap)
{
    if (!heap->area) return;
    fgpu_give_back(atomic_load(&heap->area->index), atomic_exchange(&heap->area->heap, 0));
    atomic_store(&heap->area->heap_limit, heap->limit);
}

/* -- functions */

/* Make the table of known functions empty. If the epoch's number wraps around, clear the entries, so that no entry of
 * an earlier epoch is valid. */
void fgpu_functions_forget(void)
{
    struct table *known = known_table();
    uint64_t epoch = known ? atomic_fetch_add(&known->functions.epoch, 1) + 1 : 1;
    if (epoch << FGPU_EPOCH_SHIFT) return;
    for (unsigned i = 0; i < FGPU_FUNCTIONS; i++)
        atomic_store_explicit(&known->functions.known[i], ~0ULL, memory_order_relaxed);
}

/* Return the key of a kernel's handle in one context: the handle may refer to functions in several contexts, and the
 * entry is for one of them. */
static uint64_t key_in(uint64_t key, CUcontext context) { return key ^ (uint64_t)context * 0x9e3779b97f4a7c15ULL; }

static bool is_several(void) { return atomic_load_explicit(&contexts, memory_order_relaxed) > 1; }

enum handle { NO_HANDLE, FUNCTION, KERNEL };

/* Find the local bytes of a function. This loads no more code than a launch does. */
static enum handle local_bytes(CUfunction function, CUdevice ordinal, uint64_t *bytes)
{
    static const CUfunction_attribute which = CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES;
    __typeof__(&cuFuncGetAttribute) of_function = REAL(cuFuncGetAttribute);
    enum handle handle = NO_HANDLE;
    int value = 0;
    if (of_function && of_function(&value, which, function) == CUDA_SUCCESS) {
        handle = FUNCTION;
    } else { /* looked up here: old drivers lack it, and have no kernels */
        __typeof__(&cuKernelGetAttribute) of_kernel = REAL(cuKernelGetAttribute);
        if (of_kernel && of_kernel(&value, which, (CUkernel)function, ordinal) == CUDA_SUCCESS) handle = KERNEL;
    }
    *bytes = handle != NO_HANDLE && value > 0 ? (uint64_t)value : 0;
    return handle;
}

/* Return whether the function is known in the current context, without a driver call that may break a capture. Programs
 * on several devices call this at each launch. */
static bool is_known_here(CUfunction function)
{
    struct table *known = known_table();
    CUcontext context;
    if (!known || !is_several() || !current_context(&context)) return false;
    uint64_t key = key_in(fgpu_function_key(&known->functions, (uint64_t)function), context);
    return atomic_load_explicit(fgpu_function_place(&known->functions, (uint64_t)function), memory_order_relaxed) ==
           key;
}

static CUresult begin(struct fgpu_first *first, CUfunction function)
{
    struct table *own = own_table();
    CUcontext context;
    CUdevice ordinal;
    if (!own || !fgpu_current(&ordinal) || ordinal >= FGPU_DEVICES || !current_context(&context)) return CUDA_SUCCESS;
    uint64_t key = fgpu_function_key(&own->functions, (uint64_t)function), bytes;
    _Atomic uint64_t *place = fgpu_function_place(&own->functions, (uint64_t)function);
    enum handle handle = local_bytes(function, ordinal, &bytes);
    if (handle == NO_HANDLE) return CUDA_SUCCESS;
    first->place = place;
    first->key = handle == KERNEL && is_several() ? key_in(key, context) : key;
    CUresult refusal = CUDA_SUCCESS;
    if (handle == KERNEL) refusal = fgpu_load_of_library_begins(&first->load, fgpu_library_of((CUkernel)function));
    bool has_heaps = atomic_load_explicit(&heaps, memory_order_relaxed);
    if (refusal || (!has_heaps && !more_of(bytes)) || !fgpu_is_held()) return refusal;
    struct fgpu_area *area = area_of(context);
    if (area) refusal = grow(&first->growth, area, ordinal, more_of(bytes));
    if (area && !refusal && has_heaps && uses_heap(function, handle == KERNEL, context))
        refusal = take_heap(&first->heap, area, ordinal);
    if (refusal) fgpu_first_ends(first, CUDA_ERROR_NOT_PERMITTED); /* so that no full device is reported */
    return refusal;
}

CUresult fgpu_first_begins(struct fgpu_first *first, CUfunction function)
{
    *first = (struct fgpu_first){.place = NULL};
    if (!function) return CUDA_SUCCESS;
    int saved = errno;
    CUresult refusal = CUDA_SUCCESS;
    if (!is_known_here(function)) {
        CUstreamCaptureMode mode = fgpu_relax();
        refusal = begin(first, function);
        fgpu_unrelax(mode);
    }
    errno = saved;
    return refusal;
}

CUresult fgpu_first_ends(const struct fgpu_first *first, CUresult result)
{
    int saved = errno;
    fgpu_load_ends(&first->load, result, 0);
    if (result != CUDA_SUCCESS) {
        shrink_again(&first->growth);
        heap_was_not_taken(&first->heap);
    } else if (first->place)
        atomic_store_explicit(first->place, first->key, memory_order_relaxed);
    errno = saved;
    return result;
}
