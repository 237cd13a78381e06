/*
 * orphans ROUNDS: makes requests that are refused, while the pages have any contents and the kernel returns any
 * verdict. Time is simulated. Exit status 0 if every request ended within its time, waited only if the rules allow
 * that, and had its last refusal counted once.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "../../../shim/account/orphans.c"
#include "../../../shim/account/reclaim.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MS 1000000ULL
#define LEVELS 3
#define SLOWEST_MS 40 /* the longest time until the kernel answers */

static struct fgpu_control_page control;
static struct fgpu_usage_page usage[LEVELS];
static uint64_t now, seed = 0x9e3779b97f4a7c15ULL;
static unsigned asked, impatient, naps, naps_cooperative;
static enum { LIES, TEMPTS, KEEPS, LEAVES } kernel; /* the behaviour of pages and kernel */
static uint64_t leaves_ns, looks_ns;
static struct fgpu_view view;
__thread bool fgpu_calls_second;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 2) % below;
}

static uint64_t any(void) { return draw(3) ? draw(1ULL << (1 + draw(62))) : draw(2) ? ~0ULL - draw(4) : draw(4); }

static void claim_anything(void)
{
    for (unsigned level = 0; level < LEVELS; level++) {
        usage[level].devices[0].limit = any();
        usage[level].devices[0].used = any();
        usage[level].orphaned[0] = any();
        usage[level].orphaned_ns[0] = draw(2) ? now - draw(5000) * MS : any();
        usage[level].looked_ns[0] = draw(2) ? now - draw(5000) * MS : any();
        usage[level].flags = draw(4) ? 0 : FGPU_OBSERVE;
    }
}

/* -- functions that the two included files call */

uint64_t fgpu_now(void) { return now; }

uint64_t fgpu_freed_unseen_ns(struct fgpu_view of) { return of.usage->freed_ns; /* 0 */ }

struct fgpu_room fgpu_room(CUdevice ordinal)
{
    (void)ordinal;
    return (struct fgpu_room){FGPU_MOST_BYTES, FGPU_MOST_BYTES};
}

void fgpu_nap(long ns)
{
    if (ns < 0 || ns > (long)(10 * MS)) exit(3);
    naps_cooperative += view.cooperative;
    now += draw(8) ? (uint64_t)ns : 1; /* a signal ends a sleep early */
    naps++;
}

/* Writes pages on which all memory has just been orphaned, so that room seems about to appear at every look. */
static void tempt(void)
{
    memset(usage, 0, sizeof usage);
    for (unsigned level = 0; level < LEVELS; level++) {
        usage[level].devices[0] = (struct fgpu_usage){.limit = 1ULL << 40, .used = 1ULL << 40};
        usage[level].orphaned[0] = 1ULL << 40;
        usage[level].orphaned_ns[0] = now + draw(2) * MS;
    }
}

static void leave(void)
{
    usage[0].devices[0].used -= usage[0].orphaned[0];
    usage[0].orphaned[0] = 0;
}

struct fgpu_view fgpu_look(void)
{
    if (kernel == LIES) {
        claim_anything();
        if (!draw(50)) view.link = draw(2) ? FGPU_CLOSED : FGPU_HELD;
        if (!draw(50)) view.cooperative = !view.cooperative;
    }
    if (kernel == TEMPTS) tempt();
    if (kernel == LEAVES && now >= leaves_ns) leave();
    if (kernel >= KEEPS && now >= looks_ns) usage[0].looked_ns[0] = now;
    return view;
}

int fgpu_index(const struct fgpu_control_page *page, CUdevice ordinal) { return page == &control ? ordinal : -1; }
bool fgpu_pools_yield(CUdevice ordinal) { return ordinal == 0 && draw(2); }

struct admission fgpu_admission_begin(struct fgpu_view seen, CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    (void)seen, (void)ordinal;
    return (struct admission){.index = -1, .bytes = bytes, .kind = kind};
}

static bool fits(uint64_t bytes)
{
    struct fgpu_usage *u = &usage[0].devices[0];
    return u->limit >= u->used && bytes <= u->limit - u->used;
}

void fgpu_ask_once(struct admission *admission, struct fgpu_view *seen, CUdevice ordinal, bool patient)
{
    bool orphaned = patient && !seen->cooperative && fgpu_has_orphans(*seen, ordinal);
    bool granted = kernel >= KEEPS ? fits(admission->bytes) : kernel == LIES && !draw(60);
    now += draw(SLOWEST_MS) * MS;
    asked++;
    impatient += !orphaned;
    admission->refusal = granted ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    admission->patient =
        orphaned && !granted && (kernel != LIES || draw(40)); /* sometimes the kernel does not answer */
    if (!granted && orphaned && !admission->patient) impatient++;
}

/* -- the rules */

static int wrong(const char *what, uint64_t ms)
{
    fprintf(stderr, "%s: %llu ms, asked %u times, %u impatiently, %u naps\n", what, (unsigned long long)ms, asked,
            impatient, naps);
    return 1;
}

static int check(uint64_t began, bool refused, uint64_t questions)
{
    uint64_t ms = (now - began) / MS, most_ms = kernel == TEMPTS ? 4000 : 30000;
    if (ms > most_ms + 10 + 4 * questions * SLOWEST_MS) return wrong("too long", ms);
    if (asked > ms / 50 + 5 * questions) return wrong("too often", ms);
    if (refused && !impatient) return wrong("the refusal is not counted", ms);
    if (naps_cooperative) return wrong("waits in a cooperative container", ms);
    if (errno != 77) return wrong("errno", ms);
    return 0;
}

static void begin(void)
{
    view = (struct fgpu_view){.link = FGPU_HELD, .levels = LEVELS, .control = &control, .usage = usage};
    now = 10000 * MS + draw(1ULL << 50);
    asked = impatient = naps = naps_cooperative = 0;
    errno = 77;
}

/* Makes several requests of one call, with or without patience, to a kernel that LIES or TEMPTS. */
static int ask_a_liar(void)
{
    struct patience patience = {0};
    begin();
    kernel = draw(2) ? LIES : TEMPTS;
    view.cooperative = !draw(10);
    fgpu_look();
    uint64_t began = now, questions = 1 + draw(3);
    bool patient = draw(4), refused = true;
    for (uint64_t i = 0; i < questions && refused; i++) {
        uint64_t bytes = kernel == TEMPTS ? 1 + draw(1 << 30) : any();
        unsigned kind = draw(2) ? FGPU_POOL : FGPU_CONTEXT;
        refused = fgpu_admission_with(patient ? &patience : NULL, 0, bytes, kind).refusal;
    }
    if (!patient && naps) return wrong("waits without patience", (now - began) / MS);
    return check(began, refused, questions);
}

/* Makes a request below a level that enforces and a level that only observes and is always too full. */
static int ask_the_honest(void)
{
    begin();
    kernel = draw(2) ? KEEPS : LEAVES;
    memset(usage, 0, sizeof usage);
    uint64_t limit = 1 + draw(1 << 20), used = draw(2 << 20), orphaned = draw(used + 1), others = used - orphaned;
    uint64_t bytes = draw(2) && limit > others ? limit - others : 1 + draw(2 << 20), began = now;
    bool is_away = !draw(4); /* whether no agent runs */
    uint64_t age_ms = draw(2) ? draw(4000) : draw(45000), left_ms = age_ms < 30000 ? 30000 - age_ms : 0;
    uint64_t looks_ms = draw(4000), most_ms = is_away || left_ms < looks_ms ? left_ms : looks_ms;
    usage[0].devices[0] = (struct fgpu_usage){.limit = limit, .used = used};
    usage[0].orphaned[0] = orphaned;
    usage[0].orphaned_ns[0] = now - age_ms * MS;
    usage[0].looked_ns[0] = draw(now); /* before the request */
    looks_ns = is_away ? ~0ULL : now + looks_ms * MS;
    usage[1].flags = FGPU_OBSERVE;
    usage[1].devices[0].used = used;
    usage[2].devices[0].limit = FGPU_NO_LIMIT;
    leaves_ns = now + draw(3000) * MS;
    bool fits_now = used <= limit && bytes <= limit - used, fits_later = others <= limit && bytes <= limit - others;
    bool may_wait = !fits_now && fits_later && left_ms;
    bool refused = fgpu_admission(0, bytes, FGPU_MEMORY).refusal;
    uint64_t ms = (now - began) / MS, leaves_ms = (leaves_ns - began) / MS;
    bool leaves = kernel == LEAVES && may_wait && leaves_ms + 4 * SLOWEST_MS + 10 < most_ms;
    if (naps && !may_wait) return wrong("waits in vain", ms);
    if (leaves && (refused || ms > leaves_ms + 10 + 4 * SLOWEST_MS))
        return wrong("not admitted when there was room", ms);
    if (kernel == KEEPS && refused == fits_now) return wrong("the wrong answer", ms);
    if (kernel == KEEPS && !naps && may_wait && left_ms > 2 * SLOWEST_MS) return wrong("does not wait", ms);
    if (refused && naps && ms > most_ms + 10 + 4 * SLOWEST_MS) return wrong("waits beyond the time limit", ms);
    return check(began, refused, 1);
}

int main(int count, char **words)
{
    int bad = 0;
    for (int i = count > 1 ? atoi(words[1]) : 1; i; i--) bad += ask_a_liar() + ask_the_honest();
    return bad > 0;
}
