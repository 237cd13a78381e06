/*
 * admit.c: one question before the driver is asked, to the kernel; where no agent is, to the books that the container's
 * processes keep together. Owns what it learned about the devices; keeps no books.
 *
 * Asked is the size that the driver will take, so that what was admitted is what will be charged. A refusal is the
 * driver's own out-of-memory; whether there is more to do about it than to return it, reclaim.c decides. An error of
 * the driver stays the driver's: the kernel sees the return and gives the admission back.
 */
#include "admit.h"
#include "books.h"
#include "orphans.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define CONTEXT_BYTES (512ULL << 20) /* of one that nobody has measured, as the kernel's ledger has it too */

static struct device {
    _Atomic uint64_t uuid[2];
    _Atomic bool known;
    _Atomic uint64_t granule;
} devices[FGPU_DEVICES]; /* by the driver's ordinal */

CUstreamCaptureMode fgpu_relax(void)
{
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    __typeof__(&cuThreadExchangeStreamCaptureMode) exchange = REAL(cuThreadExchangeStreamCaptureMode);
    if (!exchange || exchange(&mode) != CUDA_SUCCESS) return CU_STREAM_CAPTURE_MODE_RELAXED;
    return mode;
}

void fgpu_unrelax(CUstreamCaptureMode mode)
{
    __typeof__(&cuThreadExchangeStreamCaptureMode) exchange = REAL(cuThreadExchangeStreamCaptureMode);
    if (exchange && mode != CU_STREAM_CAPTURE_MODE_RELAXED) exchange(&mode);
}

/* Of pages that are made from the books, another thread may be writing it. */
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
    return control->flags & FGPU_STANDALONE ? fgpu_stand_device(uuid) : -1;
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
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult result = get ? get(&answer.uuid, ordinal) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_unrelax(mode);
    errno = saved;
    if (result != CUDA_SUCCESS) return NULL;
    for (int i = 0; i < 2; i++) atomic_store_explicit(&device->uuid[i], answer.words[i], memory_order_relaxed);
    atomic_store_explicit(&device->known, true, memory_order_release);
    return device;
}

bool fgpu_is_device(CUdevice ordinal) { return device_of(ordinal) != NULL; }

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
    if (answer > FGPU_MOST_BYTES || (answer & (answer - 1))) return 0; /* the rounding below wants a power of two */
    atomic_store_explicit(&device->granule, answer, memory_order_relaxed);
    return answer;
}

/* Up to half a granule allocations share one (measured); above, each takes whole ones. */
uint64_t fgpu_taken(uint64_t bytes, uint64_t granule)
{
    if (bytes > FGPU_MOST_BYTES) return TOO_MUCH;
    uint64_t unit = granule && bytes > granule / 2 ? granule : SMALL_ALIGNMENT;
    return (bytes + unit - 1) & ~(unit - 1);
}

/* While nothing answers, nothing is to be had: that is a limit too. */
bool fgpu_is_limited(struct fgpu_view view)
{
    if (view.link != FGPU_HELD) return view.link == FGPU_CLOSED;
    for (unsigned level = 0; level < view.levels; level++)
        if (!fgpu_observes(&view.usage[level])) return true;
    return false;
}

bool fgpu_is_held(void)
{
    struct fgpu_view view = fgpu_look();
    return view.link == FGPU_HELD && fgpu_is_limited(view);
}

/* What a thread was granted by the books for a call that it never came back from. */
static __thread struct admission left __attribute__((tls_model("initial-exec")));

static int ask_books(int index, struct admission *admission)
{
    if (left.by_books) fgpu_stand_release((unsigned)left.index, left.bytes);
    left.by_books = false;
    if (admission->kind == FGPU_CONTEXT) admission->bytes = CONTEXT_BYTES;
    if (!fgpu_stand_charge((unsigned)index, admission->bytes)) return FGPU_REFUSED;
    admission->index = index;
    admission->by_books = true;
    if (admission->kind != FGPU_POOL) left = *admission;
    return FGPU_ADMITTED;
}

/* A patient question is one for which bytes of ended processes may make room: its refusal is not the last word. */
static int ask_probe(struct fgpu_view view, int index, struct admission *admission, bool patient)
{
    patient = patient && fgpu_has_orphans(view, index);
    unsigned kind = admission->kind | (patient ? FGPU_PATIENT : 0);
    int verdict = fgpu_ask(view, (unsigned)index, admission->bytes, kind, admission->ticket);
    admission->patient = patient && verdict == FGPU_REFUSED;
    return verdict;
}

/* The ledger's index of the device is the answer beside the verdict: what is given back later names it. */
static CUresult ask_kernel(struct fgpu_view *view, CUdevice ordinal, struct admission *admission, bool patient)
{
    for (int round = 0; round < 2; round++) {
        if (view->link == FGPU_OPEN || view->link == FGPU_UNMANAGED) return CUDA_SUCCESS;
        if (view->link != FGPU_HELD) return CUDA_ERROR_OUT_OF_MEMORY;
        int index = fgpu_index(view->control, ordinal); /* not the tenant's: nothing of it is to be had */
        if (index < 0) return CUDA_ERROR_OUT_OF_MEMORY;
        int verdict = view->cooperative ? ask_books(index, admission) : ask_probe(*view, index, admission, patient);
        if (verdict >= 0) {
            admission->index = verdict == FGPU_REFUSED ? -1 : index;
            return verdict == FGPU_REFUSED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        }
        if (!round) *view = fgpu_insist(); /* pages of a ledger that is gone, perhaps */
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

void fgpu_ask_once(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient)
{
    admission->ticket = fgpu_ticket();
    admission->patient = false;
    admission->refusal = ask_kernel(view, ordinal, admission, patient);
}

/* Open and unmanaged links cost one look at the state; nothing is rounded, asked or counted for them. */
struct admission fgpu_admission_begin(struct fgpu_view view, CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct admission admission = {.refusal = CUDA_SUCCESS, .index = -1, .kind = kind, .bytes = bytes};
    if (view.link == FGPU_OPEN || view.link == FGPU_UNMANAGED) return admission;
    if (view.link != FGPU_HELD) admission.refusal = CUDA_ERROR_OUT_OF_MEMORY;
    if (kind == FGPU_MEMORY || kind == FGPU_POOL) admission.bytes = fgpu_taken(bytes, fgpu_granule(ordinal));
    return admission;
}

void fgpu_admission_end(struct admission *admission, struct fgpu_view view)
{
    bool pooled = admission->kind == FGPU_POOL;
    admission->settles = !pooled && !admission->by_books && view.control && view.control->flags & FGPU_SETTLE;
}

/* Of pools: to whoever counts now. */
static void release(unsigned index, uint64_t bytes, unsigned kind)
{
    if (fgpu_glance().cooperative)
        fgpu_stand_release(index, bytes);
    else
        fgpu_release_here(index, bytes, kind, fgpu_ticket());
}

uint64_t fgpu_room(CUdevice ordinal)
{
    struct fgpu_view view = fgpu_look();
    int index = view.link == FGPU_HELD ? fgpu_index(view.control, ordinal) : -1;
    uint64_t room = FGPU_MOST_BYTES;
    if (view.cooperative) fgpu_standing_refresh();
    for (unsigned level = 0; index >= 0 && level < view.levels; level++) {
        const struct fgpu_usage *usage = &view.usage[level].devices[index];
        uint64_t limit = __atomic_load_n(&usage->limit, __ATOMIC_RELAXED);
        uint64_t used = __atomic_load_n(&usage->used, __ATOMIC_RELAXED), left = limit > used ? limit - used : 0;
        if (limit != FGPU_NO_LIMIT && !fgpu_observes(&view.usage[level]) && left < room) room = left;
    }
    return room;
}

void fgpu_give_back(int index, uint64_t bytes)
{
    if (index >= 0 && bytes) release((unsigned)index, bytes, FGPU_POOL);
}

/* Gives back what a failed call of a pool does not need, and tells whose out-of-memory it was: the kernel sees no call.
 */
void fgpu_failed(int index, uint64_t bytes, CUresult result)
{
    unsigned full = result == CUDA_ERROR_OUT_OF_MEMORY ? FGPU_FULL : 0;
    if (index >= 0 && (bytes || full)) release((unsigned)index, bytes, FGPU_POOL | full);
}

/* Memory goes with the context that it is made in. */
void fgpu_settled_books(const struct admission *admission, CUresult result, uint64_t handle)
{
    __typeof__(&cuCtxGetCurrent) current = REAL(cuCtxGetCurrent);
    CUcontext context = NULL;
    if (!admission->by_books || admission->kind == FGPU_POOL) return;
    left.by_books = false;
    if (result) {
        fgpu_stand_release((unsigned)admission->index, admission->bytes);
        return;
    }
    int saved = errno;
    if (current && current(&context)) context = NULL;
    fgpu_grant_made((unsigned)admission->index, admission->bytes, admission->kind, handle, (uint64_t)context);
    errno = saved;
}

/* The kernel sees how the driver's call ended, where it has return probes. Where it has none, this tells it. Nobody
 * sees the driver's part of a pool or of the calls of old: they were committed at once, a failure is given back here.
 */
CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle)
{
    if (admission->kind == FGPU_POOL && result) fgpu_failed(admission->index, admission->bytes, result);
    if (admission->by_books) fgpu_settled_books(admission, result, handle);
    if (admission->settles) fgpu_settle_here(handle, admission->bytes, result, admission->ticket);
    return result;
}

/* Of a context that has ended the driver names the device all the same, and refuses whatever needs the context. */
bool fgpu_current(CUdevice *device)
{
    __typeof__(&cuCtxGetDevice) get = REAL(cuCtxGetDevice);
    int saved = errno;
    bool known = get && get(device) == CUDA_SUCCESS;
    if (atomic_load_explicit(&fgpu_contexts_ended, memory_order_relaxed)) known = known && !fgpu_current_is_gone();
    errno = saved;
    return known;
}
