/*
 * marks.c: batches of launches, and the events behind them. Owns our events and what launches were seen to take.
 *
 * Launches on one stream are counted together until they should take a quarter of the budget; then an event is recorded
 * behind them: a mark. How long they should take is learned from the marks themselves, per stream and per graph. A
 * stream's last few launches have no mark: whoever comes to a closed gate makes one, and a program that waits for them
 * itself needs none. Everything here is called with the device's turn and, but for fgpu_lane_of, in relaxed capture
 * mode; nothing is recorded on a stream that captures.
 *
 * A turn runs out while its holder is in a slow call of the driver, or stopped: then two are in here. Guesses may
 * suffer from that; launches and events are taken by exchange, so that none is paid for or destroyed twice, or never.
 */
#include "flight.h"

#define FIRST_NS 1000000ULL /* what a launch is thought to take before one was seen */
#define WAITED_NS 10000ULL  /* what a call of the program that really waited takes at least */

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

/* A measure may be too long by what the one before is too short: both count alike. A bound is never too short. */
static void learn(struct guess *guess, uint64_t ns) { guess->ns = (guess->ns * 3 + ns) / 4 + 1; }

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

/* A batch is done. Where somebody waited for that, or looked shortly before, the time since the batch before it is a
 * measure; else only a bound, for both may have ended long before they were looked at. */
static void retire(struct device *device, struct mark *mark, uint64_t now, bool waited)
{
    uint64_t launches = atomic_exchange(&mark->launches, 0);
    if (!launches) return;
    atomic_fetch_sub(&device->marks_taken, 1);
    uint64_t start = later(mark->first_ns, device->last_done_ns), spent = now > start ? now - start : 0;
    uint64_t least = later(mark->first_ns, device->last_unready_ns), most = now > least ? now - least : 0;
    uint64_t seen = later(mark->unready_ns, mark->recorded_ns);
    struct guess *guess = fgpu_guess_of(device, mark->guess_key);
    bool measured = waited || (now > seen && (now - seen) * 4 <= spent);
    if (measured)
        learn(guess, spent / launches);
    else
        learn_bound(guess, most / launches);
    if (measured) device->last_done_ns = now;
    device->last_unready_ns = later(device->last_unready_ns, seen);
    device->base_ns = now;
    pay(device, launches, mark->cost_ns);
}

void fgpu_marks_look(struct device *device)
{
    __typeof__(&cuEventQuery) query = REAL(cuEventQuery);
    for (struct mark *mark = device->marks; query && mark < device->marks + MARKS; mark++) {
        if (!mark->launches) continue;
        CUresult result = query(mark->event);
        uint64_t now = fgpu_now();
        if (result == CUDA_ERROR_NOT_READY) {
            mark->unready_ns = now;
        } else { /* or an error: its context has failed or gone, and its work with it */
            retire(device, mark, now, false);
        }
    }
}

/* -- marks */

/* An event of this context that marks nothing; where there is room, a new one. */
static struct mark *free_mark(struct device *device, CUcontext context)
{
    __typeof__(&cuEventCreate) create = REAL(cuEventCreate);
    __typeof__(&cuEventDestroy_v2) destroy = REAL(cuEventDestroy_v2);
    struct mark *other = NULL;
    for (struct mark *mark = device->marks; mark < device->marks + MARKS; mark++) {
        if (mark->launches) continue;
        if (mark->event && mark->context == context) return mark;
        if (!other || (other->event && !mark->event)) other = mark;
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

/* With the context current: an event behind what the lane was given. Without one its launches are no longer counted. */
void fgpu_mark(struct device *device, struct lane *lane, uint64_t guess_key)
{
    __typeof__(&cuEventRecord) driver = REAL(cuEventRecord);
    struct mark *mark = driver ? free_mark(device, lane->context) : NULL;
    uint64_t open = atomic_exchange(&lane->open, 0), cost_ns = lane->cost_ns; /* the event comes behind all of these */
    lane->cost_ns = 0;
    if (!open || !mark || driver(mark->event, lane->stream) != CUDA_SUCCESS) {
        pay(device, open, cost_ns);
        return;
    }
    mark->key = lane->key;
    mark->guess_key = guess_key;
    mark->cost_ns = cost_ns;
    mark->first_ns = lane->first_ns;
    mark->recorded_ns = fgpu_now();
    mark->unready_ns = 0;
    atomic_fetch_add(&device->marks_taken, 1);
    uint64_t before = atomic_exchange(&mark->launches, open);
    if (!before) return;
    pay(device, before, 0); /* another has chosen the same mark */
    atomic_fetch_sub(&device->marks_taken, 1);
}

static CUcontext current_context(void)
{
    __typeof__(&cuCtxGetCurrent) get = REAL(cuCtxGetCurrent);
    CUcontext context = NULL;
    return get && get(&context) == CUDA_SUCCESS ? context : NULL;
}

/* From any thread. A capturing stream keeps what it has: the event would become part of the program's graph. */
static void record_anywhere(struct device *device, struct lane *lane)
{
    __typeof__(&cuCtxPushCurrent_v2) push = REAL(cuCtxPushCurrent_v2);
    __typeof__(&cuCtxPopCurrent_v2) pop = REAL(cuCtxPopCurrent_v2);
    CUcontext popped;
    bool here = current_context() == lane->context;
    if (!here && (!push || !pop || push(lane->context) != CUDA_SUCCESS)) return;
    if (!fgpu_is_capturing(lane->stream, false)) fgpu_mark(device, lane, lane->key);
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

/* The stream's own, or one that has nothing open. */
struct lane *fgpu_lane_of(struct device *device, const struct fgpu_launch *launch)
{
    struct lane *lane = lane_of(device, launch->key);
    if (lane && !is_default(launch->stream)) return lane;
    CUcontext context = current_context();
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

void fgpu_marks_complete(struct device *device)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++)
        if (lane->open) record_anywhere(device, lane);
}

/* Of the stream, or of the context where only that is told. */
static bool is_of(uint64_t its_key, CUcontext its, uint64_t key, CUcontext context)
{
    return (key || context) && (!key || its_key == key) && (!context || its == context);
}

/* Work given since `began_ns` may not be done. */
void fgpu_marks_rest(struct device *device, uint64_t key, CUcontext context, uint64_t began_ns, uint64_t now)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++) {
        if (!lane->open || lane->last_ns > began_ns || !is_of(lane->key, lane->context, key, context)) continue;
        struct mark done = {.guess_key = lane->key,
                            .launches = atomic_exchange(&lane->open, 0),
                            .cost_ns = lane->cost_ns,
                            .first_ns = lane->first_ns,
                            .recorded_ns = began_ns};
        lane->cost_ns = 0;
        atomic_fetch_add(&device->marks_taken, !!done.launches);
        retire(device, &done, now, now - began_ns > WAITED_NS);
    }
    if (!atomic_load(&device->marks_taken)) return;
    for (struct mark *mark = device->marks; mark < device->marks + MARKS; mark++) {
        if (!mark->launches || mark->recorded_ns > began_ns || !is_of(mark->key, mark->context, key, context)) continue;
        retire(device, mark, now, now - began_ns > WAITED_NS);
    }
}

/* The primary one's, where none is named: and those of green contexts, which lie in it. */
static bool goes(CUcontext its, CUcontext context) { return context ? its == context : !fgpu_context_is_created(its); }

/* The driver takes a context's events away with it. */
void fgpu_marks_forget(struct device *device, CUcontext context)
{
    for (struct lane *lane = device->lanes; lane < device->lanes + LANES; lane++) {
        if (!goes(lane->context, context)) continue;
        if (lane->open) lose(device, lane);
        lane->key = 0;
    }
    for (struct mark *mark = device->marks; mark < device->marks + MARKS; mark++) {
        if (!goes(mark->context, context)) continue;
        uint64_t launches = atomic_exchange(&mark->launches, 0);
        atomic_fetch_sub(&device->marks_taken, !!launches);
        pay(device, launches, mark->cost_ns);
        mark->event = NULL;
        mark->context = NULL;
    }
}

#define NOBODY ((CUcontext)1) /* whose events are: the next context may have the same handle */

/* The events of a green context stay, and tell when its work is done; but it can no longer be made current. */
void fgpu_marks_leave(struct device *device, CUcontext context)
{
    for (struct lane *lane = device->lanes; context && lane < device->lanes + LANES; lane++) {
        if (lane->context != context) continue;
        if (lane->open) lose(device, lane);
        lane->key = 0;
    }
    for (struct mark *mark = device->marks; context && mark < device->marks + MARKS; mark++)
        if (mark->context == context) mark->context = NOBODY;
}

/* Before the stream is destroyed, or captures: afterwards nothing can be recorded on it. */
void fgpu_marks_finish(struct device *device, uint64_t key, bool ends)
{
    struct lane *lane = lane_of(device, key);
    if (lane && lane->open) record_anywhere(device, lane);
    if (!lane || !ends) return;
    if (lane->open) lose(device, lane);
    lane->key = 0;
}
