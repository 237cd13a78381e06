/*
 * reclaim.c: a question that was refused, and what may still make room for it: first the pools and graphs of this
 * process give back what they do not use, then bytes of processes that have ended are waited for. Where the tenant has
 * not used the device before, the agent's answer is waited for first. Owns nothing.
 *
 * The pages decide whether to wait and the clock decides how long, so no page and no kernel can hold a program for
 * longer in one call than FGPU_PATIENCE_NS, or FGPU_ABSENCE_NS while the page shows no look of an agent; for a first
 * use COMMITMENT_NS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "admit.h"
#include "orphans.h"

#define ASK_NS 50000000ULL /* a question tells the agent that a program waits */
#define COMMITMENT_NS 2000000000ULL

/* The pools are the first driver's, whichever is called. */
static bool yields(CUdevice ordinal)
{
    bool called = fgpu_beside;
    fgpu_beside = false;
    bool something = fgpu_pools_yield(ordinal);
    fgpu_beside = called;
    return something;
}

static void nap(unsigned round)
{
    static const unsigned char ms[] = {2, 5, 10};
    struct timespec time = {0, 1000000L * ms[round < 2 ? round : 2]};
    int saved = errno;
    syscall(SYS_nanosleep, &time, NULL);
    errno = saved;
}

static bool is_pending(struct fgpu_view view, CUdevice ordinal)
{
    uint64_t devices = view.link == FGPU_HELD && !view.cooperative ? fgpu_uncommitted(view) : 0;
    int index = devices ? fgpu_index(view.control, ordinal) : -1;
    return index >= 0 && devices >> index & 1;
}

static enum fgpu_prospect prospect(struct fgpu_view view, CUdevice ordinal, const struct admission *admission,
                                   uint64_t now)
{
    int index = view.link == FGPU_HELD && !view.cooperative ? fgpu_index(view.control, ordinal) : -1;
    return index < 0 ? FGPU_FITS_NEVER : fgpu_prospect(view, index, admission->bytes, admission->kind, now);
}

static bool is_over(enum fgpu_prospect soon, uint64_t until_ns, uint64_t now)
{
    if (soon == FGPU_FITS_AFTER_A_LOOK) until_ns += FGPU_ABSENCE_NS - FGPU_PATIENCE_NS;
    return soon == FGPU_FITS_NEVER || now >= until_ns;
}

/* Asks now and then until the request is admitted, has no prospect, or `until_ns` has come. Where the page shows room
 * twice in a row and the kernel refuses, something else stands against the request. */
static void wait_for_orphans(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, uint64_t until_ns)
{
    uint64_t asked_ns = fgpu_now();
    bool had_room = false;
    for (unsigned round = 0; admission->refusal && admission->patient; round++) {
        uint64_t now = fgpu_now();
        enum fgpu_prospect soon = prospect(*view, ordinal, admission, now);
        if (is_over(soon, until_ns, now) || (soon == FGPU_FITS && had_room)) return;
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

/* The request made the kernel tell the agent of this first use of the device; the answer is a change of the page.
 * Without an agent there is none, and the refusal stays. */
static void wait_for_commitment(struct admission *admission, struct fgpu_view *view, CUdevice ordinal, bool patient)
{
    uint64_t asked_ns = fgpu_now(), until_ns = asked_ns + COMMITMENT_NS;
    for (unsigned round = 0; admission->refusal && fgpu_now() < until_ns; round++) {
        nap(round);
        *view = fgpu_look();
        bool pending = is_pending(*view, ordinal);
        if (pending && fgpu_now() - asked_ns < ASK_NS) continue;
        fgpu_ask_once(admission, view, ordinal, patient);
        asked_ns = fgpu_now();
        if (!pending) return;
    }
}

static uint64_t until(struct patience *patience)
{
    if (!patience->until_ns) patience->until_ns = fgpu_now() + FGPU_PATIENCE_NS;
    return patience->until_ns;
}

/* The last question is an impatient one: its refusal is counted. */
struct admission fgpu_admission_with(struct patience *patience, CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct fgpu_view view = fgpu_look();
    struct admission admission = fgpu_admission_begin(view, ordinal, bytes, kind);
    if (admission.refusal || view.link != FGPU_HELD) return admission;
    bool pending = is_pending(view, ordinal); /* before the question: meanwhile it may have been committed */
    fgpu_ask_once(&admission, &view, ordinal, patience);
    if (admission.refusal && pending) wait_for_commitment(&admission, &view, ordinal, patience);
    if (admission.refusal && view.link == FGPU_HELD && yields(ordinal))
        fgpu_ask_once(&admission, &view, ordinal, patience);
    if (admission.refusal && admission.patient) {
        wait_for_orphans(&admission, &view, ordinal, until(patience));
        if (admission.refusal && admission.patient) fgpu_ask_once(&admission, &view, ordinal, false);
    }
    fgpu_admission_end(&admission, view);
    return admission;
}

struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    struct patience patience = {0};
    return fgpu_admission_with(&patience, ordinal, bytes, kind);
}
