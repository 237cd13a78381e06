/* maps.bpf.h: the maps, which are pinned by their names, and helpers that all other parts use. */

#define VERDICT_MASK (FGPU_VERDICTS - 1)
#define DEVICE_MASK (FGPU_DEVICES - 1)
#define TICKET_MASK ((1ULL << 62) - 1)
#define DEPTH 16 /* cgroups below the root that are searched */
#define TRIES 8
#define MOST_ALLOCATIONS (SPARSE ? 1048576 : 262144) /* without SPARSE, each takes its memory at once */
#define MOST_THREADS 65536
#define MOST_PROCESSES 16384
#define MOST_ORPHANS 65536
#define MOST_BORROWERS 4096
#define PART(most) ((most) / 4)                       /* of a shared map: what one level may have of it */
#define RESERVE(most) ((most) / 8)                    /* of a shared map: kept for owners that have few entries */
#define FEW(most) ((most) < 1024 ? 1 : (most) / 1024) /* of a shared map: what an owner claims at a time */
#define SPAN 32                                       /* mappings of one unmap that one run of a program releases */
#define READY 2
#define SIGKILL 9
#define EVENT_BYTES (1 << 20)
#define BELL_BYTES (1 << 16) /* a page, however large pages are */
#define UNLIKELY(what)                                                                                                 \
    __builtin_expect(!!(what), 0) /* the compiler puts this branch behind the rest, out of the way                     \
                                   */
#define IDLE (1ULL << 63)         /* beside the generation that a thread belongs to */
#define OBSERVED 4                /* a verdict beside the others: admitted because no level enforces */

BPF_PROG_ARRAY(again, 1); /* the program call_return, which may go on with a long unmap */
BPF_F_TABLE("array", u32, struct fgpu_usage_page, page_template, 1, 1U << 10 /* BPF_F_MMAPABLE */);
BPF_TABLE("hash_of_maps$page_template", u64, int, pages, 4096);
BPF_TABLE("array_of_maps$page_template", u32, int, shelf, 4096); /* the same pages, by place */
BPF_F_TABLE("hash", u64, u32, resolved, 16384, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_limit, limits, 65536, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_share, shares, 65536, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_turn, turns, 65536, SPARSE);
/* Nanoseconds for which NVML has seen processes of a level run on a device, ever growing. */
BPF_F_TABLE("hash", struct fgpu_level_device, u64, ran, 65536, SPARSE);
BPF_F_TABLE("hash", u32, struct fgpu_process, processes, MOST_PROCESSES, SPARSE);
BPF_F_TABLE("hash", struct fgpu_allocation_key, struct fgpu_allocation, allocations, MOST_ALLOCATIONS, SPARSE);
BPF_F_TABLE("hash", u64, struct fgpu_thread, threads, MOST_THREADS, SPARSE);
BPF_F_TABLE("hash", struct fgpu_orphan_key, struct fgpu_orphan, orphans, MOST_ORPHANS, SPARSE);
BPF_TABLE("array", u32, u64, orphans_made, 1);                 /* entries of `orphans` so far */
BPF_F_TABLE("hash", u64, u32, spaces, MOST_PROCESSES, SPARSE); /* address space -> its process */
/* Processes that live in the address space of another process (vfork). That process is charged for what they do. */
BPF_F_TABLE("hash", u32, u32, borrowers, MOST_BORROWERS, SPARSE);
BPF_TABLE("array", u32, struct fgpu_owner, owners, FGPU_OWNERS);
/* How many entries each map of enum fgpu_shared can have. The loader writes it: a pinned map may be of an older
 * version, and shorter. */
BPF_TABLE("array", u32, u64, sizes, FGPU_SHARED);
BPF_TABLE("array", u32, u64, managed_freed, FGPU_DEVICES); /* bytes, ever growing */
BPF_TABLE("array", u32, u64, contexts, FGPU_DEVICES);
BPF_TABLE("array", u32, struct fgpu_device, devices, FGPU_DEVICES);
BPF_F_TABLE("hash", struct fgpu_file, u32, files, 4096, SPARSE);
/* 0: epoch, 1: flags for control pages, 2, 3: events of cgroups, 4: epoch of shares, 5: processes so far, 6: when the
 * agent was last told of orphans, 7: tags so far. The last slot is not used: the form of a map that may be pinned
 * stays, and what is new gets a map of its own. */
BPF_TABLE("array", u32, u64, host, 9);
BPF_F_TABLE("hash", u64, struct fgpu_event_budget, event_budgets, FGPU_EVENT_BUDGETS, SPARSE);
BPF_F_TABLE("hash", struct fgpu_counter_key, u64, counters, 65536, SPARSE);
BPF_TABLE("array", u32, u64, incidents, 2 * FGPU_REASONS);
BPF_TABLE("percpu_array", u32, u64, hits, FGPU_HITS);
#if ENDS /* when a process with such a pid, or with another pid that has the same place, has ended last */
BPF_TABLE("array", u32, u64, ends, FGPU_ENDS);
#endif
BPF_RINGBUF_OUTPUT(events, EVENT_BYTES / PAGE_SIZE);
BPF_RINGBUF_OUTPUT(bell, BELL_BYTES / PAGE_SIZE); /* by which the kernel wakes the gatekeeper */
BPF_ARRAY(blanks, struct fgpu_process, 1);        /* never written: a process is too large for the stack */

/* Return a device as an index that the verifier accepts: masked where it is used, whatever the compiler remembers. */
static u64 slot(u64 device)
{
    __asm__ volatile("" : "+r"(device));
    device &= DEVICE_MASK;
    return device;
}

/* Return `value`, and make the verifier forget what it knows of it. The verifier then follows the code behind it once,
 * and not for each value that it might have. `any` is a number of which the verifier knows nothing either. */
static u64 forget(u64 value, u64 any)
{
    value ^= any;
    __asm__ volatile("" : "+r"(value));
    return value ^ any;
}

/* Make the kernel give the program a stack of its own. Linux 6.13 gives a large program one stack for each processor,
 * unless it may call another program. A program at a uprobe can be preempted, and the next one on that processor would
 * write over its pointers. So this call is here for the kernel to see when it loads the program; it is never made. */
static void own_stack(struct pt_regs *ctx)
{
    u64 ever = 0;
    __asm__ volatile("" : "+r"(ever));
    if (ever) again.call(ctx, 0);
}

static void hit(u32 probe)
{
    u64 *n = hits.lookup(&probe);
    if (n) __sync_fetch_and_add(n, 1); /* of this processor; another program may run in between all the same */
}

static struct fgpu_usage_page *page_of(u64 cgroup)
{
    void *inner = pages.lookup(&cgroup);
    u32 zero = 0;
    return inner ? bpf_map_lookup_elem(inner, &zero) : 0;
}

/* Return a level's page without a search: the page at the place that it had when the process came to this level. A page
 * that was taken away names no cgroup any more. */
static struct fgpu_usage_page *page_at(struct fgpu_level *level)
{
    u32 place = level->place, zero = 0;
    void *inner = shelf.lookup(&place);
    struct fgpu_usage_page *page = inner ? bpf_map_lookup_elem(inner, &zero) : 0;
    return page && page->cgroup == level->cgroup ? page : 0;
}

/* Count an incident of the host. Many places do so: to look up a counter in a map, or make it, would be a third of all
 * code. */
static void incident(u32 at)
{
    u64 *n = incidents.lookup(&at);
    if (n) __sync_fetch_and_add(n, 1);
}

static void anomaly(u32 what) { incident(what); }

static void count(u64 cgroup, u32 device, u16 kind, u16 reason)
{
    struct fgpu_counter_key key = {.cgroup = cgroup, .device = device, .kind = kind, .reason = reason};
    u64 zero = 0, *n = counters.lookup(&key);
    if (!n) {
        counters.insert(&key, &zero);
        n = counters.lookup(&key);
    }
    if (n)
        __sync_fetch_and_add(n, 1);
    else
        anomaly(FGPU_ANOMALY_FULL);
}

/* Subtract one, never below 0. Returns how many are left, or -1 if there was none. */
static s64 one_less(u64 *n)
{
    s64 was = __sync_fetch_and_add(n, -1);
    if (was > 0) return was - 1;
    __sync_fetch_and_add(n, 1);
    return -1;
}

/* Subtract. What would go below zero is given back and counted as an anomaly. */
static void subtract(u64 *word, u64 bytes)
{
    u64 was = __sync_fetch_and_add(word, -bytes);
    if (UNLIKELY(was < bytes)) {
        __sync_fetch_and_add(word, bytes - was);
        anomaly(FGPU_ANOMALY_RELEASE);
    }
}

/* Subtract, never below 0. */
static void lower(u64 *word, u64 n)
{
    u64 was = __sync_fetch_and_add(word, -n);
    if (was < n) __sync_fetch_and_add(word, n - was);
}
