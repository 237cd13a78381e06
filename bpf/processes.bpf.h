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

/* The address space of the current task, by the kernel's address of it; 0: this kernel does not say where it is. */
static u64 current_space(void)
{
    u64 space = 0;
#ifdef MM_AT
    bpf_probe_read_kernel(&space, sizeof(space), (void *)bpf_get_current_task() + MM_AT);
#endif
    return space;
}

/* A number that no other living process has: a counter that comes round after 2^30 processes. */
static u32 next_tag(void)
{
    u32 at = HOST_TAGS;
    u64 *n = host.lookup(&at);
    u64 tag = n ? (__sync_fetch_and_add(n, 1) + 1) & FGPU_TAG_BITS : 0;
    return tag ? tag : 1;
}

static void name_process(struct fgpu_process *p, u64 *levels, u32 n)
{
    EACH_LEVEL
    {
        p->levels[i] = levels[i]; /* none is 0 */
        enter_level(&p->sides[i], levels[i]);
    }
    p->level_count = n;
    p->tag = next_tag();
    p->generation = bpf_ktime_get_ns();
    __sync_fetch_and_add(&p->state, 1); /* claimed -> ready; orders the stores before it */
}

/* Makes and names an entry; `force`: whatever part of the map its leaf and its owner have. 0: there is no room, or
 * another thread is naming it, and then `*found` is 1. */
static struct fgpu_process *make_process(u32 tgid, u64 *levels, u32 n, int force, int *found)
{
    struct fgpu_process *p, *blank;
    struct fgpu_level leaf;
    u32 zero = 0;
    blank = blanks.lookup(&zero);
    *found = 1;
    if (!blank) return 0;
    enter_level(&leaf, levels[0]);
    int placed = take_place(&leaf, FGPU_PROCESSES, force);
    if (placed) processes.insert(&tgid, blank);
    p = processes.lookup(&tgid);
    *found = !!p;
    if (!p || !placed || __sync_val_compare_and_swap(&p->state, 0, 1)) {
        if (placed) give_place(&leaf, FGPU_PROCESSES);
        return 0;
    }
    p->counted = leaf;
    name_process(p, levels, n);
    count_entry(HOST_PROCESSES);
    return p;
}

/* From now on this process is charged for all that happens in its address space. */
static void claim_space(struct fgpu_process *p, u32 tgid, u64 space)
{
    if (!space || spaces.update(&space, &tgid)) return;
    p->space = space;
}

/* A process that was made by vfork, or by clone with CLONE_VM, works in the address space of another one, and the
 * memory that it takes is that one's: so that one is charged, and its entry returned. `*tgid` becomes its pid. */
static struct fgpu_process *lender(u32 *tgid, u64 space)
{
    u32 *owner = space ? spaces.lookup(&space) : 0, borrower = *tgid;
    if (!owner || *owner == borrower) return 0;
    u32 whose = *owner;
    struct fgpu_process *p = processes.lookup(&whose);
    if (!p || p->state != READY || p->space != space) return 0;
    borrowers.update(&borrower, &whose);
    *tgid = whose;
    return p;
}

/* The entry that a process is charged to, if there is one; `*tgid` becomes the pid that the entry has. */
static struct fgpu_process *owner_of(u32 *tgid)
{
    struct fgpu_process *p = processes.lookup(tgid);
    u32 *owner = p ? 0 : borrowers.lookup(tgid);
    if (!owner) return p;
    *tgid = *owner;
    return processes.lookup(tgid);
}

/* The entry that the current process is charged to, made when it is managed and has none; 0: unmanaged, or there is no
 * room for it, of its level's part or at all: then `h` has its pages. Of several threads, the one that names it keeps
 * its place. `*tgid` becomes the pid that the entry has. */
static struct fgpu_process *own_process(u32 *tgid, struct held *h)
{
    struct fgpu_process *p = processes.lookup(tgid);
    u64 levels[FGPU_LEVELS] = {}, space;
    u32 n;
    int found;
    if (!UNLIKELY(!p)) {
        if (p->state != READY) return 0;
        if (UNLIKELY(!p->space)) claim_space(p, *tgid, current_space());
        return p;
    }
    n = find_levels(levels);
    if (!n) return 0;
    space = current_space();
    p = lender(tgid, space);
    if (p) return p;
    p = make_process(*tgid, levels, n, 0, &found);
    if (!found) {
        anomaly(FGPU_ANOMALY_FULL);
        EACH_LEVEL h->page[i] = levels[i] ? page_of(levels[i]) : 0;
    }
    if (!p) return 0;
    claim_space(p, *tgid, space);
    tell_of_process(page_of(levels[0]));
    return p;
}

static void give_up(struct fgpu_process *p, u32 tgid, struct fgpu_call *f);
static void leave_unsettled(struct fgpu_process *p, struct fgpu_admission *a);

#define NO_MORE (-1LL << 62) /* however many add to it */

/* Counts a thread in its process's part of the map; 0: there is none left, or the process is gone. */
static int count_thread(struct fgpu_process *p)
{
    if (__sync_fetch_and_add((u64 *)&p->threads, 1) >> 63) return 0;
    if (take_place(&p->counted, FGPU_THREADS, 0)) return 1;
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
    struct fgpu_process *p = owner_of(&tgid);
    if (p && belongs(p, t)) {
        busy(p, t);
        leave_unsettled(p, &t->admission);
        if (t->call.function) give_up(p, tgid, &t->call);
        end(p);
        uncount_thread(p);
    }
    threads.delete(&id);
}

/* Threads that live on, where the process is only out of its cgroups, belong to no process then. */
static void delete_process(u32 tgid, struct fgpu_process *p)
{
    struct fgpu_level level = p->counted;
    u64 space = p->space;
    u32 *owner = space ? spaces.lookup(&space) : 0;
    if (owner && *owner == tgid) spaces.delete(&space);
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

/* Returns whether it had a context: a process without one has no turn. */
static int end_process(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    borrowers.delete(&tgid);
    if (!p) return 0;
    int had_context = has_context(p);
    __sync_fetch_and_add(&p->state, 1); /* not ready: before its bytes are looked at */
    orphan_all(p, tgid);
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
