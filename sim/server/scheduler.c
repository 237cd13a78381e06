/* The order in which contexts run on a device. As in the real driver, contexts with work alternate, and each change
 * costs time.
 *
 * A context has its own clock, which stops while the context has work and another context runs. A client needs only the
 * amount of time that its context has lost so far. Work that begins later, as after a copy, does not count as work
 * before that. Nothing happens by itself: each request advances its device to the present, and all devices if kernels
 * may wait for kernels of another device. Work done, time lost and changes add up to the time that has passed.
 *
 * With FGPU_SIM_PARALLEL, contexts run side by side, as clients of MPS do, and slow each other down. */
#include "server/state.h"

#include <string.h>

#define SLICE_NS 2000000u
#define CHANGE_NS 180000u /* with this, two trainings together reach 91.6 % of one alone on an H200 */
#define MOST_RUNNERS 256  /* contexts of a device that may have work; each further context runs as if it were alone */
#define MOST_STEPS 20000  /* in look_ahead() */
#define MOST_SPANS 8      /* spans of work that begins later; more are merged */
#define TICK_NS 50000u    /* how far devices that wait for each other may be apart */
#define FURTHEST_NS (24ull * 3600 * 1000000000)

struct span {
    uint64_t start_ns, done_ns; /* by the runner's own clock */
};

struct runner {
    const struct client *client; /* NULL: free */
    uint64_t context;
    uint64_t lost_ns;              /* real time minus the runner's own time */
    struct span spans[MOST_SPANS]; /* of work, in order and without overlap */
    uint32_t n, queues;            /* the number of spans; of queues that are not empty */
};

struct timeline {
    uint32_t device;
    bool is_guess; /* a copy for look_ahead(), in which the progress of queues is unknown */
    uint64_t at_ns;
    uint64_t change_until_ns; /* no context runs before this time */
    uint64_t slice_until_ns;
    uint32_t owner, n;
    struct runner runners[MOST_RUNNERS];
};

static struct timeline timelines[SIM_MAX_DEVICES];

static uint64_t clock_of(const struct timeline *t, const struct runner *r) { return t->at_ns - r->lost_ns; }

static uint64_t sooner(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

static bool is_busy(const struct timeline *t, const struct runner *r)
{
    return r->client && (r->queues || (r->n && clock_of(t, r) >= r->spans[0].start_ns));
}

static void forget_done(const struct timeline *t, struct runner *r)
{
    while (r->n && r->spans[0].done_ns <= clock_of(t, r)) memmove(r->spans, r->spans + 1, --r->n * sizeof *r->spans);
}

/* Returns the real time at which a context without work will have work. */
static uint64_t next_start(const struct timeline *t)
{
    uint64_t next = UINT64_MAX;
    for (const struct runner *r = t->runners; r < t->runners + t->n; r++)
        if (r->client && r->n && !is_busy(t, r)) next = sooner(next, r->spans[0].start_ns + r->lost_ns);
    return next;
}

/* Returns for how long the context certainly has work, or stays in its present state. */
static uint64_t steady_ns(const struct timeline *t, const struct runner *r)
{
    uint64_t ns = UINT64_MAX / 4;
    if (r->n) {
        const struct span *span = &r->spans[0];
        uint64_t clock = clock_of(t, r);
        ns = (clock < span->start_ns ? span->start_ns : span->done_ns) - clock;
    }
    return r->queues && !t->is_guess ? sooner(ns, queues_steady_ns(t->device, r->client, r->context, clock_of(t, r)))
                                     : ns;
}

static uint32_t next_busy(const struct timeline *t, uint32_t after)
{
    for (uint32_t i = 1; i <= t->n; i++)
        if (is_busy(t, &t->runners[(after + i) % t->n])) return (after + i) % t->n;
    return t->n;
}

/* Returns how long a piece of work takes now, as a percentage of the time that it takes alone. */
static uint64_t slowness(const struct timeline *t)
{
    uint64_t busy = 0;
    if (!server.parallel) return 100;
    for (const struct runner *r = t->runners; r < t->runners + t->n; r++) busy += is_busy(t, r);
    return 100 + (busy > 1 ? (busy - 1) * (server.parallel - 100) : 0);
}

/* Advances the time. Contexts with work lose the time in which they do not run: all of it except for `runs`, or a part
 * of it if contexts run side by side. */
static void pass(struct timeline *t, uint64_t until_ns, uint32_t runs)
{
    uint64_t passed = until_ns - t->at_ns, slower = slowness(t);
    uint64_t part = passed / slower * 100 + passed % slower * 100 / slower; /* a product may be too large */
    for (uint32_t i = 0; i < t->n; i++) {
        struct runner *r = &t->runners[i];
        if (!is_busy(t, r)) continue;
        uint64_t ran = i == runs || server.parallel ? part : 0;
        if (ran && !t->is_guess) {
            meter_ran(t->device, r->client, t->at_ns, until_ns);
            if (r->queues) r->queues = queues_run(t->device, r->client, r->context, clock_of(t, r), ran);
        }
        r->lost_ns += passed - ran;
    }
    t->at_ns = until_ns;
    for (struct runner *r = t->runners; r < t->runners + t->n; r++) forget_done(t, r);
}

/* Runs all contexts side by side, until something changes. */
static void step_together(struct timeline *t, uint64_t now)
{
    uint64_t until = sooner(now, next_start(t)), slower = slowness(t);
    for (const struct runner *r = t->runners; r < t->runners + t->n; r++) {
        uint64_t steady = is_busy(t, r) ? steady_ns(t, r) : FURTHEST_NS;
        if (steady < FURTHEST_NS) until = sooner(until, t->at_ns + (steady * slower + 99) / 100);
    }
    pass(t, until, t->n);
}

static void change(struct timeline *t, uint32_t to, bool costs)
{
    t->owner = to;
    t->change_until_ns = costs ? t->at_ns + CHANGE_NS : 0;
    t->slice_until_ns = t->at_ns + (costs ? CHANGE_NS : 0) + SLICE_NS;
}

/* Runs one context, or a change of contexts, until something changes. The change from a context without work takes no
 * time. */
static void step(struct timeline *t, uint64_t now)
{
    if (server.parallel) {
        step_together(t, now);
        return;
    }
    uint64_t until = sooner(now, next_start(t));
    if (t->at_ns < t->change_until_ns) {
        pass(t, sooner(until, t->change_until_ns), t->n);
        return;
    }
    if (t->owner >= t->n || !is_busy(t, &t->runners[t->owner])) {
        uint32_t next = t->n ? next_busy(t, t->owner) : 0;
        if (next == t->n) { /* no context has work: the slice ends with the work */
            pass(t, until, t->n);
            t->owner = MOST_RUNNERS;
            return;
        }
        change(t, next, false);
    }
    bool alone = next_busy(t, t->owner) == t->owner;
    uint64_t end = sooner(until, t->at_ns + steady_ns(t, &t->runners[t->owner]));
    if (!alone) end = sooner(end, t->slice_until_ns);
    pass(t, end, t->owner);
    if (alone) t->slice_until_ns = t->at_ns + SLICE_NS; /* the next context with work waits until then */
    if (!alone && t->at_ns == t->slice_until_ns) change(t, next_busy(t, t->owner), true);
}

static bool has_work(const struct timeline *t)
{
    for (const struct runner *r = t->runners; r < t->runners + t->n; r++)
        if (r->client && (r->n || r->queues)) return true;
    return false;
}

/* If kernels wait for kernels of another device, all devices proceed together in small steps. */
static void all_up_to(uint64_t now)
{
    uint64_t at = now;
    for (uint32_t d = 0; d < server.n_gpus; d++)
        if (has_work(&timelines[d])) at = sooner(at, timelines[d].at_ns);
    while (at < now) {
        at = sooner(now, at + TICK_NS);
        for (struct timeline *t = timelines; t < timelines + server.n_gpus; t++)
            while (has_work(t) && t->at_ns < at) step(t, at);
    }
}

static struct timeline *up_to_now(uint32_t device)
{
    struct timeline *t = &timelines[device];
    uint64_t now = now_ns();
    t->device = device;
    if (queues_any()) all_up_to(now);
    while (t->at_ns < now) step(t, now);
    return t;
}

static struct runner *runner_of(struct timeline *t, const struct client *client, uint64_t context, bool make)
{
    for (struct runner *r = t->runners; r < t->runners + t->n; r++)
        if (r->client == client && r->context == context) return r;
    struct runner *free = t->runners;
    while (free < t->runners + t->n && free->client) free++;
    if (!make || free == t->runners + MOST_RUNNERS) return NULL;
    if (free == t->runners + t->n) t->n++;
    *free = (struct runner){.client = client, .context = context};
    return free;
}

/* Returns the real time at which the clock will show `until`, if no context gets or loses work. */
static uint64_t look_ahead(const struct timeline *now, uint32_t runner, uint64_t until)
{
    static struct timeline t; /* static: the server answers one request at a time */
    memcpy(&t, now, offsetof(struct timeline, runners) + now->n * sizeof *now->runners);
    t.is_guess = true;
    const struct runner *r = &t.runners[runner];
    for (int i = 0; i < MOST_STEPS; i++) {
        uint64_t before = t.at_ns, clock = clock_of(&t, r), slower = slowness(&t);
        if (clock >= until || !(r->n || r->queues)) break;
        step(&t, UINT64_MAX / 2);
        /* It ran until there, or had the device alone, or ran beside others. */
        if (clock_of(&t, r) >= until) return before + (until - clock) * slower / 100;
    }
    return t.at_ns + (until > clock_of(&t, r) ? until - clock_of(&t, r) : 0);
}

static struct sim_time tell(const struct timeline *t, const struct runner *r, uint64_t until)
{
    if (!r) return (struct sim_time){.at_ns = t->at_ns, .done_ns = until, .expected_ns = until};
    return (struct sim_time){.at_ns = t->at_ns,
                             .lost_ns = r->lost_ns,
                             .done_ns = until,
                             .expected_ns = look_ahead(t, (uint32_t)(r - t->runners), until),
                             .is_shared = next_busy(t, (uint32_t)(r - t->runners)) != (uint32_t)(r - t->runners)};
}

/* Work that overlaps other work, touches it or has no room of its own is merged with the work before or after it. */
static void add_span(struct runner *r, struct span span)
{
    uint32_t at = r->n;
    while (at && r->spans[at - 1].done_ns >= span.start_ns) at--;
    uint32_t end = at;
    while (end < r->n && r->spans[end].start_ns <= span.done_ns) end++;
    if (at == end && r->n == MOST_SPANS) {
        if (at == r->n)
            at--;
        else
            end++;
    }
    for (uint32_t i = at; i < end; i++) {
        span.start_ns = sooner(span.start_ns, r->spans[i].start_ns);
        span.done_ns = later(span.done_ns, r->spans[i].done_ns);
    }
    memmove(r->spans + at + 1, r->spans + end, (r->n - end) * sizeof *r->spans);
    r->spans[at] = span;
    r->n += 1 - (end - at);
}

static struct runner *known_runner(struct timeline *t, struct client *client, const struct sim_request *request)
{
    bool is_known = ledger_holding(client, request->device, SIM_BLOCK, request->context) != NULL;
    return is_known ? runner_of(t, client, request->context, true) : NULL;
}

struct sim_time turns_work(struct client *client, const struct sim_request *request)
{
    struct timeline *t = up_to_now(request->device);
    struct runner *r = known_runner(t, client, request);
    uint64_t start = r ? clock_of(t, r) : t->at_ns;
    if (request->requested > start) start = sooner(request->requested, start + FURTHEST_NS);
    uint64_t done = start + request->bytes * 1000;
    if (r && request->bytes) add_span(r, (struct span){start, done});
    return tell(t, r, done);
}

struct sim_time turns_look(const struct client *client, const struct sim_request *request)
{
    struct timeline *t = up_to_now(request->device);
    struct runner *r = runner_of(t, client, request->context, false);
    return tell(t, r, sooner(request->requested, t->at_ns + FURTHEST_NS));
}

struct sim_queue turns_queue(struct client *client, const struct sim_request *request)
{
    struct timeline *t = up_to_now(request->device);
    struct runner *r = known_runner(t, client, request);
    struct sim_queue said = {.at_ns = t->at_ns, .index = UINT64_MAX};
    if (!r) return said;
    said.index = queue_add(client, request);
    r->queues = queues_run(t->device, client, request->context, clock_of(t, r), 0);
    said.done = queue_done(client, request);
    said.lost_ns = r->lost_ns;
    return said;
}

struct sim_queue turns_look_queue(const struct client *client, const struct sim_request *request)
{
    struct timeline *t = up_to_now(request->device);
    const struct runner *r = runner_of(t, client, request->context, false);
    return (struct sim_queue){.at_ns = t->at_ns,
                              .lost_ns = r ? r->lost_ns : 0,
                              .done = r ? queue_done(client, request) : UINT64_MAX,
                              .done_ns = r ? queue_done_ns(client, request) : 0};
}

bool turns_has_work(const struct client *client)
{
    for (uint32_t device = 0; device < server.n_gpus; device++) {
        const struct timeline *t = up_to_now(device);
        for (const struct runner *r = t->runners; r < t->runners + t->n; r++)
            if (r->client == client && (r->n || r->queues)) return true;
    }
    return false;
}

/* A turn of another context is not affected. */
void turns_leave(const struct client *client, uint64_t context)
{
    for (uint32_t device = 0; device < server.n_gpus; device++) {
        struct timeline *t = up_to_now(device);
        for (struct runner *r = t->runners; r < t->runners + t->n; r++)
            if (r->client == client && (!context || r->context == context)) *r = (struct runner){0};
        while (t->n && !t->runners[t->n - 1].client) t->n--;
    }
    queues_leave(client, context);
    if (!context) meter_leave(client);
}

void turns_catch_up(uint32_t device) { up_to_now(device); }
