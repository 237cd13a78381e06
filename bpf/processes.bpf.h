/* processes.bpf.h: the entry of a process, from its first call to its end, and what its threads leave behind. */

/* The managed cgroups of the current task, leaf first. Where there are more, the innermost are left out: who may make
 * cgroups inside a group must not push the group out. */
static u32 find_levels(u64 *levels)
{
    u32 n = 0;
    for (int i = 0; i < DEPTH; i++) {
        u64 id = bpf_get_current_ancestor_cgroup_id(i);
        if (!id || n >= FGPU_LEVELS || !pages.lookup(&id)) continue;
        for (int inner = FGPU_LEVELS - 1; inner; inner--) levels[inner] = levels[inner - 1];
        levels[0] = id;
        n++;
    }
    return n;
}

static void name_process(struct fgpu_process *p, u64 *levels, u32 n)
{
    EACH_LEVEL
    {
        p->levels[i] = levels[i]; /* none is 0 */
        enter_level(&p->sides[i], levels[i]);
    }
    p->level_count = n;
    p->generation = bpf_ktime_get_ns();
    __sync_fetch_and_add(&p->state, 1); /* claimed -> ready; orders the stores before it */
}

/* The entry of the current process, made when it is managed and has none; 0: unmanaged, or there is no room for it, of
 * its level's part or at all: then `h` has its pages. Of several threads, the one that names it keeps its place. */
static struct fgpu_process *own_process(u32 tgid, struct held *h)
{
    struct fgpu_process *p = processes.lookup(&tgid), *blank;
    if (!UNLIKELY(!p)) return p->state == READY ? p : 0;
    u64 levels[FGPU_LEVELS] = {};
    struct fgpu_level leaf;
    u32 zero = 0, n = find_levels(levels);
    if (!n) return 0;
    blank = blanks.lookup(&zero);
    if (!blank) return 0;
    enter_level(&leaf, levels[0]);
    int placed = take_place(&leaf, FGPU_PROCESSES, PART(MOST_PROCESSES));
    if (placed) processes.insert(&tgid, blank);
    p = processes.lookup(&tgid);
    if (!p) {
        anomaly(FGPU_ANOMALY_FULL);
        EACH_LEVEL h->page[i] = levels[i] ? page_of(levels[i]) : 0;
    }
    if (!p || !placed || __sync_val_compare_and_swap(&p->state, 0, 1)) { /* or another thread is naming it */
        if (placed) give_place(&leaf, FGPU_PROCESSES);
        return 0;
    }
    p->counted = leaf;
    name_process(p, levels, n);
    count_processes();
    tell_of_process(page_of(levels[0]));
    return p;
}

/* May be done twice: what the second finds, somebody has added after the first. */
static void release_side(struct fgpu_process *p, u64 side, int now)
{
    struct fgpu_level *levels = levels_of(p, side);
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        s64 bytes = __sync_lock_test_and_set(charged(p, side, d), 0);
        if (bytes <= 0) continue;
        u64 left = p->flags & FGPU_SEEN_EXPORT ? bytes : now ? on(p, d)->exported + on(p, d)->exported_vmm : 0;
        if (left > bytes) left = bytes;
        EACH_LEVEL
        {
            struct fgpu_usage_page *page = levels[i].cgroup ? page_at(&levels[i]) : 0;
            if (!page) continue;
            __sync_fetch_and_add(&page->orphaned[slot(d)], left);
            subtract(&page->devices[slot(d)].used, bytes - left);
        }
        if (left) tell(page_at(&levels[0]), FGPU_NEWS_ORPHANED, d, left, FGPU_MEMORY, 0);
    }
}

static void release_all(struct fgpu_process *p)
{
    release_side(p, p->turn, 1);
    release_side(p, p->turn + 1, 0);
}

static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_call *f);

#define NO_MORE (-1LL << 62) /* however many add to it */

/* Counts a thread in its process's part of the map; 0: there is none left, or the process is gone. */
static int count_thread(struct fgpu_process *p)
{
    if (__sync_fetch_and_add((u64 *)&p->threads, 1) >> 63) return 0;
    if (take_place(&p->counted, FGPU_THREADS, PART(MOST_THREADS))) return 1;
    one_less((u64 *)&p->threads);
    return 0;
}

static void uncount_thread(struct fgpu_process *p)
{
    if (one_less((u64 *)&p->threads) >= 0) give_place(&p->counted, FGPU_THREADS);
}

/* It belongs to this life of the process: one that has left its cgroups and comes back is another. */
static int belongs(struct fgpu_process *p, struct fgpu_thread *t) { return (t->open & ~IDLE) == p->generation; }

/* What a thread leaves behind: an admission that nothing settled, a call that never returned. */
static void end_thread(u64 id)
{
    struct fgpu_thread *t = threads.lookup(&id);
    u32 tgid = id >> 32;
    if (!t) return;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (p && belongs(p, t)) {
        busy(p, t);
        release(p, t->admission.device, t->admission.bytes);
        if (t->call.function) put_back(p, tgid, &t->call);
        end(p);
        uncount_thread(p);
    }
    threads.delete(&id);
}

/* Its threads that live on, where it is only out of its cgroups, are nobody's. */
static void delete_process(u32 tgid, struct fgpu_process *p)
{
    struct fgpu_level level = p->counted;
    s64 n = __sync_lock_test_and_set((u64 *)&p->threads, NO_MORE);
    if (n > 0) give_places(&level, FGPU_THREADS, n);
    if (!processes.delete(&tgid)) give_place(&level, FGPU_PROCESSES);
}

static int has_context(struct fgpu_process *p)
{
    u64 n = 0;
    for (u32 d = 0; d < FGPU_DEVICES; d++) n |= on(p, d)->contexts;
    return n != 0;
}

/* Answers whether it had a context: nobody without one has a turn. */
static int end_process(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p) return 0;
    int had_context = has_context(p);
    __sync_fetch_and_add(&p->state, 1); /* not ready: before its bytes are looked at */
    release_all(p);
    delete_process(tgid, p);
    return had_context;
}

/* Is this the last thread of its process? Never pid == tgid: the leader may leave first. */
static int is_last(struct bpf_raw_tracepoint_args *ctx)
{
#ifdef SIGNAL_AT /* before Linux 6.16: how many are not this far yet, which two at once may both read as none */
    void *signal = 0;
    s32 live = 1;
    bpf_probe_read_kernel(&signal, sizeof(signal), (void *)ctx->args[0] + SIGNAL_AT);
    bpf_probe_read_kernel(&live, sizeof(live), signal + LIVE_AT);
    return !live;
#else
    return !!ctx->args[1]; /* group_dead */
#endif
}

int process_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread(id);
    if (!is_last(ctx)) return 0;
    note_end(id >> 32);
    if (end_process(id >> 32)) tell_of_end(id >> 32);
    return 0;
}

int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread((id >> 32 << 32) | (u32)ctx->args[1]); /* the thread's own number before it became the leader */
    end_process(id >> 32);
    return 0;
}

int program_began(struct bpf_raw_tracepoint_args *ctx)
{
    u64 levels[FGPU_LEVELS] = {};
    (void)ctx;
    if (find_levels(levels)) tell_of_program(page_of(levels[0]));
    return 0;
}
