/* Streams with kernels that run only together with others, as those of a collective do: each spins on its device until
 * all of its kind have come to theirs. Nobody can say beforehand when that will be, so the server does such a stream's
 * work itself, one thing after the other. What meets by a key meets round by round; a party that has gone is waited for
 * without end, as by a real kernel. */
#include "simd.h"

#include <string.h>

#define MOST_LANES 128
#define MOST_WAITING 1024 /* in a lane: a real driver's queue is as long */
#define MOST_GROUPS 64
#define MOST_PARTIES SIM_MAX_DEVICES

struct member {
    const struct client *client; /* NULL: gone */
    uint64_t context;
    uint64_t queued, arrived; /* rounds */
};

struct group {
    uint64_t key;
    uint32_t parties, n; /* 0: free */
    struct member members[MOST_PARTIES];
};

struct item {
    uint64_t from_ns; /* by the context's clock: not before */
    uint64_t left_ns;
    struct group *group; /* NULL: by itself */
    struct member *member;
    uint64_t round;
};

struct lane {
    const struct client *client; /* NULL: free */
    uint64_t context, id;
    uint32_t device;
    uint64_t queued, done;
    struct item items[MOST_WAITING]; /* by index, round and round */
};

static struct lane lanes[MOST_LANES];
static struct group groups[MOST_GROUPS];
static uint32_t n_lanes;

bool lanes_any(void) { return n_lanes; }

static bool is_of(const struct lane *lane, uint32_t device, const struct client *client, uint64_t context)
{
    return lane->client == client && lane->context == context && lane->device == device;
}

static struct lane *find(const struct client *client, const struct sim_request *request)
{
    for (struct lane *l = lanes; n_lanes && l < lanes + MOST_LANES; l++)
        if (l->client && is_of(l, request->device, client, request->context) && l->id == request->lane) return l;
    return NULL;
}

static struct lane *find_or_make(const struct client *client, const struct sim_request *request)
{
    struct lane *lane = find(client, request);
    for (struct lane *l = lanes; !lane && l < lanes + MOST_LANES; l++) {
        if (l->client) continue;
        lane = l;
        *lane = (struct lane){
            .client = client, .context = request->context, .id = request->lane, .device = request->device};
        n_lanes++;
    }
    return lane;
}

static struct group *group_of(const struct sim_request *request)
{
    struct group *free = NULL;
    for (struct group *g = groups; g < groups + MOST_GROUPS; g++) {
        if (g->n && g->key == request->key && g->parties == request->parties) return g;
        if (!g->n) free = g;
    }
    if (free) *free = (struct group){.key = request->key, .parties = request->parties};
    return free;
}

static struct member *member_of(struct group *group, const struct client *client, uint64_t context)
{
    for (struct member *m = group->members; m < group->members + group->n; m++)
        if (m->client == client && m->context == context) return m;
    if (group->n == group->parties) return NULL;
    group->members[group->n] = (struct member){.client = client, .context = context};
    return &group->members[group->n++];
}

/* 0: there is no room; UINT64_MAX: nor will there be, or there are more parties than were announced. */
uint64_t lane_add(const struct client *client, const struct sim_request *request)
{
    struct item item = {.from_ns = request->requested, .left_ns = request->bytes * 1000};
    struct lane *lane = request->parties > MOST_PARTIES ? NULL : find_or_make(client, request);
    if (!lane) return UINT64_MAX;
    if (lane->queued - lane->done == MOST_WAITING) return 0;
    if (request->parties) {
        item.group = group_of(request);
        item.member = item.group ? member_of(item.group, client, request->context) : NULL;
        if (!item.member) return UINT64_MAX;
        item.round = ++item.member->queued;
    }
    lane->items[++lane->queued % MOST_WAITING] = item;
    return lane->queued;
}

uint64_t lane_done(const struct client *client, const struct sim_request *request)
{
    const struct lane *lane = find(client, request);
    return lane ? lane->done : UINT64_MAX;
}

static struct item *head(struct lane *lane)
{
    return lane->done < lane->queued ? &lane->items[(lane->done + 1) % MOST_WAITING] : NULL;
}

static bool all_there(const struct item *item)
{
    if (!item->group) return true;
    if (item->group->n < item->group->parties) return false;
    for (uint32_t i = 0; i < item->group->n; i++)
        if (item->group->members[i].arrived < item->round) return false;
    return true;
}

/* How long nothing ends or begins in its lanes; what waits for others may do so for ever. */
uint64_t lanes_steady_ns(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns)
{
    uint64_t ns = UINT64_MAX / 4;
    for (struct lane *l = lanes; l < lanes + MOST_LANES; l++) {
        const struct item *item = l->client && is_of(l, device, client, context) ? head(l) : NULL;
        if (!item) continue;
        uint64_t change = item->from_ns > clock_ns ? item->from_ns - clock_ns : all_there(item) ? item->left_ns : ns;
        if (change < ns) ns = change;
    }
    return ns;
}

/* What is done goes, and what comes next arrives. */
static bool goes_on(struct lane *lane, uint64_t clock_ns, uint64_t ns)
{
    for (struct item *item; (item = head(lane)); lane->done++) {
        if (item->from_ns > clock_ns) return true;
        if (item->member && item->member->arrived < item->round) item->member->arrived = item->round;
        if (!all_there(item)) return true;
        item->left_ns -= ns < item->left_ns ? ns : item->left_ns;
        ns = 0;
        if (item->left_ns) return true;
    }
    return false;
}

/* The context has run for so long, up to this moment of its clock; how many of its lanes have work left. */
uint32_t lanes_run(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns, uint64_t ns)
{
    uint32_t left = 0;
    for (struct lane *l = lanes; l < lanes + MOST_LANES; l++) {
        if (!l->client || !is_of(l, device, client, context)) continue;
        left += goes_on(l, clock_ns, ns);
    }
    return left;
}

static bool leaves(const struct client *of, uint64_t its, const struct client *client, uint64_t context)
{
    return of == client && (!context || its == context);
}

void lanes_leave(const struct client *client, uint64_t context)
{
    for (struct lane *l = lanes; n_lanes && l < lanes + MOST_LANES; l++) {
        if (!l->client || !leaves(l->client, l->context, client, context)) continue;
        l->client = NULL;
        n_lanes--;
    }
    for (struct group *g = groups; g < groups + MOST_GROUPS; g++) {
        uint32_t left = 0;
        for (struct member *m = g->members; m < g->members + g->n; m++) {
            if (leaves(m->client, m->context, client, context)) m->client = NULL;
            left += m->client != NULL;
        }
        if (!left) g->n = 0;
    }
}
