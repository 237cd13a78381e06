/*
 * admit.c: one admission request before a driver call. It goes to the kernel, or, if there is no agent, to the ledger
 * that the container's processes share. Owns only a thread's last standalone grant.
 *
 * The requested size is the size that the driver will allocate, so the admitted bytes are those that will be charged. A
 * refusal is returned as the driver's own out-of-memory error; reclaim.c decides whether to do something else first. An
 * error of the driver is returned unchanged: the probe at the return releases the admission.
 */
#include <errno.h>

#include "account/account.h"
#include "account/orphans.h"
#include "link/link.h"
#include "standalone/standalone.h"

/* Return whether a limit may be in force. While the link is closed, no memory is admitted: that counts as a limit
 * too. */
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

/* The standalone grant of a call that never returned to this thread. */
static __thread struct admission left __attribute__((tls_model("initial-exec")));

static int ask_standalone(int index, struct admission *admission)
{
    if (left.by_standalone) fgpu_standalone_release((unsigned)left.index, left.bytes);
    left.by_standalone = false;
    if (admission->kind == FGPU_CONTEXT) admission->bytes = FGPU_CONTEXT_BYTES;
    if (!fgpu_standalone_charge((unsigned)index, admission->bytes)) return FGPU_REFUSED;
    admission->index = index;
    admission->by_standalone = true;
    if (admission->kind != FGPU_POOL) left = *admission;
    return FGPU_ADMITTED;
}

/* Return how many requests the kernel has refused for too many entries, whatever their size. */
static uint64_t crowded_so_far(struct fgpu_view view)
{
    return __atomic_load_n(&view.usage->crowded, __ATOMIC_RELAXED);
}

/* Request admission from the kernel. The request is patient if the release of bytes of exited processes may make room:
 * then a refusal is not final. */
static int ask_probe(struct fgpu_view view, int index, struct admission *admission, bool patient)
{
    patient = patient && fgpu_has_orphans(view, index);
    unsigned kind = admission->kind | (patient ? FGPU_PATIENT : 0);
    uint64_t before = crowded_so_far(view);
    int verdict = fgpu_ask(view, (unsigned)index, admission->bytes, kind, admission->ticket);
    if (verdict <= FGPU_REFUSED && crowded_so_far(view) != before) fgpu_report_crowd();
    admission->patient = patient && verdict == FGPU_REFUSED;
    return verdict;
}

/* Request admission, and store the ledger's index of the device with the verdict: a later release uses this index. */
static CUresult ask_kernel(struct fgpu_view *view, CUdevice ordinal, struct admission *admission, bool patient)
{
    for (int round = 0; round < 2; round++) {
        if (view->link == FGPU_OPEN || view->link == FGPU_UNMANAGED) return CUDA_SUCCESS;
        if (view->link != FGPU_HELD) return CUDA_ERROR_OUT_OF_MEMORY;
        int index = fgpu_index(view->control, ordinal); /* < 0: the tenant does not have this device */
        if (index < 0) return fgpu_is_limited(*view) ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        int verdict =
            view->cooperative ? ask_standalone(index, admission) : ask_probe(*view, index, admission, patient);
        if (verdict >= 0) {
            admission->index = verdict == FGPU_REFUSED ? -1 : index;
            return verdict == FGPU_REFUSED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        }
        if (!round) *view = fgpu_insist(); /* the pages may belong to a ledger that no longer exists */
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

void fgpu_ask_once(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient)
{
    admission->ticket = fgpu_ticket();
    admission->patient = false;
    admission->refusal = ask_kernel(view, ordinal, admission, patient);
}

/* Begin an admission. For open and unmanaged links this only reads the state: nothing is rounded, requested or
 * counted. */
struct admission fgpu_admission_begin(struct fgpu_view view, CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct admission admission = {.refusal = CUDA_SUCCESS, .index = -1, .kind = kind, .bytes = bytes};
    if (view.link == FGPU_OPEN || view.link == FGPU_UNMANAGED) return admission;
    if (view.link != FGPU_HELD) admission.refusal = CUDA_ERROR_OUT_OF_MEMORY;
    if (kind == FGPU_MEMORY || kind == FGPU_POOL) admission.bytes = fgpu_taken(bytes, fgpu_granule(ordinal));
    return admission;
}

/* Release bytes of a pool in the ledger that is now in force. */
static void release(unsigned index, uint64_t bytes, unsigned kind)
{
    if (fgpu_glance().cooperative)
        fgpu_standalone_release(index, bytes);
    else
        fgpu_release_here(index, bytes, kind, fgpu_ticket());
}

struct fgpu_room fgpu_room(CUdevice ordinal)
{
    struct fgpu_view view = fgpu_look();
    int index = view.link == FGPU_HELD ? fgpu_index(view.control, ordinal) : -1;
    struct fgpu_room room = {FGPU_MOST_BYTES, FGPU_MOST_BYTES};
    if (view.cooperative) fgpu_standalone_refresh();
    for (unsigned level = 0; index >= 0 && level < view.levels; level++) {
        const struct fgpu_usage *usage = &view.usage[level].devices[index];
        uint64_t limit = __atomic_load_n(&usage->limit, __ATOMIC_RELAXED);
        uint64_t used = __atomic_load_n(&usage->used, __ATOMIC_RELAXED), left = limit > used ? limit - used : 0;
        if (limit == FGPU_NO_LIMIT || fgpu_observes(&view.usage[level])) continue;
        if (left < room.left) room.left = left;
        if (limit < room.limit) room.limit = limit;
    }
    return room;
}

void fgpu_give_back(int index, uint64_t bytes)
{
    if (index >= 0 && bytes) release((unsigned)index, bytes, FGPU_POOL);
}

bool fgpu_give_back_above(struct portion *portion, uint64_t keep)
{
    uint64_t admitted = atomic_load(&portion->admitted);
    while (admitted > keep)
        if (atomic_compare_exchange_weak(&portion->admitted, &admitted, keep)) {
            fgpu_give_back(atomic_load(&portion->index), admitted - keep);
            return true;
        }
    return false;
}

/* Release the bytes that a failed call of a pool does not need, and report whether the device was out of memory: this
 * call has no probe. */
void fgpu_failed(int index, uint64_t bytes, CUresult result)
{
    unsigned full = result == CUDA_ERROR_OUT_OF_MEMORY ? FGPU_FULL : 0;
    if (index >= 0 && (bytes || full)) release((unsigned)index, bytes, FGPU_POOL | full);
}

/* Report the result of the driver's call to the standalone ledger. Memory belongs to the context in which it is
 * allocated. */
void fgpu_settled_standalone(const struct admission *admission, CUresult result, uint64_t handle)
{
    __typeof__(&cuCtxGetCurrent) current = REAL(cuCtxGetCurrent);
    CUcontext context = NULL;
    if (!admission->by_standalone || admission->kind == FGPU_POOL) return;
    left.by_standalone = false;
    if (result) {
        fgpu_standalone_release((unsigned)admission->index, admission->bytes);
        return;
    }
    int saved = errno;
    if (current && current(&context)) context = NULL;
    fgpu_grant_made((unsigned)admission->index, admission->bytes, admission->kind, handle, (uint64_t)context);
    errno = saved;
}

/* Report the result of the driver's call, and return it. Return probes report it to the kernel. The 32-bit calls have
 * no probe: their bytes were committed at once, and are released here if the call failed. */
CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle)
{
    if (admission->kind == FGPU_POOL && result) fgpu_failed(admission->index, admission->bytes, result);
    if (admission->by_standalone) fgpu_settled_standalone(admission, result, handle);
    return result;
}
