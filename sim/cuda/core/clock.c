/* The clock of a context. It stops while the context has work and another context has the device. The process therefore
 * has only an upper bound of the clock's time, and the server has the time that was lost since. Functions that need the
 * exact time send a request to the server, and only if work can be done by the upper bound. */
#include "cuda/core/driver.h"

#include <time.h>

#define SHARED_NS 5000000u  /* the longest sleep while other contexts have work: the work may be killed */
#define PATIENCE_NS 200000u /* how long an expected time may be used without another request */

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

static uint64_t sooner(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t real_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t context_now(const struct context *context) { return real_now() - context->lost_ns; }

static void remember_loss(struct context *context)
{
    const struct loss now = {context->known_ns, context->lost_ns};
    const struct loss *last = &context->losses[(context->n_losses + LOSSES - 1) % LOSSES];
    if (context->n_losses && last->at_ns == now.at_ns && last->lost_ns == now.lost_ns) return;
    context->losses[context->n_losses++ % LOSSES] = now;
}

/* The clock loses time only while there is work. What was lost since known_ns was therefore lost before the end of the
 * work, however late this function is called. */
void context_lost(struct context *context, uint64_t at, uint64_t lost)
{
    bool is_more = lost > context->lost_ns;
    if (is_more) remember_loss(context);
    context->lost_ns = later(context->lost_ns, lost);
    uint64_t now = at - context->lost_ns,
             end = is_more && context->work_ns > context->known_ns ? context->work_ns : now;
    context->reached_ns = later(context->reached_ns, now);
    context->known_ns = later(context->known_ns, sooner(now, end));
    if (is_more) remember_loss(context);
}

static bool ask(struct context *context, uint32_t op, uint64_t ns, uint64_t from, struct sim_time *answer)
{
    struct sim_request request = {
        .device = (uint32_t)context->device, .context = context->id, .bytes = ns / 1000, .requested = from};
    if (sim_ask(op, request, answer, sizeof *answer)) return false;
    context_lost(context, answer->at_ns, answer->lost_ns);
    context->expected_from_ns = answer->done_ns;
    context->expected_ns = answer->is_shared ? answer->expected_ns : 0;
    context->asked_ns = answer->at_ns;
    return true;
}

uint64_t context_start(const struct context *context, uint64_t from)
{
    return later(from, context->work_ns > context->reached_ns ? context->reached_ns : context_now(context));
}

/* Sends only work of a microsecond or more to the server. If there is no other work, no time is lost before its start.
 */
uint64_t context_work(struct context *context, uint64_t ns, uint64_t from)
{
    struct sim_time answer;
    uint64_t done = context_start(context, from) + ns;
    if (ns >= 1000 && ask(context, SIM_WORK, ns, from, &answer)) done = answer.done_ns;
    if (context->work_ns <= context->known_ns) context->known_ns = later(context->known_ns, done - ns);
    context->work_ns = later(context->work_ns, done);
    return done;
}

bool context_reached(struct context *context, uint64_t until)
{
    struct sim_time answer;
    uint64_t now = real_now();
    if (until <= context->reached_ns) return true;
    if (now - context->lost_ns < until) return false;
    if (context->work_ns <= context->reached_ns) return true; /* without work the context cannot have lost time */
    if (until >= context->expected_from_ns && now < context->expected_ns && now < context->asked_ns + PATIENCE_NS)
        return false;
    return !ask(context, SIM_LOOK, 0, until, &answer) || until <= context->reached_ns;
}

/* Returns the real time at which the clock should show `until`, or at which the caller should send another request. */
static uint64_t wake_at(const struct context *context, uint64_t until)
{
    uint64_t at = until + context->lost_ns, now = real_now();
    if (context->expected_ns && until >= context->expected_from_ns) at = later(at, context->expected_ns);
    return context->expected_ns && at > now + SHARED_NS ? now + SHARED_NS : at;
}

/* Another thread may destroy the context while the lock is released. Callers check for that. */
void context_wait(struct context *context, uint64_t until)
{
    uint64_t id = context->id;
    while (context->id == id && !context_reached(context, until)) {
        uint64_t at = wake_at(context, until);
        struct timespec ts = {.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
        sim_unlock();
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL))
            ;
        sim_lock();
        if (!context->alive) return;
    }
}

/* Time that was lost between two times at which the loss is known is assumed to have been lost evenly. */
uint64_t context_real(const struct context *context, uint64_t at)
{
    size_t n = context->n_losses < LOSSES ? context->n_losses : LOSSES;
    struct loss before = {0}, after = {context->known_ns, context->lost_ns};
    for (size_t i = context->n_losses - n; i < context->n_losses; i++) {
        const struct loss *loss = &context->losses[i % LOSSES];
        if (loss->at_ns >= at) {
            after = *loss;
            break;
        }
        before = *loss;
    }
    if (!before.at_ns || at >= after.at_ns) return at + after.lost_ns;
    double part = (double)(at - before.at_ns) / (double)(after.at_ns - before.at_ns);
    return at + before.lost_ns + (uint64_t)((double)(after.lost_ns - before.lost_ns) * part);
}

uint64_t context_translate(const struct context *from, const struct context *to, uint64_t at)
{
    return from == to ? at : at + from->lost_ns - to->lost_ns;
}
