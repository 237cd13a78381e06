/*
 * flight.c: launches on a gated device that may be unfinished. Owns the turns of threads that update them; batches.c
 * has the batches. Never waits for work, which may wait for this thread. After a failure (no turn or no event),
 * launches are made all the same, and are no longer counted.
 */
#include <errno.h>

#include "gate/flight.h"

#define MOST_BATCHES 32 /* with this many batches in use, a launch waits: the rest is reserved for closed gates */
#define MOST_OPEN 256   /* launches without an event */
/* A turn expires after this time: its thread was cancelled or stopped, is in a slow driver call, or left by a jump. */
#define TURN_NS 1000000000ULL
#define TURN_TRIES 2000

static _Atomic(void *) devices[FGPU_DEVICES]; /* a struct device each, made at the first launch */

static struct device *known(int index) { return atomic_load_explicit(&devices[index], memory_order_acquire); }

static uint64_t take_turn(struct device *device, uint64_t now)
{
    for (int i = 0; i < TURN_TRIES; i++, now = fgpu_now()) {
        uint64_t until = now + TURN_NS, was = atomic_load(&device->busy_until_ns);
        if (was <= now && atomic_compare_exchange_strong(&device->busy_until_ns, &was, until)) return until;
        if (i < 100) continue;
        fgpu_nap(20000);
    }
    return 0;
}

static void give_turn(struct device *device, uint64_t turn)
{
    atomic_compare_exchange_strong(&device->busy_until_ns, &turn, 0);
}

/* -- functions that take the turn and keep errno: the only ones that other files call */

struct visit {
    struct device *device;
    uint64_t turn;
    bool calls; /* of the driver */
    CUstreamCaptureMode mode;
    int saved;
};

static bool visit(struct visit *visit, int index, uint64_t now)
{
    visit->saved = errno;
    visit->device = known(index);
    visit->turn = visit->device ? take_turn(visit->device, now) : 0;
    visit->calls = false;
    return visit->turn;
}

static void will_call(struct visit *visit)
{
    if (!visit->calls) visit->mode = fgpu_relax();
    visit->calls = true;
}

static bool visit_to_call(struct visit *here, int index)
{
    if (visit(here, index, fgpu_now())) will_call(here);
    return here->turn;
}

static void look(struct visit *here)
{
    if (!atomic_load(&here->device->batches_taken)) return;
    will_call(here);
    fgpu_batches_look(here->device);
}

static void depart(struct visit *visit)
{
    struct device *device = visit->device;
    if (visit->turn) {
        atomic_store_explicit(&device->done_at_ns, device->base_ns + atomic_load(&device->cost_ns),
                              memory_order_relaxed);
        give_turn(device, visit->turn);
    }
    if (visit->calls) fgpu_unrelax(visit->mode);
    errno = visit->saved;
}

uint64_t fgpu_flight_count(int index) { return known(index) ? atomic_load(&known(index)->in_flight) : 0; }
uint64_t fgpu_flight_until(int index) { return known(index) ? atomic_load(&known(index)->done_at_ns) : 0; }
bool fgpu_flight_is_used(int index) { return known(index); }

bool fgpu_flight_begin(int index)
{
    struct device *device = known(index);
    if (!LIKELY(device)) device = fgpu_table(&devices[index], sizeof *device);
    if (device) atomic_fetch_add(&device->in_flight, 1);
    return device;
}

void fgpu_flight_cancel(int index) { atomic_fetch_sub(&known(index)->in_flight, 1); }

/* Return whether to close the batch. Only the thread itself can record an event on its default stream, so each launch
 * on that stream is followed by an event. */
static bool wants_event(const struct fgpu_launch *launch, const struct lane *lane, uint64_t budget_ns)
{
    return launch->stream == CU_STREAM_PER_THREAD || lane->open >= MOST_OPEN || lane->cost_ns >= budget_ns / 4;
}

static void add(struct visit *here, const struct fgpu_launch *launch, uint64_t budget_ns, uint64_t now)
{
    struct device *device = here->device;
    struct lane *lane = fgpu_lane_of(device, launch);
    uint64_t guess_key = launch->graph ? launch->graph : launch->key;
    uint64_t cost_ns = fgpu_guess_of(device, guess_key)->ns;
    if (lane->open && lane->guess_key != guess_key) { /* each graph is measured alone, and so are kernels */
        will_call(here);
        fgpu_batch_close(device, lane);
    }
    atomic_store_explicit(&lane->guess_key, guess_key, memory_order_relaxed);
    if (!lane->open) atomic_store_explicit(&lane->first_ns, now, memory_order_relaxed);
    lane->open++;
    atomic_store_explicit(&lane->last_ns, now, memory_order_relaxed);
    atomic_store_explicit(&lane->cost_ns, lane->cost_ns + cost_ns, memory_order_relaxed);
    uint64_t had_ns = atomic_load(&device->cost_ns);
    if (!had_ns) atomic_store_explicit(&device->base_ns, now, memory_order_relaxed);
    atomic_store_explicit(&device->cost_ns, had_ns + cost_ns, memory_order_relaxed);
    if (!wants_event(launch, lane, budget_ns)) return;
    will_call(here);
    fgpu_batch_close(device, lane);
}

void fgpu_flight_launched(const struct fgpu_launch *launch, uint64_t budget_ns, uint64_t now)
{
    struct visit here;
    if (visit(&here, launch->index, now))
        add(&here, launch, budget_ns, now);
    else
        fgpu_flight_cancel(launch->index);
    depart(&here);
}

static bool fits(struct device *device, uint64_t budget_ns)
{
    return atomic_load_explicit(&device->cost_ns, memory_order_relaxed) < budget_ns &&
           atomic_load_explicit(&device->batches_taken, memory_order_relaxed) < MOST_BATCHES;
}

bool fgpu_flight_has_room(int index, uint64_t budget_ns)
{
    struct visit here;
    if (LIKELY(fits(known(index), budget_ns))) return true;
    if (visit(&here, index, fgpu_now())) look(&here);
    depart(&here);
    return fits(here.device, budget_ns);
}

bool fgpu_flight_is_over(int index)
{
    struct visit here;
    if (visit_to_call(&here, index)) {
        fgpu_batches_complete(here.device);
        look(&here);
    }
    depart(&here);
    return !fgpu_flight_count(index);
}

bool fgpu_flight_look(int index)
{
    struct visit here;
    bool some = false;
    if (visit_to_call(&here, index)) {
        if (!atomic_load(&here.device->batches_taken)) fgpu_batches_complete(here.device);
        some = atomic_load(&here.device->batches_taken);
        look(&here);
    }
    depart(&here);
    return some;
}

/* -- the program itself has waited, or has destroyed something */

void fgpu_flight_rested(int index, struct fgpu_mark mark, uint64_t undone_ns)
{
    struct visit here;
    uint64_t now = fgpu_now();
    if (visit(&here, index, now)) {
        fgpu_batches_rest(here.device, mark, undone_ns, now);
        look(&here);
    }
    depart(&here);
}

void fgpu_flight_forget(int index, CUcontext context)
{
    struct visit here;
    if (visit(&here, index, fgpu_now())) fgpu_batches_forget(here.device, context);
    depart(&here);
}

void fgpu_flight_leave(int index, CUcontext context)
{
    struct visit here;
    if (visit_to_call(&here, index)) {
        fgpu_batches_complete(here.device);
        fgpu_batches_leave(here.device, context);
    }
    depart(&here);
}

void fgpu_flight_close(int index, uint64_t key, bool ends)
{
    struct visit here;
    if (visit_to_call(&here, index)) fgpu_batches_finish(here.device, key, ends);
    depart(&here);
}
