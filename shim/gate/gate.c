/*
 * gate.c: decides whether a launch may proceed now, by the gates that the gatekeeper writes. Owns this process's
 * reports on the status page.
 *
 * If no gatekeeper schedules this process, a launch only reads the gates. Otherwise a launch is counted as in flight
 * first, and the gate is read after that. So if a gatekeeper closes the gate and then finds nothing in flight, no
 * launch will follow. At a closed gate a thread waits until the work in flight is done, reports that, and sleeps on the
 * gate's own word. If the heartbeat is older than the lease, all gates count as open.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/futex.h>

#include "gate/gate.h"
#include "link/link.h"

#define LOOK_NS 100000000ULL   /* how often a program checks for a new gatekeeper, and reports its calls */
#define DOZE_NS 50000000ULL    /* the longest sleep at a closed gate: the heartbeat must be read from time to time */
#define CLOSE_NS 200000ULL     /* a thread polls for the end of a drain within this time of its estimate */
#define PAUSE_NS 50000ULL      /* between two checks of work that should have ended, or that leaves no room */
#define REST_NS 100000ULL      /* a shorter pause between an end and the next launch is not a rest of the program */
#define STUCK_NS 1000000000ULL /* work this much over its estimate may be waiting for the launch that is held back */

static union { /* zero after a fork */
    struct {
        struct place {
            _Atomic uint32_t waiting, drained;
            _Atomic uint64_t launches, wanted_ns, idle_ns, begun_ns, ended_ns;
            _Atomic(struct fgpu_status_page *) page; /* the page with these values */
        } places[FGPU_DEVICES];                      /* by the ledger's index */
        _Atomic uint32_t bell;
        _Atomic uint64_t look_at_ns;
        _Atomic bool wiped;
    };
    char page[FGPU_PAGE_BYTES];
} mine __attribute__((aligned(FGPU_PAGE_BYTES)));

static uint64_t coarse_now(void) { return fgpu_clock(CLOCK_MONOTONIC_COARSE); }

static bool any_gated(const struct fgpu_control_page *control)
{
    const uint64_t *pairs = (const void *)control->gates;
    uint64_t bits = 0;
    for (int i = 0; i < FGPU_DEVICES / 2; i++) bits |= __atomic_load_n(&pairs[i], __ATOMIC_RELAXED);
    return bits & (FGPU_GATED | (uint64_t)FGPU_GATED << 32);
}

static __attribute__((noinline, cold)) struct fgpu_view look_now(uint64_t now)
{
    atomic_store_explicit(&mine.look_at_ns, now + LOOK_NS, memory_order_relaxed);
    struct fgpu_view view = fgpu_look();
    if (view.link == FGPU_HELD) fgpu_tell_called();
    return view;
}

/* Every call that launches work, waits for it or queries it comes here, before or after its call of the driver. */
static struct fgpu_view look_now_and_then(uint64_t now)
{
    if (LIKELY(now < atomic_load_explicit(&mine.look_at_ns, memory_order_relaxed))) return fgpu_glance();
    return look_now(now);
}

bool fgpu_is_gated(void)
{
    struct fgpu_view view = fgpu_glance();
    if (view.link == FGPU_OPEN) return false;
    if (view.link == FGPU_HELD && any_gated(view.control)) return true;
    view = look_now_and_then(coarse_now());
    return view.link == FGPU_HELD && any_gated(view.control);
}

#pragma GCC optimize("Os") /* rarely run, from here on */

/* -- the status page: written as a whole, except by a launch, because a registration may have replaced the page */

/* Write the count. If two threads publish at the same time, the later one must not leave the older number. */
static void publish_count(struct fgpu_view view, int index)
{
    struct fgpu_flight *flight = &view.status->flights[index];
    for (uint64_t count;
         count = fgpu_flight_count(index), __atomic_load_n(&flight->in_flight, __ATOMIC_SEQ_CST) != count;)
        __atomic_store_n(&flight->in_flight, count, __ATOMIC_SEQ_CST);
}

static void publish_launch(struct fgpu_view view, int index)
{
    struct place *place = &mine.places[index];
    struct fgpu_flight *flight = &view.status->flights[index];
    __atomic_store_n(&view.status->devices[index].launches, atomic_load(&place->launches), __ATOMIC_RELAXED);
    __atomic_store_n(&flight->busy_until_ns, fgpu_flight_until(index), __ATOMIC_RELAXED);
    __atomic_store_n(&flight->wanted_ns, atomic_load(&place->wanted_ns), __ATOMIC_RELAXED);
    publish_count(view, index);
}

static void publish(struct fgpu_view view, int index)
{
    struct place *place = &mine.places[index];
    struct fgpu_status *status = &view.status->devices[index];
    struct fgpu_span *span = &view.status->spans[index];
    atomic_store(&place->page, view.status);
    __atomic_store_n(&status->waiting, atomic_load(&place->waiting), __ATOMIC_RELAXED);
    __atomic_store_n(&status->drained, atomic_load(&place->drained), __ATOMIC_RELAXED);
    __atomic_store_n(&view.status->flights[index].idle_ns, atomic_load(&place->idle_ns), __ATOMIC_RELAXED);
    __atomic_store_n(&span->begun_ns, atomic_load(&place->begun_ns), __ATOMIC_RELAXED);
    __atomic_store_n(&span->ended_ns, atomic_load(&place->ended_ns), __ATOMIC_RELAXED);
    publish_launch(view, index);
}

/* Return whether the page has the number of threads that wait now. */
static bool tells_waiting(struct fgpu_view view, int index)
{
    uint32_t told = __atomic_load_n(&view.status->devices[index].waiting, __ATOMIC_RELAXED);
    return told == atomic_load(&mine.places[index].waiting);
}

static void ring(struct fgpu_view view)
{
    int saved = errno;
    __atomic_store_n(&view.status->bell, atomic_fetch_add(&mine.bell, 1) + 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &view.status->bell, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
    errno = saved;
}

/* Report that the turn has drained. Read the last report from the page: a registration may replace the page while this
 * thread waits. */
static void tell_drained(struct fgpu_view view, int index, uint32_t gate)
{
    struct place *place = &mine.places[index];
    const struct fgpu_status *status = &view.status->devices[index];
    uint32_t turn = gate >> FGPU_GATE_SHIFT;
    if (atomic_exchange(&place->drained, turn) != turn) atomic_store(&place->ended_ns, fgpu_now());
    if (__atomic_load_n(&status->drained, __ATOMIC_RELAXED) == turn && tells_waiting(view, index)) return;
    publish(view, index);
    ring(view);
}

/* -- the gate */

static uint32_t gate_of(struct fgpu_view view, int index)
{
    return __atomic_load_n(&view.control->gates[index], __ATOMIC_SEQ_CST);
}

static bool stands_open(struct fgpu_view view, uint32_t gate)
{
    if (gate & FGPU_GATE_OPEN || !(gate & FGPU_GATED)) return true;
    uint64_t heartbeat = __atomic_load_n(&view.control->heartbeat_ns, __ATOMIC_RELAXED), now = fgpu_now();
    return now > heartbeat && now - heartbeat > FGPU_LEASE_NS;
}

/* Return whether a closed gate must let a launch through, because kernels in flight on another device may spin until it
 * has run. */
static bool may_pass(struct fgpu_view view, int index)
{
    return atomic_load(&mine.places[index].launches) < __atomic_load_n(&view.control->passes[index], __ATOMIC_RELAXED);
}

static uint64_t budget_of(struct fgpu_view view, int index)
{
    uint64_t budget = __atomic_load_n(&view.control->budget_ns[index], __ATOMIC_RELAXED);
    return budget ? budget : FGPU_BUDGET_NS;
}

/* Sleep at a gate. The futex is not private: the word is in a page of the gatekeeper. A signal to the program ends the
 * sleep, but not the wait. */
static void sleep_at(struct fgpu_view view, int index, uint32_t gate, uint64_t ns)
{
    struct timespec time = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    int saved = errno;
    syscall(SYS_futex, &view.control->gates[index], FUTEX_WAIT, gate, &time, NULL, 0);
    errno = saved;
}

/* Publish the state of a device, and report a drain if nothing is in flight any more and the gate has closed
 * meanwhile. */
static void tell(struct fgpu_view view, int index)
{
    uint32_t gate = gate_of(view, index);
    bool is_over = !fgpu_flight_count(index);
    if (is_over) atomic_store(&mine.places[index].ended_ns, fgpu_now());
    if (is_over && gate & FGPU_GATED && !(gate & FGPU_GATE_OPEN)) tell_drained(view, index, gate);
    publish(view, index);
}

/* Update the other devices while this thread waits at one gate: a program may have only one thread. Returns false if
 * work is left on one of them. */
static bool drain_others(struct fgpu_view view, int index)
{
    bool over = true;
    for (int other = 0; other < FGPU_DEVICES; other++) {
        if (other == index || !fgpu_flight_count(other)) continue;
        over &= fgpu_flight_is_over(other);
        tell(view, other);
    }
    return over;
}

/* Wait until the gate is open, or no gatekeeper schedules this process. The work in flight may wait for the launch that
 * this thread holds back, so the thread does not wait for that work alone: it wakes the gatekeeper if the work does not
 * drain in time. */
static void drain_and_wait(int index, bool rung)
{
    for (;;) {
        struct fgpu_view view = fgpu_look();
        if (view.link != FGPU_HELD) return;
        uint32_t gate = gate_of(view, index);
        if (stands_open(view, gate)) return;
        if (may_pass(view, index)) {
            atomic_store(&mine.places[index].drained, 0); /* not drained any more */
            return;
        }
        if (fgpu_flight_is_over(index)) {
            tell_drained(view, index, gate);
            sleep_at(view, index, gate, drain_others(view, index) ? DOZE_NS : CLOSE_NS);
            continue;
        }
        publish(view, index);
        uint64_t now = fgpu_now(), until = fgpu_flight_until(index);
        if (until > now + CLOSE_NS) {
            uint64_t left = until - now - CLOSE_NS / 2;
            sleep_at(view, index, gate, left < DOZE_NS ? left : DOZE_NS);
        } else if (now > until + CLOSE_NS) {
            if (!rung) ring(view);
            rung = true;
            sleep_at(view, index, gate, PAUSE_NS);
        }
    }
}

static void wait_at(struct fgpu_view view, int index)
{
    struct place *place = &mine.places[index];
    bool first = !atomic_fetch_add(&place->waiting, 1);
    atomic_store(&place->wanted_ns, fgpu_now());
    publish(view, index);
    /* if work is draining, the report of its end wakes the gatekeeper too: one wake is enough */
    bool will_tell =
        fgpu_flight_count(index) && atomic_load(&place->drained) != gate_of(view, index) >> FGPU_GATE_SHIFT;
    if (first && !will_tell) ring(view);
    drain_and_wait(index, !will_tell);
    atomic_fetch_sub(&place->waiting, 1);
    atomic_store(&place->begun_ns, fgpu_now());
    atomic_store(&place->wanted_ns, place->begun_ns); /* the wait at the gate does not count as a rest */
    atomic_store(&place->page, NULL);                 /* no page has these values yet */
}

/* Try once to pass. Returns false if the launch must try again. The launch is counted first, and the gate is read after
 * that. */
static bool may_go(struct fgpu_view view, int index, bool *counted)
{
    *counted = fgpu_flight_begin(index);
    if (!*counted) return true;
    publish_count(view, index);
    uint32_t gate = gate_of(view, index);
    bool is_open = stands_open(view, gate) || may_pass(view, index);
    if (is_open && fgpu_flight_has_room(index, budget_of(view, index))) return true;
    fgpu_flight_cancel(index);
    publish_count(view, index);
    if (!is_open) {
        wait_at(view, index);
        return false;
    }
    if (fgpu_flight_look(index) && fgpu_now() < fgpu_flight_until(index) + STUCK_NS) {
        sleep_at(view, index, gate, PAUSE_NS);
        return false;
    }
    *counted = fgpu_flight_begin(index); /* nothing in flight can be waited for: do not hold the launch back */
    return true;
}

static void wipe_on_fork(void)
{
    if (atomic_load_explicit(&mine.wiped, memory_order_relaxed) || atomic_exchange(&mine.wiped, true)) return;
    int saved = errno;
    madvise(&mine, sizeof mine, MADV_WIPEONFORK);
    errno = saved;
}

void fgpu_gate_enter(struct fgpu_launch *launch, CUstream stream, bool per_thread, CUgraphExec graph)
{
    CUdevice ordinal;
    launch->index = -1;
    if (fgpu_is_capturing(stream, per_thread) || !fgpu_device_of(stream, per_thread, &ordinal)) return;
    launch->key = fgpu_stream_key(stream, per_thread);
    launch->stream = stream ? stream : per_thread ? CU_STREAM_PER_THREAD : CU_STREAM_LEGACY;
    launch->graph = (uint64_t)graph;
    wipe_on_fork();
    for (;;) {
        struct fgpu_view view = fgpu_glance();
        int index = view.link == FGPU_HELD ? fgpu_index(view.control, ordinal) : -1;
        if (index < 0) return;
        bool counted = false;
        if (gate_of(view, index) & FGPU_GATED && !may_go(view, index, &counted)) continue;
        if (counted)
            launch->index = index;
        else if (!tells_waiting(view, index)) /* the launch may have waited, and fgpu_gate_leave() publishes nothing */
            publish(view, index);
        return;
    }
}

/* Record a launch. The first launch after a rest adds the rest's length to `idle_ns`: that time is not charged. */
static void note_wanted(struct place *place, uint64_t now)
{
    uint64_t ended = atomic_load_explicit(&place->ended_ns, memory_order_relaxed);
    if (ended > atomic_exchange(&place->wanted_ns, now) && now - ended >= REST_NS) {
        atomic_fetch_add(&place->idle_ns, now - ended);
        atomic_store_explicit(&place->page, NULL, memory_order_relaxed); /* no page has this value yet */
    }
}

CUresult fgpu_gate_leave(const struct fgpu_launch *launch, CUresult result)
{
    int index = launch->index;
    if (index < 0) return result;
    struct place *place = &mine.places[index];
    uint64_t now = fgpu_now();
    struct fgpu_view view = look_now_and_then(now);
    if (result != CUDA_SUCCESS || view.link != FGPU_HELD) {
        fgpu_flight_cancel(index);
    } else {
        atomic_fetch_add(&place->launches, 1);
        note_wanted(place, now);
        fgpu_flight_launched(launch, budget_of(view, index), now);
    }
    if (view.link != FGPU_HELD) return result;
    if (LIKELY(atomic_load_explicit(&place->page, memory_order_relaxed) == view.status))
        publish_launch(view, index);
    else
        publish(view, index);
    return result;
}

/* -- the program has waited, or destroys something */

void fgpu_gate_rested(struct fgpu_mark mark, uint64_t began_ns, uint64_t undone_ns)
{
    struct fgpu_view view = look_now_and_then(began_ns);
    for (int index = 0; view.link == FGPU_HELD && index < FGPU_DEVICES; index++) {
        if (!(gate_of(view, index) & FGPU_GATED) || !fgpu_flight_count(index)) continue;
        fgpu_flight_rested(index, mark, undone_ns);
        tell(view, index);
    }
}

static void close_batches(uint64_t key, bool ends)
{
    for (int index = 0; index < FGPU_DEVICES; index++)
        if (fgpu_flight_count(index)) fgpu_flight_close(index, key, ends);
}

void fgpu_stream_ends(CUstream stream)
{
    if (stream) close_batches(fgpu_stream_key(stream, false), true);
}

void fgpu_stream_captures(CUstream stream, bool per_thread)
{
    close_batches(fgpu_stream_key(stream, per_thread), false);
}

static void forget(struct fgpu_view view, int index, CUcontext context)
{
    if (!fgpu_flight_is_used(index)) return;
    fgpu_flight_forget(index, context);
    if (view.link == FGPU_HELD) tell(view, index);
}

void fgpu_context_ends(CUcontext context)
{
    struct fgpu_view view = fgpu_glance();
    for (int index = 0; index < FGPU_DEVICES; index++) forget(view, index, context);
}

void fgpu_primary_ends(CUdevice ordinal)
{
    struct fgpu_view view = fgpu_glance();
    int its = view.link == FGPU_HELD ? fgpu_index(view.control, ordinal) : -1;
    for (int index = 0; index < FGPU_DEVICES; index++)
        if (index == its || view.link != FGPU_HELD) forget(view, index, NULL);
}
