/* maps.bpf.h: the maps, which are pinned by their names, and helpers that all other parts use. */

#define VERDICT_MASK (FGPU_VERDICTS - 1)
#define DEVICE_MASK (FGPU_DEVICES - 1)
#define TICKET_MASK ((1ULL << 62) - 1)
#define DEPTH 16 /* cgroups that are searched for levels: the root, and 15 cgroups on the path of the task */
#define TRIES 8
#define MOST_ALLOCATIONS (SPARSE ? 1048576 : 262144) /* without SPARSE, all entries are allocated at once */
#define MOST_THREADS 65536
#define MOST_PROCESSES 16384
#define MOST_PIDS (1 << 22) /* PID_MAX_LIMIT of 64-bit kernels */
#define MOST_ORPHANS 65536
#define MOST_BORROWERS 4096
#define MOST_PARKED 4096
#define PART(most) ((most) / 4)                       /* of a shared map: the maximum of one level */
#define RESERVE(most) ((most) / 8)                    /* of a shared map: reserved for owners with few entries */
#define FEW(most) ((most) < 1024 ? 1 : (most) / 1024) /* of a shared map: the number that an owner claims at a time */
#define SPAN 32                                       /* mappings that one run releases, of a long unmap */
#define READY 2
#define SIGKILL 9
#define EVENT_BYTES (1 << 20)
#define BELL_BYTES (1 << 16)                         /* one page of memory, on every architecture */
#define UNLIKELY(what) __builtin_expect(!!(what), 0) /* the compiler moves this branch out of the common path */
#define IDLE (1ULL << 63)                            /* in the same word as the generation that a thread belongs to */

BPF_PROG_ARRAY(again, 1); /* the program call_return, which calls itself again during a long unmap */
BPF_F_TABLE("array", u32, struct fgpu_usage_page, page_template, 1, 1U << 10 /* BPF_F_MMAPABLE */);
BPF_TABLE("hash_of_maps$page_template", u64, int, pages, 4096);
BPF_TABLE("array_of_maps$page_template", u32, int, shelf, 4096); /* the same pages, by their index (`place`) */
BPF_F_TABLE("hash", u64, u32, resolved, 16384, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_limit, limits, 65536, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_share, shares, 65536, SPARSE);
BPF_F_TABLE("hash", struct fgpu_level_device, struct fgpu_turn, turns, 65536, SPARSE);
/* Nanoseconds for which processes of a level ran on a device, according to NVML. The number only grows. */
BPF_F_TABLE("hash", struct fgpu_level_device, u64, ran, 65536, SPARSE);
BPF_F_TABLE("hash", u32, struct fgpu_process, processes, MOST_PROCESSES, SPARSE);
BPF_F_TABLE("hash", struct fgpu_allocation_key, struct fgpu_allocation, allocations, MOST_ALLOCATIONS, SPARSE);
BPF_F_TABLE("hash", u64, struct fgpu_thread, threads, MOST_THREADS, SPARSE);
BPF_F_TABLE("hash", struct fgpu_orphan_key, struct fgpu_orphan, orphans, MOST_ORPHANS, SPARSE);
BPF_TABLE("array", u32, u64, orphans_made, 1);                 /* entries of `orphans` so far */
BPF_F_TABLE("hash", u64, u32, spaces, MOST_PROCESSES, SPARSE); /* address space -> its process */
/* Processes that use the address space of another process (vfork). The other process is charged for the calls of such
 * processes. */
BPF_F_TABLE("hash", u32, u32, borrowers, MOST_BORROWERS, SPARSE);
BPF_TABLE("array", u32, struct fgpu_owner, owners, FGPU_OWNERS);
/* How many entries each map of enum fgpu_shared can have. The loader writes these numbers: a pinned map may have been
 * created by an older version, with fewer entries. */
BPF_TABLE("array", u32, u64, sizes, FGPU_SHARED);
BPF_TABLE("array", u32, u64, managed_freed, FGPU_DEVICES); /* bytes of managed memory that were freed so far */
BPF_TABLE("array", u32, u64, contexts, FGPU_DEVICES);
BPF_TABLE("array", u32, struct fgpu_device, devices, FGPU_DEVICES);
BPF_F_TABLE("hash", struct fgpu_file, u32, files, 4096, SPARSE);
/* 0: epoch, 1: flags for control pages, 2, 3: events of cgroups, 4: epoch of shares, 5: processes so far, 6: when the
 * last event of orphans was sent to the agent, 7: tags so far. The last slot is unused. The form of a pinned map must
 * not change, so a new value gets its own map. */
BPF_TABLE("array", u32, u64, host, 9);
BPF_F_TABLE("hash", u64, struct fgpu_event_budget, event_budgets, FGPU_EVENT_BUDGETS, SPARSE);
BPF_F_TABLE("hash", struct fgpu_counter_key, u64, counters, 65536, SPARSE);
BPF_TABLE("array", u32, u64, incidents, 2 * FGPU_REASONS);
BPF_TABLE("percpu_array", u32, u64, hits, FGPU_HITS);
BPF_TABLE("array", u32, u64, announcements, MOST_PIDS / 64); /* a bit for each pid, see FGPU_ANNOUNCE */
BPF_F_TABLE("hash", u32, u32, node_majors, 64, SPARSE);      /* of the device nodes of the driver */
BPF_F_TABLE("hash", struct fgpu_parked_key, struct fgpu_parked, parked, MOST_PARKED, SPARSE);
#if ENDS /* when a process with this pid, or with another pid that has the same index, last exited */
BPF_TABLE("array", u32, u64, ends, FGPU_ENDS);
#endif
BPF_RINGBUF_OUTPUT(events, EVENT_BYTES / PAGE_SIZE);
BPF_RINGBUF_OUTPUT(bell, BELL_BYTES / PAGE_SIZE); /* the kernel wakes the gatekeeper through this ring buffer */
/* A blank entry, which is never written: struct fgpu_process is too large for the stack. */
BPF_ARRAY(blanks, struct fgpu_process, 1);

/* Return a device as an index that the verifier accepts. The device is masked at each use, because the compiler may
 * keep the unmasked number. */
static u64 slot(u64 device)
{
    __asm__ volatile("" : "+r"(device));
    device &= DEVICE_MASK;
    return device;
}

/* Return `value`, and make the verifier discard all bounds of this value. The verifier then follows the code after this
 * call once, and not once for each possible value. The number `any` must also be unknown to the verifier. */
static u64 forget(u64 value, u64 any)
{
    value ^= any;
    __asm__ volatile("" : "+r"(value));
    return value ^ any;
}

/* Make the kernel give each run of the program a stack of its own. From version 6.13 on, Linux gives a large program
 * one stack for each processor, unless the program contains a tail call. A program at a uprobe can be preempted, and
 * the next program on that processor would overwrite its pointers. The kernel searches for this call when it loads the
 * program. The call is never executed. */
static void own_stack(struct pt_regs *ctx)
{
    u64 ever = 0;
    __asm__ volatile("" : "+r"(ever));
    if (ever) again.call(ctx, 0);
}

/* Return 1 or 0. The compiler cannot turn the result into a branch. */
static u64 differs(u64 a, u64 b)
{
    u64 bits = a ^ b;
    bits |= -bits;
    __asm__ volatile("" : "+r"(bits));
    return bits >> 63;
}

static void hit(u32 probe)
{
    u64 *n = hits.lookup(&probe);
    if (n) __sync_fetch_and_add(n, 1); /* a counter of this processor, but another program may run in between */
}

static struct fgpu_usage_page *page_of(u64 cgroup)
{
    void *inner = pages.lookup(&cgroup);
    u32 zero = 0;
    return inner ? bpf_map_lookup_elem(inner, &zero) : 0;
}

/* Return a level's page without a search, by the index that its page had when the process entered the level. A removed
 * page has no cgroup id. */
static struct fgpu_usage_page *page_at(struct fgpu_level *level)
{
    u32 place = level->place, zero = 0;
    void *inner = shelf.lookup(&place);
    struct fgpu_usage_page *page = inner ? bpf_map_lookup_elem(inner, &zero) : 0;
    return page && page->cgroup == level->cgroup ? page : 0;
}

/* Count an incident of the host. Many functions call this function, and inline code for a lookup or a new map entry
 * would be a third of all code. */
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

/* Subtract. If the result is below zero, add the difference again and count an anomaly. */
static void subtract(u64 *word, u64 bytes)
{
    u64 was = __sync_fetch_and_add(word, -bytes);
    if (UNLIKELY(was < bytes)) {
        __sync_fetch_and_add(word, bytes - was);
        anomaly(FGPU_ANOMALY_RELEASE);
    }
}

/* Subtract, never below 0. Returns the number before, at least 0. Two threads may subtract at the same time: each adds
 * again only what it has subtracted below 0. */
static s64 lower(u64 *word, s64 n)
{
    s64 was = __sync_fetch_and_add(word, -n);
    was &= ~(was >> 63);
    if (UNLIKELY(was < n)) __sync_fetch_and_add(word, n - was);
    return was;
}

/* Subtract one, never below 0. Returns the remaining number, or -1 if the number was 0 already. */
static s64 one_less(u64 *n) { return lower(n, 1) - 1; }
