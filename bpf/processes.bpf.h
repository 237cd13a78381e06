/* processes.bpf.h: the entry of a process, and the entries of its threads. */

/* Find the managed cgroups of the current task, innermost first. If there are too many, the innermost cgroups are left
 * out: a user that may create cgroups inside a group must not be able to displace the group. */
static u32 find_levels(u64 *levels)
{
    u64 any = bpf_get_current_pid_tgid(); /* the verifier follows one state, whichever levels are found */
    u32 n = forget(0, any);
    EACH_LEVEL levels[i] = forget(0, any);
    for (int i = 0; i < DEPTH; i++) {
        u64 id = bpf_get_current_ancestor_cgroup_id(i);
        if (!id || n >= FGPU_LEVELS || !pages.lookup(&id)) continue;
        for (int inner = FGPU_LEVELS - 1; inner; inner--) levels[inner] = levels[inner - 1];
        levels[0] = id;
        n = forget(n + 1, id);
        EACH_LEVEL levels[i] = forget(levels[i], id);
    }
    return n;
}

/* Return the address space of the current task, as its address in the kernel; 0: this kernel does not report it. */
static u64 current_space(void)
{
    u64 space = 0;
#ifdef MM_AT
    bpf_probe_read_kernel(&space, sizeof(space), (void *)bpf_get_current_task() + MM_AT);
#endif
    return space;
}

static u64 *announcements_near(u32 tgid)
{
    u32 at = tgid / 64;
    return announcements.lookup(&at);
}

/* Record that this process executes the published shim, even if the process has no levels, because it may get levels
 * later. Each pid has its own bit, so no process can use up the room of another. */
static void announce(u32 tgid)
{
    u64 *bits = announcements_near(tgid);
    if (bits) __sync_fetch_and_or(bits, 1ULL << tgid % 64);
}

/* Clear the record of a process that exits or executes another program. */
static void end_announcement(u32 tgid)
{
    u64 *bits = announcements_near(tgid);
    if (bits) __sync_fetch_and_and(bits, ~(1ULL << tgid % 64));
}

static int has_announced(u32 tgid)
{
    u64 *bits = announcements_near(tgid);
    return bits && *bits >> tgid % 64 & 1;
}

/* Return a number that no other living process has: a counter that starts again after 2^30 processes. */
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
        p->levels[i] = levels[i]; /* 0: no level */
        enter_level(&p->sides[i], levels[i]);
    }
    p->level_count = n;
    p->tag = next_tag();
    p->generation = bpf_ktime_get_ns();
    __sync_fetch_and_add(&p->state, 1); /* claimed -> ready; orders the stores before it */
}

/* Create an entry and set its identity. `force`: create the entry even if its level and its owner have reached their
 * bounds. Returns 0 if the map has no room, or if another thread is creating the entry. In the latter case `*found` is
 * 1. */
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

/* From now on, charge this process for all calls in its address space. */
static void claim_space(struct fgpu_process *p, u32 tgid, u64 space)
{
    if (!space || spaces.update(&space, &tgid)) return;
    p->space = space;
}

/* Find the process whose address space this process uses. A process that was created by vfork, or by clone with
 * CLONE_VM, runs in the address space of another process and allocates memory for it. Therefore the other process is
 * charged, and its entry is returned. `*tgid` becomes the pid of the other process. If the map has no room for this
 * process, the result is 0, and `*full` becomes 1. */
static struct fgpu_process *lender(u32 *tgid, u64 space, int *full)
{
    u32 *owner = space ? spaces.lookup(&space) : 0, borrower = *tgid;
    *full = 0;
    if (!owner || *owner == borrower) return 0;
    u32 whose = *owner;
    struct fgpu_process *p = processes.lookup(&whose);
    if (!p || p->state != READY || p->space != space) return 0;
    *full = !!borrowers.update(&borrower, &whose);
    if (*full) return 0;
    *tgid = whose;
    return p;
}

/* Return the entry that a process is charged to, or 0 without an entry; `*tgid` becomes the pid of that entry. A
 * process in the address space of another process may have an entry from its registration. */
static struct fgpu_process *owner_of(u32 *tgid)
{
    struct fgpu_process *p = processes.lookup(tgid);
    u32 *owner = p && p->space ? 0 : borrowers.lookup(tgid);
    if (!owner) return p;
    *tgid = *owner;
    return processes.lookup(tgid);
}

/* Return the entry that the current process is charged to. Create the entry if the process is managed and has no entry.
 * Returns 0 if the process is unmanaged, or if a map or the level's part has no room for the process. In the second
 * case `h` has the pages of the process. If several threads call this function at the same time, one thread creates and
 * counts the entry. `*tgid` becomes the pid of that entry. */
static struct fgpu_process *own_process(u32 *tgid, struct held *h)
{
    struct fgpu_process *p = processes.lookup(tgid), *other;
    u64 levels[FGPU_LEVELS] = {}, space;
    u32 n;
    int found = 0, full;
    if (!UNLIKELY(!p)) {
        if (p->state != READY) return 0;
        if (!UNLIKELY(!p->space)) return p;
    }
    space = current_space();
    other = lender(tgid, space, &full);
    if (other) return other;
    if (!p || full) {
        n = find_levels(levels);
        if (!n) return 0;
        p = full ? 0 : make_process(*tgid, levels, n, 0, &found);
        if (!found) {
            anomaly(FGPU_ANOMALY_FULL);
            EACH_LEVEL h->page[i] = levels[i] ? page_of(levels[i]) : 0;
        }
        if (!p) return 0;
        tell_of_process(page_of(levels[0]));
    }
    claim_space(p, *tgid, space);
    return p;
}

#define NO_MORE (-1LL << 62) /* stays below 0, however many threads add to this number */

/* Count a thread in its process's part of the map. Returns 0 if the part is used up, or the process has exited. */
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

/* Return whether a thread belongs to this generation of the process: a process that has left its cgroups and returns
 * has a new generation. */
static int belongs(struct fgpu_process *p, struct fgpu_thread *t) { return (t->open & ~IDLE) == p->generation; }

/* Return the entry of the current thread. Create the entry if the thread has no entry in this generation of its
 * process. Returns 0 if the map or the level's part has no room for the entry. */
static struct fgpu_thread *own_thread(struct fgpu_process *p, u64 id)
{
    struct fgpu_thread *t = threads.lookup(&id);
    if (!UNLIKELY(!t || (t->open && !belongs(p, t)))) return t;
    struct fgpu_thread none = {.open = p->generation | IDLE};
    if (count_thread(p)) {
        int failed = threads.update(&id, &none);
        if (!failed) return threads.lookup(&id);
        uncount_thread(p);
    }
    anomaly(FGPU_ANOMALY_FULL);
    return 0;
}

/* Delete the entry of a process. If the process has only left its cgroups, its threads continue, without an entry of a
 * process. */
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
