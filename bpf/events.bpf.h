/* events.bpf.h: events that are rare enough to be sent to the agent at once. Each event is counted by its fate: sent,
 * or lost by reason. */

#define SECOND_SHIFT 30 /* nanoseconds >> 30: units of 1.07 s, called seconds here */
#define EVENTS_A_SECOND 20
#define PROGRAMS_A_SECOND 4
#define KNOCKS_A_SECOND 20
#define CGROUPS_A_SECOND 4000
#define BUDGETED_A_SECOND 3000 /* after this many events of a second, workloads with a budget send none */
#define WORKLOAD_A_SECOND 250  /* the maximum of one workload with a budget */
#define HOST_SECOND 2
#define HOST_COUNT 3
#define HOST_PROCESSES 5
#define HOST_ORPHANED 6
#define HOST_TAGS 7
#define ORPHANS_TOLD_NS 2000000

#define WAKE_UP 2 /* BPF_RB_FORCE_WAKEUP */

static void fate(u32 what) { incident(FGPU_REASONS + what); }

/* Return whether this is one of the first `most` events of a second. If several threads begin a second at the same
 * time, a few more events may pass. */
static int first_ones(u64 *second, u64 *n, u64 most)
{
    u64 now = bpf_ktime_get_ns() >> SECOND_SHIFT;
    if (*second != now) {
        *second = now;
        *n = 0;
    }
    return __sync_fetch_and_add(n, 1) < most;
}

static int spend(u64 *second, u64 *n, u64 most)
{
    if (first_ones(second, n, most)) return 1;
    fate(FGPU_FATE_RATE);
    return 0;
}

static void send(struct fgpu_usage_page *page, u32 kind, u32 device, u64 bytes, u16 operation, u16 reason)
{
    struct fgpu_event event = {.at_ns = bpf_ktime_get_ns(),
                               .kind = kind,
                               .tgid = bpf_get_current_pid_tgid() >> 32,
                               .cgroup = page->cgroup,
                               .bytes = bytes,
                               .device = device,
                               .operation = operation,
                               .reason = reason};
    fate(events.ringbuf_output(&event, sizeof(event), 0) ? FGPU_FATE_FULL : FGPU_FATE_SENT);
}

static void tell(struct fgpu_usage_page *page, u32 kind, u32 device, u64 bytes, u16 operation, u16 reason)
{
    if (page && spend(&page->event_second, &page->event_count, EVENTS_A_SECOND))
        send(page, kind, device, bytes, operation, reason);
}

/* Send an event of a bypass, of a killed process or of a first use. These events have their own budget, which refusals
 * cannot use up. Returns 1 if the event was sent. */
static int tell_urgently(struct fgpu_usage_page *page, u32 kind, u32 device, u64 bytes, u16 operation, u16 reason)
{
    if (!page || !spend(&page->urgent_second, &page->urgent_count, EVENTS_A_SECOND)) return 0;
    send(page, kind, device, bytes, operation, reason);
    return 1;
}

/* Send an event of orphaned bytes, at most one in 2 ms on the whole host. The agent reads NVML repeatedly while orphans
 * are new, so not each orphan needs an event. */
static void tell_of_orphans(struct fgpu_usage_page *page, u32 device, u64 bytes)
{
    u32 at = HOST_ORPHANED;
    u64 now = bpf_ktime_get_ns(), *told = host.lookup(&at);
    if (!page || !told || now - *told < ORPHANS_TOLD_NS) return;
    *told = now;
    send(page, FGPU_NEWS_ORPHANED, device, bytes, FGPU_MEMORY, 0);
}

/* Send an event for the first process of a level in each second. The event reports to the agent that the level is in
 * use. */
static void tell_of_process(struct fgpu_usage_page *page)
{
    u64 now = bpf_ktime_get_ns() >> SECOND_SHIFT;
    if (!page || page->process_second == now) return;
    page->process_second = now;
    tell(page, FGPU_NEWS_PROCESS, 0, 0, 0, 0);
}

/* Send an event of a program that starts: the agent searches its root directory for a libcuda. Only the first few
 * events in a second are sent. Several events may be needed, because a runtime is executed in the host's root before
 * the container's program is executed in the container's root. A program without an event is found later, through
 * NVML. */
static void tell_of_program(struct fgpu_usage_page *page)
{
    if (page && first_ones(&page->exec_second, &page->exec_count, PROGRAMS_A_SECOND))
        send(page, FGPU_NEWS_EXECUTED, 0, 0, 0, 0);
}

/* Count an entry after it was created. A reader reads this number before the map. If the number has changed afterwards,
 * the reader reads the map again. */
static void count_entry(u32 at)
{
    u64 *n = host.lookup(&at);
    if (n) __sync_fetch_and_add(n, 1);
}

static void count_orphan(void)
{
    u32 at = 0;
    u64 *n = orphans_made.lookup(&at);
    if (n) __sync_fetch_and_add(n, 1);
}

/* Record the exit of a process, for a gatekeeper on a kernel that identifies peers by pid alone. */
static void note_end(u32 tgid)
{
#if ENDS
    u32 at = tgid & (FGPU_ENDS - 1);
    u64 now = bpf_ktime_get_ns();
    ends.update(&at, &now);
#endif
}

/* Report the exit of a process to the gatekeeper, so that its turn ends at once. If the ring buffer `bell` is full, the
 * process's pidfd reports the exit, after the driver has cleaned up. */
static void tell_of_end(u32 tgid)
{
    struct fgpu_event event = {.at_ns = bpf_ktime_get_ns(), .kind = FGPU_NEWS_ENDED, .tgid = tgid};
    bell.ringbuf_output(&event, sizeof(event), WAKE_UP);
}

/* Report to the gatekeeper that a process may not connect to its socket. Only the first few knocks of a bound owner in
 * a second are reported. All processes and levels without an owner together count as one owner (slot 0). The shim of a
 * process that was not reported knocks again. */
static void tell_of_knock(struct fgpu_usage_page *page, u32 tgid, u32 descriptor)
{
    u32 at = page ? page->owner : 0;
    struct fgpu_owner *owner = owners.lookup(&at);
    if (!owner || !first_ones(&owner->knock_second, &owner->knock_count, KNOCKS_A_SECOND)) return;
    struct fgpu_event event = {
        .at_ns = bpf_ktime_get_ns(), .kind = FGPU_NEWS_KNOCK, .tgid = tgid, .device = descriptor, .bytes = at};
    bell.ringbuf_output(&event, sizeof(event), WAKE_UP);
}

/* -- cgroups: raw tracepoints with (cgroup, path, …). The programs read no struct of the kernel; the agent finds the
 * processes */

/* Return the budget of the workload that contains a cgroup. The workload is the shortest beginning of the cgroup's path
 * that has a budget; beginnings are compared by their FNV-1a hash. 0: no budget. is_outside: the cgroup is not in the
 * agent's cgroup namespace, so the agent does not need the event. */
static struct fgpu_event_budget *budget_of(const char *path, u64 *is_outside)
{
    u64 name = FGPU_FNV_BASIS, root_at = FGPU_BUDGET_ROOT, any = bpf_ktime_get_ns();
    struct fgpu_event_budget *root = event_budgets.lookup(&root_at);
    u64 has_root = forget(root != 0, any), root_name = forget(root ? root->second : 0, any);
    *is_outside = has_root;
    _Pragma("clang loop unroll(disable)") for (u32 i = 0; i < FGPU_PATH; i++)
    {
        u8 letter = path[i];
        if (i && (!letter || letter == '/')) {
            if (has_root && root_name == name) *is_outside = 0;
            *is_outside = forget(*is_outside, any);
            struct fgpu_event_budget *budget = event_budgets.lookup(&name);
            if (budget) return budget;
        }
        if (!letter) break;
        name = (name ^ letter) * FGPU_FNV_PRIME;
    }
    return 0;
}

/* Count a lost event. The agent then lists the workload's cgroups again, or all cgroups of the host if the workload has
 * no budget. */
static void count_lost(struct fgpu_event_budget *budget)
{
    u64 others = FGPU_BUDGET_OTHERS;
    if (!budget) budget = event_budgets.lookup(&others);
    if (budget) __sync_fetch_and_add(&budget->lost, 1);
}

static int may_tell(struct fgpu_event_budget *budget)
{
    u32 second_at = HOST_SECOND, count_at = HOST_COUNT;
    u64 *second = host.lookup(&second_at), *n = host.lookup(&count_at);
    if (!second || !n) return 0;
    if (budget && !first_ones(&budget->second, &budget->count, WORKLOAD_A_SECOND)) return 0;
    if (first_ones(second, n, budget ? BUDGETED_A_SECOND : CGROUPS_A_SECOND)) return 1;
    if (budget) one_less(n); /* the rest of this second's events are for other workloads */
    return 0;
}

static int tell_path(struct bpf_raw_tracepoint_args *ctx, u32 kind)
{
    struct fgpu_cgroup_event told = {.event = {.at_ns = bpf_ktime_get_ns(), .kind = kind}};
    bpf_probe_read_kernel_str(told.path, sizeof(told.path), (void *)ctx->args[1]);
    u64 is_outside;
    struct fgpu_event_budget *budget = budget_of(told.path, &is_outside);
    if (is_outside) return 0;
    if (!may_tell(budget)) {
        fate(FGPU_FATE_RATE);
        count_lost(budget);
        return 0;
    }
    fate(events.ringbuf_output(&told, sizeof(told), 0) ? FGPU_FATE_FULL : FGPU_FATE_SENT);
    return 0;
}

int cgroup_attach(struct bpf_raw_tracepoint_args *ctx) { return tell_path(ctx, FGPU_NEWS_MOVED); }

int cgroup_made(struct bpf_raw_tracepoint_args *ctx) { return tell_path(ctx, FGPU_NEWS_MADE); }

int cgroup_removed(struct bpf_raw_tracepoint_args *ctx) { return tell_path(ctx, FGPU_NEWS_REMOVED); }

int cgroup_populated(struct bpf_raw_tracepoint_args *ctx)
{
    return (u32)ctx->args[2] ? 0 : tell_path(ctx, FGPU_NEWS_EMPTIED);
}
