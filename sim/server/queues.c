/* Streams with kernels that run only together with others, as those of a collective. Each kernel spins on its device
 * until all kernels with its key have started on their devices. That time cannot be computed in advance, so the server
 * does the work of such a stream itself, in order. Kernels with one key meet round by round. As with real kernels, the
 * wait for an exited party never ends. */
#include "server/state.h"

#define MOST_QUEUES 128
#define MOST_WAITING 1024 /* in a queue, as in a real driver's */
#define MOST_GROUPS 64
#define MOST_PARTIES SIM_MAX_DEVICES

struct member {
    const struct client *client; /* NULL: the client has exited */
    uint64_t context;
    uint64_t queued, arrived; /* rounds */
};

struct group {
    uint64_t key;
    uint32_t parties, n; /* 0: free */
    struct member members[MOST_PARTIES];
};

struct item {
    uint64_t from_ns; /* the earliest start, by the context's clock */
    uint64_t left_ns;
    uint64_t done_ns;    /* 0: it is not done */
    struct group *group; /* NULL: the kernel runs alone */
    struct member *member;
    uint64_t round;
};

struct queue {
    const struct client *client; /* NULL: free */
    uint64_t context, id;
    uint32_t device;
    uint64_t queued, done;
    struct item items[MOST_WAITING]; /* a ring, by index */
};

static struct queue queues[MOST_QUEUES];
static struct group groups[MOST_GROUPS];
static uint32_t n_queues;

bool queues_any(void) { return n_queues; }

static bool is_of(const struct queue *queue, uint32_t device, const struct client *client, uint64_t context)
{
    return queue->client == client && queue->context == context && queue->device == device;
}

static struct queue *find(const struct client *client, const struct sim_request *request)
{
    for (struct queue *l = queues; n_queues && l < queues + MOST_QUEUES; l++)
        if (l->client && is_of(l, request->device, client, request->context) && l->id == request->queue) return l;
    return NULL;
}

static struct queue *find_or_make(const struct client *client, const struct sim_request *request)
{
    struct queue *queue = find(client, request);
    for (struct queue *l = queues; !queue && l < queues + MOST_QUEUES; l++) {
        if (l->client) continue;
        queue = l;
        *queue = (struct queue){
            .client = client, .context = request->context, .id = request->queue, .device = request->device};
        n_queues++;
    }
    return queue;
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

uint64_t queue_add(const struct client *client, const struct sim_request *request)
{
    struct item item = {.from_ns = request->requested, .left_ns = request->bytes * 1000};
    struct queue *queue = request->parties > MOST_PARTIES ? NULL : find_or_make(client, request);
    if (!queue) return UINT64_MAX;
    if (queue->queued - queue->done == MOST_WAITING) return 0;
    if (request->parties) {
        item.group = group_of(request);
        item.member = item.group ? member_of(item.group, client, request->context) : NULL;
        if (!item.member) return UINT64_MAX;
        item.round = ++item.member->queued;
    }
    queue->items[++queue->queued % MOST_WAITING] = item;
    return queue->queued;
}

uint64_t queue_done(const struct client *client, const struct sim_request *request)
{
    const struct queue *queue = find(client, request);
    return queue ? queue->done : UINT64_MAX;
}

uint64_t queue_done_ns(const struct client *client, const struct sim_request *request)
{
    const struct queue *queue = find(client, request);
    uint64_t index = request->requested;
    bool is_kept = queue && index && index <= queue->done && queue->queued - index < MOST_WAITING;
    return is_kept ? queue->items[index % MOST_WAITING].done_ns : 0;
}

static struct item *head(struct queue *queue)
{
    return queue->done < queue->queued ? &queue->items[(queue->done + 1) % MOST_WAITING] : NULL;
}

static bool all_there(const struct item *item)
{
    if (!item->group) return true;
    if (item->group->n < item->group->parties) return false;
    for (uint32_t i = 0; i < item->group->n; i++)
        if (item->group->members[i].arrived < item->round) return false;
    return true;
}

/* Work that waits for others may wait for ever. */
uint64_t queues_steady_ns(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns)
{
    uint64_t ns = UINT64_MAX / 4;
    for (struct queue *l = queues; l < queues + MOST_QUEUES; l++) {
        const struct item *item = l->client && is_of(l, device, client, context) ? head(l) : NULL;
        if (!item) continue;
        uint64_t change = item->from_ns > clock_ns ? item->from_ns - clock_ns : all_there(item) ? item->left_ns : ns;
        if (change < ns) ns = change;
    }
    return ns;
}

/* Removes work that is done, and lets the next work arrive. */
static bool goes_on(struct queue *queue, uint64_t clock_ns, uint64_t ns)
{
    uint64_t at_ns = clock_ns;
    for (struct item *item; (item = head(queue)); queue->done++) {
        if (item->from_ns > clock_ns) return true;
        if (item->member && item->member->arrived < item->round) item->member->arrived = item->round;
        if (!all_there(item)) return true;
        uint64_t ran = ns < item->left_ns ? ns : item->left_ns;
        item->left_ns -= ran;
        at_ns += ran;
        ns = 0;
        if (item->left_ns) return true;
        item->done_ns = at_ns;
    }
    return false;
}

uint32_t queues_run(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns, uint64_t ns)
{
    uint32_t left = 0;
    for (struct queue *l = queues; l < queues + MOST_QUEUES; l++) {
        if (!l->client || !is_of(l, device, client, context)) continue;
        left += goes_on(l, clock_ns, ns);
    }
    return left;
}

static bool leaves(const struct client *of, uint64_t its, const struct client *client, uint64_t context)
{
    return of == client && (!context || its == context);
}

void queues_leave(const struct client *client, uint64_t context)
{
    for (struct queue *l = queues; n_queues && l < queues + MOST_QUEUES; l++) {
        if (!l->client || !leaves(l->client, l->context, client, context)) continue;
        l->client = NULL;
        n_queues--;
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
