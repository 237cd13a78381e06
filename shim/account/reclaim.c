/*
 * reclaim.c: makes room for a refused request. First the pools and graphs of this process free memory that they do not
 * use. Then the thread waits until bytes of exited processes are released. If the tenant has not used the device
 * before, the thread waits for the agent's decision first. If a program of this level has freed memory in a way that no
 * probe reports, the request is made only after the agent has asked NVML. Owns nothing.
 *
 * The pages decide whether to wait, and the clock decides how long. So no page and no kernel can delay a program for
 * longer than these times in one call: FGPU_PATIENCE_NS for bytes of exited processes, or FGPU_ABSENCE_NS while the
 * page shows that no agent examines the device; COMMITMENT_NS at a first use; LOOK_NS after a free that no probe
 * reports.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "account/account.h"
#include "account/orphans.h"
#include "link/link.h"

#define ASK_NS 50000000ULL /* between two requests: each shows the agent that a program waits */
#define COMMITMENT_NS 2000000000ULL
#define LOOK_NS FGPU_SECOND_NS /* the agent asks NVML every half second */

/* Make the pools free unused memory. They belong to the first driver, whichever driver this thread calls. */
static bool yields(CUdevice ordinal)
{
    bool called = fgpu_calls_second;
    fgpu_calls_second = false;
    bool something = fgpu_pools_yield(ordinal);
    fgpu_calls_second = called;
    return something;
}

static void nap(unsigned round) { fgpu_nap(1000000L * (round ? 10 : 2)); }

static bool is_pending(struct fgpu_view view, CUdevice ordinal)
{
    uint64_t devices = view.link == FGPU_HELD && !view.cooperative ? fgpu_uncommitted(view) : 0;
    int index = devices ? fgpu_index(view.control, ordinal) : -1;
    return index >= 0 && devices >> index & 1;
}

/* Return how many requests of this level the kernel has refused because some limit does not count yet. */
static uint64_t undecided_so_far(struct fgpu_view view, CUdevice ordinal)
{
    int index = view.link == FGPU_HELD && !view.cooperative ? fgpu_index(view.control, ordinal) : -1;
    return index < 0 ? 0 : __atomic_load_n(&view.usage->undecided[index], __ATOMIC_RELAXED);
}

/* Request once. Returns whether the request was refused and a decision of the agent may change that. The pages are read
 * before the request, because the agent may decide in between. The undecided limit may be that of a level whose page
 * this process does not have yet, so the kernel's count is compared too. */
static bool awaits_decision(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient)
{
    bool pending = is_pending(*view, ordinal);
    uint64_t before = undecided_so_far(*view, ordinal);
    fgpu_ask_once(admission, view, ordinal, patient);
    return admission->refusal && (pending || undecided_so_far(*view, ordinal) != before);
}

static enum fgpu_prospect prospect(const struct fgpu_view *view, CUdevice ordinal, const struct admission *admission,
                                   uint64_t since_ns, uint64_t now)
{
    int index = view->link == FGPU_HELD && !view->cooperative ? fgpu_index(view->control, ordinal) : -1;
    if (index < 0) return FGPU_FITS_NEVER;
    return fgpu_prospect(view, index, admission->bytes, admission->kind, since_ns, now);
}

static bool is_over(enum fgpu_prospect soon, uint64_t waited_ns)
{
    return soon == FGPU_FITS_NEVER ||
           waited_ns >= (soon == FGPU_FITS_AFTER_A_LOOK ? FGPU_ABSENCE_NS : FGPU_PATIENCE_NS);
}

/* Repeat the request until it is admitted, has no prospect, or has waited for its maximum. If the page shows room twice
 * in a row and the kernel refuses, the refusal has another cause. */
static void wait_for_orphans(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, uint64_t since_ns)
{
    uint64_t asked_ns = fgpu_now();
    bool had_room = false;
    for (unsigned round = 0; admission->refusal && admission->patient; round++) {
        uint64_t now = fgpu_now();
        enum fgpu_prospect soon = prospect(view, ordinal, admission, since_ns, now);
        if (is_over(soon, now - since_ns) || (soon == FGPU_FITS && had_room)) return;
        had_room = soon == FGPU_FITS;
        if (had_room || now - asked_ns >= ASK_NS) {
            fgpu_ask_once(admission, view, ordinal, true);
            asked_ns = now;
        }
        if (had_room) continue;
        nap(round);
        *view = fgpu_look();
    }
}

/* Wait for the agent. At the request, the kernel sent the agent an event of this first use of the device. The agent's
 * decision is a change of the page, or of a page that this process does not have. Without an agent there is no
 * decision, and the request stays refused. */
static void wait_for_commitment(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient)
{
    uint64_t asked_ns = fgpu_now(), until_ns = asked_ns + COMMITMENT_NS;
    bool awaits = true;
    for (unsigned round = 0; awaits && fgpu_now() < until_ns; round++) {
        nap(round);
        *view = fgpu_look();
        if (is_pending(*view, ordinal) && fgpu_now() - asked_ns < ASK_NS) continue;
        awaits = awaits_decision(admission, view, ordinal, patient);
        asked_ns = fgpu_now();
    }
}

/* Wait until the pages show room for a request, if a program of this level has freed memory since the agent last asked
 * NVML. A request before that would be refused, and counted. */
static void wait_for_a_look(struct fgpu_view view, CUdevice ordinal, uint64_t bytes)
{
    struct fgpu_room room;
    uint64_t freed_ns = fgpu_freed_unseen_ns(view);
    for (unsigned round = 0; freed_ns && fgpu_now() < freed_ns + LOOK_NS; round++) {
        room = fgpu_room(ordinal);
        if (bytes <= room.left || bytes > room.limit) return;
        if (round || !yields(ordinal)) nap(round);
    }
}

static uint64_t since(struct patience *patience)
{
    if (!patience->since_ns) patience->since_ns = fgpu_now();
    return patience->since_ns;
}

/* Request, reclaim and request again. The last request is not patient, so its refusal is counted. */
struct admission fgpu_admission_with(struct patience *patience, CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct fgpu_view view = fgpu_look();
    struct admission admission = fgpu_admission_begin(view, ordinal, bytes, kind);
    if (admission.refusal || view.link != FGPU_HELD) return admission;
    if (patience && !view.cooperative)
        wait_for_a_look(view, ordinal, kind == FGPU_CONTEXT ? FGPU_CONTEXT_BYTES : admission.bytes);
    if (awaits_decision(&admission, &view, ordinal, patience))
        wait_for_commitment(&admission, &view, ordinal, patience);
    if (admission.refusal && view.link == FGPU_HELD && yields(ordinal))
        fgpu_ask_once(&admission, &view, ordinal, patience);
    if (admission.refusal && admission.patient) {
        wait_for_orphans(&admission, &view, ordinal, since(patience));
        if (admission.refusal && admission.patient) fgpu_ask_once(&admission, &view, ordinal, false);
    }
    return admission;
}

struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct patience patience = {0};
    return fgpu_admission_with(&patience, ordinal, bytes, kind);
}

/* Request memory up to `need`. The admission may be larger than the request: it is the size that the driver
 * allocates. */
CUresult fgpu_ask_up_to(struct portion *portion, CUdevice ordinal, uint64_t need, struct patience *patience)
{
    uint64_t admitted = atomic_load(&portion->admitted);
    if (need <= admitted) return CUDA_SUCCESS;
    struct admission admission = fgpu_admission_with(patience, ordinal, need - admitted, FGPU_POOL);
    if (admission.index >= 0) {
        atomic_store(&portion->index, admission.index);
        atomic_fetch_add(&portion->admitted, admission.bytes);
    }
    return admission.refusal;
}
