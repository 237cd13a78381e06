/*
 * room ROUNDS: requests for which the driver has no memory, while the page has any contents. Time is simulated. Exit
 * status 0 if every request ended within its time, and reported itself neither too rarely nor too often.
 */
#include "../../../shim/account/room.c"

#include <stdio.h>
#include <stdlib.h>

#define MS 1000000ULL

static struct fgpu_control_page control;
static struct fgpu_usage_page usage;
static struct fgpu_view view;
static uint64_t now, seed = 0x9e3779b97f4a7c15ULL;
static unsigned reports, naps, attempts, settled;
static enum { LIES, TEMPTS, ENDS, KINDS } kind; /* the behaviour of the page */
static uint64_t ends_ns;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 2) % below;
}

uint64_t fgpu_now(void) { return now; }

void fgpu_nap(long ns)
{
    if (ns <= 0 || ns > (long)(10 * MS)) exit(3);
    now += draw(8) ? (uint64_t)ns : 1; /* a signal ends a sleep early */
    naps++;
}

void fgpu_admit_here(unsigned device, uint64_t bytes, unsigned what, uint64_t ticket)
{
    if (device || bytes != 7 || what != (FGPU_HELLO | FGPU_LACKS) || ticket) exit(4);
    reports++;
}

struct admission fgpu_admission(CUdevice ordinal, uint64_t bytes, unsigned kind)
{
    return (struct admission){.index = ordinal, .bytes = bytes, .kind = kind};
}

CUresult fgpu_settled(const struct admission *admission, CUresult result, uint64_t handle)
{
    if (handle || admission->bytes != 7) exit(5);
    settled++;
    return result;
}

bool fgpu_current(CUdevice *device) { return *device = 0, true; }

/* TEMPTS: room is being made at every look, or was made. ENDS: the agent has made its last decision. */
struct fgpu_view fgpu_look(void)
{
    uint64_t any = draw(3) ? now - 6000 * MS + draw(12000) * MS : draw(2) ? draw(1ULL << 62) : ~0ULL - draw(4);
    if (kind == LIES) usage.room_ns[0] = draw(4) ? any : draw(4);
    if (kind == TEMPTS) usage.room_ns[0] = (draw(500) ? now + draw(5000) * MS : now) & ~FGPU_NO_ROOM;
    if (kind == ENDS && now < ends_ns) usage.room_ns[0] = (now + 5000 * MS) & ~FGPU_NO_ROOM;
    return view;
}

static int check(void)
{
    uint64_t begun = now;
    kind = draw(KINDS);
    ends_ns = now + draw(10000) * MS;
    reports = naps = attempts = settled = 0;
    view = (struct fgpu_view){.link = FGPU_HELD, .levels = 1, .control = &control, .usage = &usage};
    usage.flags = draw(8) ? FGPU_WAITS : ~(uint64_t)FGPU_WAITS;
    view.link = draw(8) ? FGPU_HELD : FGPU_CLOSED;
    bool may = usage.flags == FGPU_WAITS && view.link == FGPU_HELD;
    struct fgpu_request request = {.bytes = 7, .kind = FGPU_MEMORY};
    while (fgpu_attempt(&request)) {
        now += draw(3) * MS;
        request.result = CUDA_ERROR_OUT_OF_MEMORY;
        attempts++;
    }
    if (request.result != CUDA_ERROR_OUT_OF_MEMORY || settled != attempts || !attempts) return 1;
    uint64_t ms = (now - begun) / MS, most_ms = kind == ENDS ? 10000 + 5000 + 600 : 120000 + 20;
    if (may ? ms > most_ms : naps || reports)
        return fprintf(stderr, "kind %d: %llu ms\n", kind, (unsigned long long)ms);
    if (may && kind != LIES && (reports < ms / 3000 || reports > ms / 45 + 3 + naps / 50))
        return fprintf(stderr, "kind %d: %u reports in %llu ms\n", kind, reports, (unsigned long long)ms);
    return 0;
}

int main(int argc, char **argv)
{
    now = 1000 * FGPU_SECOND_NS;
    for (long i = argc > 1 ? atol(argv[1]) : 1000; i; i--)
        if (check()) return 1;
    return 0;
}
