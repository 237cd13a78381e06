/*
 * batches.c: batches of launches, and the events after them. Owns the shim's events, and the measured durations of
 * launches.
 *
 * Launches on one stream are counted together until their estimated duration is a quarter of the budget. Then an event
 * is recorded after them, which closes the batch. The estimates come from the batches themselves, for each stream and
 * each graph. A stream's last few launches have no event: a thread that reaches a closed gate records one, and a
 * program that waits for them itself needs none. The caller of each function here has the device's turn. Except for
 * fgpu_lane_of, functions that call the driver are called in relaxed capture mode. Nothing is recorded on a stream that
 * captures.
 *
 * A turn expires while its holder is in a slow driver call, or stopped: then two threads run these functions, and
 * estimates may become wrong. Launches and events are taken by exchange, so each is counted or destroyed exactly once.
 */
#include "gate/flight.h"
#include "link/link.h"

#define FIRST_NS 1000000ULL /* the estimate before a first launch was measured */

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* -- what launches take */

struct guess *fgpu_guess_of(struct device *device, uint64_t key)
{
    struct guess *guess = &device->guesses[(key * 0x9e3779b97f4a7c15ULL) >> 58];
    if (guess->key != key) {
        guess->key = key;
        guess->ns = FIRST_NS;
    }
    return guess;
}
_Static_assert(GUESSES == 64, "six bits");

/* Update the estimate from a measurement. A measurement may be too long by as much as the previous one is too short, so
 * longer and shorter measurements count alike. A bound is never too short, so it only lowers the estimate. */
static void learn(struct guess *guess, uint64_t ns)
{
    guess->ns = (guess->ns == FIRST_NS ? ns : (guess->ns * 3 + ns) / 4) + 1; /* the first estimate is no measurement */
}

static void learn_bound(struct guess *guess, uint64_t ns)
{
    if (ns < guess->ns) guess->ns = (guess->ns + ns) / 2 + 1;
}

static void pay(struct device *device, uint64_t launches, uint64_t cost_ns)
{
    uint64_t had = atomic_load(&device->cost_ns);
    atomic_store(&device->cost_ns, had > cost_ns ? had - cost_ns : 0);
    atomic_fetch_sub(&device->in_flight, launches);
}

/* Count a batch as done. If a thread waited for it, `waited_ns` is the batch's part of that time. If a thread checked
 * shortly before, the time since the previous batch is a measurement. Otherwise it is only a bound, because both
 * batches may have ended long before the check. */
static void retire(struct device *device, struct batch *batch, uint64_t now, uint64_t waited_ns)
{
    uint64_t launches = atomic_exchange(&batch->launches, 0);
    if (!launches) return;
    atomic_fetch_sub(&device->batches_taken, 1);
    uint64_t start = later(batch->first_ns, device->last_done_ns), spent = now > start ? now - start : 0;
    uint64_t least = later(batch->first_ns, device->last_unready_ns), most = now > least ? now - least : 0;
    uint64_t seen = later(batch->unready_ns, batch->recorded_ns);
    struct guess *guess = fgpu_guess_of(device, batch->guess_key);
    bool measured = waited_ns || (now > seen && (now - seen) * 4 <= spent);
    if (waited_ns) spent = waited_ns;
    if (measured)
        learn(guess, spent / launches);
    else
        learn_bound(guess, most / launches);
    if (measured) device->last_done_ns = now;
    device->last_unready_ns = later(device->last_unready_ns, seen);
    device->base_ns = now;
    pay(device, launches, batch->cost_ns);
}

void fgpu_batches_look(struct device *device)
{
    fgpu_hold();
    __typeof__(&cuEventQuery) query = REAL(cuEventQuery);
    for (struct batch *batch = device->batches; query && batch < device->batches + BATCHES; batch++) {
        if (!batch->launches) continue;
        CUresult result = query(batch->event);
        uint64_t now = fgpu_now();
        if (result == CUDA_ERROR_NOT_READY) {
            batch->unready_ns = now;
        } else { /* done, or an error: the context has failed or no longer exists, and with it its work */
            retire(device, batch, now, 0);
        }
    }
}

/* -- events */

/* Return a free batch with an event of this context; create the event if there is room. */
static struct batch *free_batch(struct device *device, CUcontext context)
{
    __typeof__(&cuEventCreate) create = REAL(cuEventCreate);
    __typeof__(&cuEventDestroy_v2) destroy = REAL(cuEventDestroy_v2);
    struct batch *other = NULL;
    for (struct batch *batch = device->batches; batch < device->batches + BATCHES; batch++) {
        if (batch->launches) continue;
        if (batch->event && batch->context == context) return batch;
        if (!other || (other->event && !batch->event)) other = batch;
    }
    if (!other || !create || !destroy) return NULL;
    CUevent event = atomic_exchange(&other->event, NULL);
    if (event) destroy(event);
    if (create(&event, CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS) return NULL;
    other->context = context;
    atomic_store_explicit(&other->event, event, memory_order_release);
    return other;
}

static void lose(struct device *device, struct lane *lane)
{
    pay(device, atomic_exchange(&lane->open, 0), lane->cost_ns);
    lane->cost_ns = 0;
}

/* Close the batch of a lane by an event after its launches. The lane's context is current. If there is no event, its
 * launches are no longer counted. */
void fgpu_batch_close(struct device *device, struct lane *lane)
{
    __typeof__(&cuEventRecord) driver = REAL(cuEventRecord);
    struct batch *batch = driver ? free_batch(device, lane->context) : NULL;
    uint64_t open = atomic_exchange(&lane->open, 0), cost_ns = lane->cost_ns; /* the event follows all of these */
    lane->cost_ns = 0;
    if (!open || !batch || driver(batch->event, lane->stream) != CUDA_SUCCESS) {
        pay(device, open, cost_ns);
        return;
    }
    batch->key = lane->key;
    atomic_store(&batch->guess_key, lane->guess_key);
    batch->cost_ns = cost_ns;
    batch->first_ns = lane->first_ns;
    batch->recorded_ns = fgpu_now();
    batch->unready_ns = 0;
    atomic_fetch_add(&device->batches_taken, 1);
    uint64_t before = atomic_exchange(&batch->launches, open);
    if (!before) return;
    pay(device, before, 0); /* another thread has chosen the same batch */
    atomic_fetch_sub(&device->batches_taken, 1);
}

/* Close the batch from any thread. A capturing stream keeps its launches: the event would become part of the program's
 * graph. */
static void record_anywhere(struct device *device, struct lane *lane)
{
    __typeof__(&cuCtxPushCurrent_v2) push = REAL(cuCtxPushCurrent_v2);
    __typeof__(&cuCtxPopCurrent_v2) pop = REAL(cuCtxPopCurrent_v2);
    CUcontext popped;
    bool here = fgpu_current_context() == lane->context;
    if (!here && (!push || !pop || push(lane->context) != CUDA_SUCCESS)) return;
    if (!fgpu_is_capturing(lane->stream, false)) fgpu_batch_close(device, lane);
    if (!here) pop(&popped);
}

static struct lane *lane_of(struct device *device, uint64_t key)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++)
        if (lane->key == key) return lane;
    return NULL;
}

/* The default streams of all contexts have one handle. */
static bool is_default(CUstream stream) { return stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD; }

/* Return the stream's lane, or a lane without open launches. */
struct lane *fgpu_lane_of(struct device *device, const struct fgpu_launch *launch)
{
    struct lane *lane = lane_of(device, launch->key);
    if (lane && !is_default(launch->stream)) return lane;
    CUcontext context = fgpu_current_context();
    if (lane && lane->context == context) return lane;
    for (struct lane *other = device->lanes; !lane && other < device->lanes + LANES; other++)
        if (!other->key) lane = other;
    for (struct lane *other = device->lanes; !lane && other < device->lanes + LANES; other++)
        if (!other->open) lane = other;
    if (!lane) lane = device->lanes;
    if (lane->open) {
        CUstreamCaptureMode mode = fgpu_relax();
        record_anywhere(device, lane);
        fgpu_unrelax(mode);
    }
    if (lane->open) lose(device, lane);
    lane->key = launch->key;
    lane->stream = launch->stream;
    lane->context = context;
    lane->cost_ns = 0;
    return lane;
}

void fgpu_batches_complete(struct device *device)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++)
        if (lane->open) record_anywhere(device, lane);
}

/* Return whether a lane or batch belongs to the stream and the context of the mark. A mark may have only one of the
 * two, or none: then nothing belongs to it. */
static bool is_of(uint64_t its_key, CUcontext its, struct fgpu_mark mark)
{
    return (mark.key || mark.context) && (!mark.key || its_key == mark.key) && (!mark.context || its == mark.context);
}

/* The work of a mark is done. All its batches are found done at the same time, so none is measured alone: the time is
 * divided in proportion to their estimates. The time is a measurement only if the program observed the end at about
 * this time. */
void fgpu_batches_rest(struct device *device, struct fgpu_mark mark, uint64_t undone_ns, uint64_t now)
{
    struct batch ended[LANES], *done[LANES + BATCHES];
    unsigned lanes = 0, count = 0;
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++) {
        if (!lane->open || lane->last_ns > mark.until_ns || !is_of(lane->key, lane->context, mark)) continue;
        done[count++] = &ended[lanes];
        ended[lanes++] = (struct batch){.guess_key = atomic_load(&lane->guess_key),
                                        .launches = atomic_exchange(&lane->open, 0),
                                        .cost_ns = atomic_exchange(&lane->cost_ns, 0),
                                        .first_ns = lane->first_ns,
                                        .recorded_ns = mark.until_ns};
        atomic_fetch_add(&device->batches_taken, !!done[count - 1]->launches);
    }
    struct batch *end = device->batches + (device->batches_taken ? BATCHES : 0);
    for (struct batch *batch = device->batches; batch < end; batch++)
        if (batch->launches && batch->recorded_ns <= mark.until_ns && is_of(batch->key, batch->context, mark))
            done[count++] = batch;
    uint64_t first = UINT64_MAX, cost = 0;
    for (unsigned i = 0; i < count; i++) {
        if (done[i]->first_ns < first) first = done[i]->first_ns;
        cost += done[i]->cost_ns;
    }
    uint64_t start = later(first, device->last_done_ns);
    bool waited = cost && undone_ns > start && (now - undone_ns) * 4 <= now - start;
    double share = waited ? (double)(now - start) / (double)cost : 0;
    for (unsigned i = 0; i < count; i++)
        retire(device, done[i], now, waited ? (uint64_t)(share * (double)done[i]->cost_ns) + 1 : 0);
}

/* Return whether the context `its` is to be forgotten. If `context` is NULL, these are the primary context and the
 * green contexts in it: all contexts that cuCtxCreate did not create. */
static bool goes(CUcontext its, CUcontext context) { return context ? its == context : !fgpu_context_is_created(its); }

/* A context is destroyed: forget its lanes and batches. The driver destroys the context's events with it. */
void fgpu_batches_forget(struct device *device, CUcontext context)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++) {
        if (!goes(lane->context, context)) continue;
        if (lane->open) lose(device, lane);
        lane->key = 0;
    }
    for (struct batch *batch = device->batches; batch < device->batches + BATCHES; batch++) {
        if (!goes(batch->context, context)) continue;
        uint64_t launches = atomic_exchange(&batch->launches, 0);
        atomic_fetch_sub(&device->batches_taken, !!launches);
        pay(device, launches, batch->cost_ns);
        batch->event = NULL;
        batch->context = NULL;
    }
}

#define ENDED ((CUcontext)1) /* used for a destroyed context: the next context may have the same handle */

/* A green context is destroyed. Its events remain, and show when its work is done, but the context can no longer be
 * made current. */
void fgpu_batches_leave(struct device *device, CUcontext context)
{
    for (struct lane *lane = device->lanes; context && lane < device->lanes + LANES; lane++) {
        if (lane->context != context) continue;
        if (lane->open) lose(device, lane);
        lane->key = 0;
    }
    for (struct batch *batch = device->batches; context && batch < device->batches + BATCHES; batch++)
        if (batch->context == context) batch->context = ENDED;
}

/* Close the stream's batch before the stream is destroyed, or captures: afterwards no event can be recorded on it. */
void fgpu_batches_finish(struct device *device, uint64_t key, bool ends)
{
    struct lane *lane = lane_of(device, key);
    if (lane && lane->open) record_anywhere(device, lane);
    if (!lane || !ends) return;
    if (lane->open) lose(device, lane);
    lane->key = 0;
}
