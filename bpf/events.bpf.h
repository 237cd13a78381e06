/* events.bpf.h: what is rare enough to tell the agent at once. Seen = sent + lost, by counters. */

#define SECOND_SHIFT 30 /* nanoseconds >> 30: a second, nearly */
#define EVENTS_A_SECOND 20
#define PROGRAMS_A_SECOND 4
#define CGROUPS_A_SECOND 4000
#define HOST_SECOND 2
#define HOST_COUNT 3
#define HOST_PROCESSES 5
#define HOST_ORPHANED 6
#define HOST_TAGS 7
#define HOST_ORPHANS 8
#define ORPHANS_TOLD_NS 2000000

#define WAKE_UP 2 /* BPF_RB_FORCE_WAKEUP */

static void fate(u32 what) { incident(FGPU_REASONS + what); }

/* One of the first `most` of a second. Threads that begin one at once may let a few more through. */
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

/* Of a bypass, or of a process that is killed: with a budget of its own, so that refusals cannot use it up. Returns 1
 * where it was sent. */
static int tell_urgently(struct fgpu_usage_page *page, u32 kind, u32 device, u64 bytes, u16 operation, u16 reason)
{
    if (!page || !spend(&page->urgent_second, &page->urgent_count, EVENTS_A_SECOND)) return 0;
    send(page, kind, device, bytes, operation, reason);
    return 1;
}

/* The agent looks at NVML again and again while orphans are new, so it needs to be told of the first ones only. */
static void tell_of_orphans(struct fgpu_usage_page *page, u32 device, u64 bytes)
{
    u32 at = HOST_ORPHANED;
    u64 now = bpf_ktime_get_ns(), *told = host.lookup(&at);
    if (!page || !told || now - *told < ORPHANS_TOLD_NS) return;
    *told = now;
    send(page, FGPU_NEWS_ORPHANED, device, bytes, FGPU_MEMORY, 0);
}

/* The agent wants to know that somebody of the level is there: once, when many come at a time. */
static void tell_of_process(struct fgpu_usage_page *page)
{
    u64 now = bpf_ktime_get_ns() >> SECOND_SHIFT;
    if (!page || page->process_second == now) return;
    page->process_second = now;
    tell(page, FGPU_NEWS_PROCESS, 0, 0, 0, 0);
}

/* The agent looks for a libcuda in the root of who begins here. Told are the first few: a runtime is executed in the
 * host's root before the container's program is in its own. Whoever is left out is no loss: NVML shows them. */
static void tell_of_program(struct fgpu_usage_page *page)
{
    if (page && first_ones(&page->exec_second, &page->exec_count, PROGRAMS_A_SECOND))
        send(page, FGPU_NEWS_EXECUTED, 0, 0, 0, 0);
}

/* After each new entry of a map: a reader of this number, and then of the map, knows when to read the map again. */
static void count_entry(u32 at)
{
    u64 *n = host.lookup(&at);
    if (n) __sync_fetch_and_add(n, 1);
}

/* For a gatekeeper whose kernel knows its peers by pid alone. */
static void note_end(u32 tgid)
{
#if ENDS
    u32 at = tgid & (FGPU_ENDS - 1);
    u64 now = bpf_ktime_get_ns();
    ends.update(&at, &now);
#endif
}

/* The gatekeeper ends its turn at once. Where the bell is full its pidfd tells the same, once the driver has cleaned up
 * after it. */
static void tell_of_end(u32 tgid)
{
    struct fgpu_event event = {.at_ns = bpf_ktime_get_ns(), .kind = FGPU_NEWS_ENDED, .tgid = tgid};
    bell.ringbuf_output(&event, sizeof(event), WAKE_UP);
}

/* -- cgroups: raw tracepoints with (cgroup, path, …); nothing of the kernel's structs is read, the agent looks who is
 * there */

static int tell_path(struct bpf_raw_tracepoint_args *ctx, u32 kind)
{
    u32 second_at = HOST_SECOND, count_at = HOST_COUNT;
    u64 *second = host.lookup(&second_at), *n = host.lookup(&count_at);
    if (!second || !n || !spend(second, n, CGROUPS_A_SECOND)) return 0;
    struct fgpu_cgroup_event told = {.event = {.at_ns = bpf_ktime_get_ns(), .kind = kind}};
    bpf_probe_read_kernel_str(told.path, sizeof(told.path), (void *)ctx->args[1]);
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
