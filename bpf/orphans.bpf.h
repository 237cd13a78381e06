/*
 * orphans.bpf.h: bytes that leave a process: released, or orphaned if the device may still hold them.
 *
 * The driver keeps memory as long as a descriptor refers to it: a descriptor of the driver's own file, in a forked
 * child or unread in a socket's queue, or a descriptor of an export. Therefore the bytes that a process held at its
 * exit, and the bytes that it exported and then freed, stay charged to its levels. These bytes are recorded under the
 * process's pid and generation until the agent finds that the device does not hold them.
 */

/* Subtract bytes from a process, at most as many as the process has. Returns how many of the bytes this side had. The
 * rest is on the other side, and the next move settles the rest. */
static u64 take_from_process(struct fgpu_process *p, u64 turn, u32 device, u64 bytes)
{
    u64 *all = &on(p, device)->bytes, was = __sync_fetch_and_add(all, -bytes);
    if (UNLIKELY(was < bytes)) {
        __sync_fetch_and_add(all, bytes - was);
        anomaly(FGPU_ANOMALY_RELEASE);
        bytes = was;
    }
    u64 some = draw(p, turn, device, bytes);
    if (UNLIKELY(some != bytes)) __sync_fetch_and_add(&on(p, device)->owed, bytes - some);
    return some;
}

/* Release bytes, one level after the other. With the pages of all levels at once, each present or absent, the verifier
 * would follow sixteen paths. */
static void release(struct fgpu_process *p, u32 device, u64 bytes)
{
    u64 turn = *(volatile u64 *)&p->turn;
    struct fgpu_level *levels = levels_of(p, turn);
    device &= DEVICE_MASK;
    if (!bytes) return;
    u64 some = take_from_process(p, turn, device, bytes);
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = levels[i].cgroup ? page_at(&levels[i]) : 0;
        if (page) subtract(&page->devices[slot(device)].used, some);
    }
}

/* Create an entry. Returns 0 if the map, or the level's part of the map, is full. */
static struct fgpu_orphan *make_orphan(struct fgpu_process *p, struct fgpu_orphan_key *key)
{
    struct fgpu_level *levels = levels_of(p, key->turn);
    struct fgpu_orphan fresh = {.since_ns = bpf_ktime_get_ns()};
    EACH_LEVEL fresh.levels[i] = levels[i];
    if (!take_orphan_place(&fresh.levels[0])) return 0;
    if (orphans.insert(key, &fresh)) {
        give_orphan_place(&fresh.levels[0]);
    } else {
        count_orphan();
    }
    return orphans.lookup(key);
}

/* Record orphaned bytes in their entry. If the map has no room for an entry, the bytes are orphaned too, and only the
 * level's sum contains them. */
static void record_orphan(struct fgpu_process *p, u32 tgid, u64 turn, u32 device, u64 bytes, int ended)
{
    struct fgpu_orphan_key key = {.tgid = tgid, .device = device, .generation = p->generation, .turn = turn};
    struct fgpu_orphan *known = orphans.lookup(&key);
    if (!known) known = make_orphan(p, &key);
    u64 now = bpf_ktime_get_ns(); /* not before the entry's `since_ns` */
    if (!known) {
        anomaly(FGPU_ANOMALY_FULL);
        return;
    }
    if (!*(volatile u64 *)&known->bytes) known->since_ns = now;
    if (ended) known->ended_ns = now;
    __sync_fetch_and_add(&known->bytes, bytes);
}

static void orphan_at_level(struct fgpu_usage_page *page, u32 device, u64 bytes, u64 now)
{
    __sync_fetch_and_add(&page->orphaned[slot(device)], bytes);
    page->orphaned_ns[slot(device)] = now;
}

/* Orphan bytes of a process that is alive. The entry is written before the pages, and the agent reads in the opposite
 * order, so the agent never counts an entry's bytes as bytes without an entry. */
static void orphan_part(struct fgpu_process *p, u32 tgid, u32 device, u64 bytes)
{
    device &= DEVICE_MASK;
    if (!bytes) return;
    u64 turn = *(volatile u64 *)&p->turn, some = take_from_process(p, turn, device, bytes);
    struct fgpu_level *levels = levels_of(p, turn);
    if (!some) return;
    record_orphan(p, tgid, turn, device, some, 0);
    u64 now = bpf_ktime_get_ns();
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = levels[i].cgroup ? page_at(&levels[i]) : 0;
        if (page) orphan_at_level(page, device, some, now);
    }
    tell_of_orphans(page_at(&levels[0]), device, some);
}

/* Count managed memory that is freed. This memory may have been on the device, and NVML reports no process for the
 * memory. The agent subtracts this count from its estimate of the memory that processes have and NVML does not show. */
static void free_managed(struct fgpu_process *p, u32 device, u64 bytes)
{
    u32 at = device & DEVICE_MASK;
    u64 *n = managed_freed.lookup(&at);
    if (n && bytes) __sync_fetch_and_add(n, bytes);
}

/* Return whether an amount is not 0. The verifier learns nothing about the stored amount: it would follow all code
 * behind a loop over devices for each combination of amounts that are 0. */
static int some_of(struct amounts *a, u32 device, u64 any) { return forget(a->of[device], any) != 0; }

/* Orphan the bytes of one side, in the order of orphan_part(). This function may run twice. The second run then finds
 * bytes that another program has added after the first run. Each level's page is looked up once, because the verifier
 * follows each iteration of a loop over devices. */
static void orphan_side(struct fgpu_process *p, u32 tgid, u64 turn)
{
    struct amounts left;
    struct fgpu_level *levels = levels_of(p, turn);
    u64 any = p->generation, last = 0, bytes_on_last = 0;
    if (!levels->cgroup) return; /* the process has left all levels */
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        s64 bytes = __sync_lock_test_and_set(charged(p, turn, d), 0);
        left.of[d] = forget(bytes & ~(bytes >> 63), any);
        if (!some_of(&left, d, any)) continue;
        record_orphan(p, tgid, turn, d, left.of[d], 1);
        last = forget(d, any);
        bytes_on_last = forget(left.of[d], any);
    }
    if (!bytes_on_last) return;
    u64 now = bpf_ktime_get_ns();
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = levels[i].cgroup ? page_at(&levels[i]) : 0;
        for (u32 d = 0; page && d < FGPU_DEVICES; d++)
            if (some_of(&left, d, any)) orphan_at_level(page, d, left.of[d], now);
    }
    tell_of_orphans(page_at(&levels[0]), last, bytes_on_last);
}

static void orphan_all(struct fgpu_process *p, u32 tgid)
{
    u64 turn = *(volatile u64 *)&p->turn;
    for (u32 d = 0; d < FGPU_DEVICES; d++) free_managed(p, d, __sync_lock_test_and_set(&on(p, d)->managed, 0));
    orphan_side(p, tgid, turn);
    if (turn) orphan_side(p, tgid, turn - 1);
}

/* Release orphaned bytes that the device no longer holds, at most as many as the level has orphaned, because the
 * level's page may have been created since. An entry with 0 bytes stays while its process may add bytes to the entry.
 * The agent deletes such an entry by a call with 0 bytes. */
static int let_go(struct fgpu_orphan_key *key, u64 bytes)
{
    struct fgpu_orphan *known = orphans.lookup(key);
    if (!known) return -3;
    struct fgpu_orphan was = *known;
    u64 left = was.bytes < bytes ? 0 : was.bytes - bytes;
    if (__sync_val_compare_and_swap(&known->bytes, was.bytes, left) != was.bytes) return -11;
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = was.levels[i].cgroup ? page_at(&was.levels[i]) : 0;
        if (!page) continue;
        u64 *orphaned = &page->orphaned[slot(key->device)], has = *(volatile u64 *)orphaned;
        u64 some = was.bytes - left < has ? was.bytes - left : has;
        __sync_fetch_and_add(orphaned, -some);
        subtract(&page->devices[slot(key->device)].used, some);
    }
    if (was.bytes) return 0;
    if (!orphans.delete(key)) give_orphan_place(&was.levels[0]);
    return 0;
}
