/* adjust.bpf.h: changes that the agent makes, by BPF_PROG_TEST_RUN. */

static int publish(u64 cgroup, u64 flags)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    if (!page) return -2;
    page->version = FGPU_LAYOUT;
    page->cgroup = cgroup;
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        struct fgpu_level_device key = {.cgroup = cgroup, .device = d};
        struct fgpu_limit *limit = limits.lookup(&key);
        *(volatile u64 *)&page->devices[d].limit = limit ? limit->bytes : 0;
        page->outside[d] = limit ? (limit->flags >> FGPU_OUTSIDE_SHIFT) << 20 : 0;
        if (limit) flags |= (u32)limit->flags;
    }
    page->flags = flags;
    return 0;
}

/* Remove the cgroup id from a page: a process that still has the page's index then finds that the page no longer
 * belongs to the process's level. */
static int withdraw(u64 cgroup)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    if (!page) return -2;
    *(volatile u64 *)&page->cgroup = 0;
    return 0;
}

static void enter_overhead(struct fgpu_process *p, u32 device, s64 more)
{
    struct held h;
    device &= DEVICE_MASK;
    look_up(p, &h);
    begin(p);
    if (more > 0) charge(p, &h, device, more, 1);
    if (more < 0) release(p, device, -more);
    add_overhead(p, device, more);
    end(p);
}

/* Compute by how many bytes the overhead changes. FGPU_RAISE: by the given number, whatever has changed. FGPU_OVERHEAD:
 * to the given number, or -EAGAIN if another change has begun since the agent read the process. */
static int overhead_changes(struct fgpu_process *p, struct bpf_raw_tracepoint_args *ctx, s64 *more)
{
    *more = ctx->args[4];
    if (ctx->args[0] == FGPU_RAISE) return 0;
    *more -= on(p, ctx->args[3])->overhead;
    return p->begun != ctx->args[5] || p->changes != ctx->args[5] ? -11 : 0;
}

/* Correct whether a context counts whose creation was not recorded. The overhead is corrected by the same reading of
 * NVML, so no bytes change here. */
static int correct_contexts(struct fgpu_process *p, struct bpf_raw_tracepoint_args *ctx)
{
    u32 device = ctx->args[3] & DEVICE_MASK;
    if (p->begun != ctx->args[4] || p->changes != ctx->args[4]) return -11;
    if (ctx->args[0] == FGPU_CONTEXT_SEEN)
        count_unseen(p, device);
    else if (withdraw_note(p, unseen_on(device)))
        one_less(&on(p, device)->contexts);
    return 0;
}

#define STRAGGLER_NS 50000000 /* no program that read a side before a move runs longer */
static int has_stragglers(u64 moved_ns, u64 now) { return now < moved_ns + STRAGGLER_NS; }

struct cgroups {
    u64 of[FGPU_LEVELS];
};

/* Find the levels of one side that are not on the other side. The code has no branch, because the verifier would follow
 * each comparison both ways. */
static void find_own(struct fgpu_process *p, u64 side, struct cgroups *found)
{
    struct fgpu_level *own = levels_of(p, side), *other = levels_of(p, side + 1);
    EACH_LEVEL
    {
        u64 apart = 1;
        _Pragma("unroll") for (int j = 0; j < FGPU_LEVELS; j++) apart &= differs(own[i].cgroup, other[j].cgroup);
        found->of[i] = own[i].cgroup & -apart;
    }
}

/* Charge or release, whatever the limit: the bytes to be moved are allocated already. */
static void alter_levels(struct cgroups *levels, u32 device, s64 bytes)
{
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = page_of(levels->of[i]);
        if (!page) continue;
        struct fgpu_usage *usage = &page->devices[slot(device)];
        u64 now = __sync_fetch_and_add(&usage->used, bytes) + bytes;
        if (now > usage->peak) usage->peak = now;
    }
}

/* Move the remaining bytes of a side to the other side, which has `before` of these bytes already. Levels that are on
 * both sides keep their charge. */
static void shift(struct fgpu_process *p, u64 from, struct cgroups *left, struct cgroups *entered, u32 device,
                  s64 before)
{
    s64 bytes = __sync_lock_test_and_set(charged(p, from, device), 0);
    alter_levels(entered, device, bytes - before);
    __sync_fetch_and_add(charged(p, from + 1, device), bytes - before);
    alter_levels(left, device, -bytes);
}

/* Move bytes that were charged or released on the old side after the last move. */
static void shift_stragglers(struct fgpu_process *p)
{
    u64 turn = p->turn, keeps = p->flags & FGPU_PARKED ? ~0ULL : 0;
    struct fgpu_level *levels = levels_of(p, turn);
    struct cgroups left, entered, all;
    find_own(p, turn + 1, &left);
    find_own(p, turn, &entered);
    EACH_LEVEL all.of[i] = levels[i].cgroup;
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        shift(p, turn + 1, &left, &entered, d, 0);
        u64 owed = __sync_lock_test_and_set(&on(p, d)->owed, 0), some = draw(p, turn, d, owed);
        alter_levels(&all, d, -some);
        __sync_fetch_and_add(&on(p, d)->owed, (owed - some) & keeps); /* `charged` lacks the parked bytes */
    }
}

/* Charge the other side before it becomes current, so that no thread can release from an uncharged side. */
static void turn_over(struct fgpu_process *p, struct bpf_raw_tracepoint_args *ctx)
{
    u64 turn = p->turn;
    struct amounts before;
    struct cgroups left, entered;
    struct fgpu_level *next = levels_of(p, turn + 1);
    EACH_LEVEL
    {
        p->levels[i] = ctx->args[4 + i];
        enter_level(&next[i], ctx->args[4 + i]);
    }
    p->level_count = ctx->args[3];
    find_own(p, turn, &left);
    find_own(p, turn + 1, &entered);
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        s64 bytes = *(volatile s64 *)charged(p, turn, d);
        before.of[d] = forget(bytes & ~(bytes >> 63), p->generation); /* at least 0 */
        alter_levels(&entered, d, before.of[d]);
        __sync_fetch_and_add(charged(p, turn + 1, d), before.of[d]);
    }
    p->moved_ns = bpf_ktime_get_ns();
    __sync_fetch_and_add(&p->turn, 1);
    for (u32 d = 0; d < FGPU_DEVICES; d++) shift(p, turn, &left, &entered, d, before.of[d]);
}

static int moves(struct bpf_raw_tracepoint_args *ctx)
{
    return ctx->args[0] == FGPU_MOVE || ctx->args[0] == FGPU_FINISH_MOVE;
}

static int stays(struct fgpu_process *p, struct bpf_raw_tracepoint_args *ctx)
{
    u64 other = 0;
    if (ctx->args[0] == FGPU_FINISH_MOVE) return 1;
    struct fgpu_level *own = levels_of(p, p->turn);
    EACH_LEVEL other |= own[i].cgroup ^ ctx->args[4 + i];
    return !other;
}

/* Enter the same levels again, because one of their pages may have been removed and created again. */
static int look_again(struct fgpu_process *p)
{
    struct fgpu_level *own = levels_of(p, p->turn);
    EACH_LEVEL enter_level(&own[i], own[i].cgroup);
    return 0;
}

static int move(struct fgpu_process *p, struct bpf_raw_tracepoint_args *ctx)
{
    shift_stragglers(p);
    if (stays(p, ctx)) return look_again(p);
    if (has_stragglers(p->moved_ns, bpf_ktime_get_ns())) return -11;
    turn_over(p, ctx);
    return 0;
}

/* Create an entry for a process in which no probe has run yet. With `force`, for a process that holds memory according
 * to NVML, the entry is created even if its level has reached its bound. */
static int adopt(u32 tgid, struct bpf_raw_tracepoint_args *ctx, int force)
{
    u64 levels[FGPU_LEVELS] = {ctx->args[4], ctx->args[5], ctx->args[6], ctx->args[7]};
    int found;
    if (make_process(tgid, levels, ctx->args[3], force, &found)) return 0;
    return found ? -11 : -7;
}

/* Create the entry of a process before its first request: the entry has the process's tag, which the gatekeeper writes
 * to the control page. */
static int enter_process(struct bpf_raw_tracepoint_args *ctx, u32 tgid)
{
    return processes.lookup(&tgid) ? 0 : adopt(tgid, ctx, 0);
}

/* Adjust a process. The process may exit meanwhile, and no program would release bytes that are recorded after the
 * exit. Therefore the state of the process is read last. A process that has left all levels keeps its entry until no
 * program can charge its former levels any longer: after the deletion, no program would release such a charge. */
static int adjust_process(struct bpf_raw_tracepoint_args *ctx, u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    u64 now = bpf_ktime_get_ns();
    int done = 0;
    if (!p) return ctx->args[0] == FGPU_MOVE && !ctx->args[2] ? adopt(tgid, ctx, 1) : -3;
    if (p->generation != ctx->args[2]) return -3;
    if (ctx->args[0] == FGPU_REAP) __sync_fetch_and_add(&p->state, 1);
    if (ctx->args[0] == FGPU_OVERHEAD || ctx->args[0] == FGPU_RAISE) {
        s64 more;
        done = overhead_changes(p, ctx, &more);
        if (!done) enter_overhead(p, ctx->args[3], more);
    }
    if (moves(ctx)) done = UNLIKELY(p->flags & FGPU_PARKED) && !stays(p, ctx) ? -16 : move(p, ctx);
    if (ctx->args[0] == FGPU_BEGIN_PARK) done = begin_park(p, tgid);
    if (ctx->args[0] == FGPU_PARK) done = park(p, tgid, ctx->args[3]);
    if (ctx->args[0] == FGPU_WAKE) done = wake(p, tgid, ctx->args[3], ctx->args[4]);
    if (ctx->args[0] == FGPU_CONTEXT_SEEN || ctx->args[0] == FGPU_CONTEXT_GONE) done = correct_contexts(p, ctx);
    if (ctx->args[0] == FGPU_EXEMPT) note(p, FGPU_SEEN_DEVICE);
    if (ctx->args[0] == FGPU_MARK) on(p, ctx->args[3])->peak = *(volatile u64 *)&on(p, ctx->args[3])->bytes;
    int ended = *(volatile u64 *)&p->state != READY, managed = p->level_count;
    u64 moved_ns = p->moved_ns;
    if (ended) orphan_all(p, tgid);
    if (UNLIKELY(ended && p->flags & FGPU_PARKED)) drop_parked(p, tgid);
    if (ctx->args[0] == FGPU_REAP || (moves(ctx) && !managed && !has_stragglers(moved_ns, now)))
        delete_process(tgid, p);
    return done;
}

static int let_orphan_go(struct bpf_raw_tracepoint_args *ctx)
{
    struct fgpu_orphan_key key = {
        .tgid = ctx->args[1], .device = ctx->args[2], .generation = ctx->args[3], .turn = ctx->args[4]};
    return let_go(&key, ctx->args[5]);
}

static int disown(u64 cgroup, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    if (!page) return -2;
    u64 *orphaned = &page->orphaned[slot(device)];
    if (bytes > *(volatile u64 *)orphaned) return -22;
    __sync_fetch_and_add(orphaned, -bytes);
    subtract(&page->devices[slot(device)].used, bytes);
    return 0;
}

static int looked(u64 cgroup, u32 device, u64 since_ns)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    if (!page) return -2;
    page->looked_ns[slot(device)] = since_ns;
    return 0;
}

static int decide_on_room(u64 cgroup, u32 device, u64 until_ns)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    u64 now = bpf_ktime_get_ns(), most = now + FGPU_ROOM_NS;
    if (!page) return -2;
    if (until_ns > most) until_ns = most;
    *(volatile u64 *)&page->room_ns[slot(device)] = until_ns ? until_ns & ~FGPU_NO_ROOM : now | FGPU_NO_ROOM;
    return 0;
}

/* Subtract the number of deleted entries, never below 0, because the cgroup may have another level or no level now. */
static int swept(u64 cgroup, u64 n, u64 place)
{
    struct fgpu_level level = {.cgroup = cgroup, .place = place};
    give_places(&level, FGPU_ALLOCATIONS, n);
    return 0;
}

/* Release the claims of an owner that exceed its entries, except one claim. An owner without entries loses all
 * claims. */
static void trim(struct fgpu_owner *owner, u32 shared)
{
    u64 most = most_of(shared), few = FEW(most);
    u64 *all = claims_on(shared), claimed = *(volatile u64 *)&owner->claimed[shared];
    u64 left = *(volatile u64 *)&owner->entries[shared], needed = left ? (left + 2 * few - 1) & -few : 0;
    if (needed >= claimed || !all) return;
    if (__sync_val_compare_and_swap(&owner->claimed[shared], claimed, needed) == claimed)
        __sync_fetch_and_add(all, needed - claimed);
}

static int trim_owner(u32 slot_of_owner)
{
    struct fgpu_owner *owner = owner_in(slot_of_owner);
    if (!owner) return -22;
    _Pragma("unroll") for (u32 i = 0; i < FGPU_SHARED; i++) trim(owner, i);
    return 0;
}

static int own(struct bpf_raw_tracepoint_args *ctx)
{
    u32 at = ctx->args[2];
    struct fgpu_owner *owner = owner_in(at);
    struct fgpu_usage_page *page = page_of(ctx->args[1]);
    if (!owner || !at || at == FGPU_OWNERS - 1) return -22;
    owner->cgroup = ctx->args[3];
    for (int i = 0; i < FGPU_OWNED; i++) *(volatile u64 *)&owner->most[i] = ctx->args[4 + i];
    if (page) page->owner = at;
    return 0;
}

/* Wake the gatekeeper. The content has no meaning. If the ring buffer is full, no gatekeeper has read the buffer for a
 * long time, and the next gatekeeper reads all state. */
static int ring(void)
{
    u64 nothing = 0;
    return bell.ringbuf_output(&nothing, sizeof(nothing), WAKE_UP) ? -11 : 0;
}

int adjust(struct bpf_raw_tracepoint_args *ctx)
{
    switch (ctx->args[0]) {
    case FGPU_PUBLISH:
        return publish(ctx->args[1], ctx->args[2]);
    case FGPU_WITHDRAW:
        return withdraw(ctx->args[1]);
    case FGPU_DISOWN:
        return disown(ctx->args[1], ctx->args[2], ctx->args[3]);
    case FGPU_LOOKED:
        return looked(ctx->args[1], ctx->args[2], ctx->args[3]);
    case FGPU_ROOM:
        return decide_on_room(ctx->args[1], ctx->args[2], ctx->args[3]);
    case FGPU_LET_GO:
        return let_orphan_go(ctx);
    case FGPU_ENTER:
        return enter_process(ctx, ctx->args[1]);
    case FGPU_SWEPT:
        return swept(ctx->args[1], ctx->args[2], ctx->args[3]);
    case FGPU_OWN:
        return own(ctx);
    case FGPU_TRIM:
        return trim_owner(ctx->args[1]);
    case FGPU_RING:
        return ring();
    case FGPU_END_PARK:
        return end_park(ctx->args[1], ctx->args[2]);
    case FGPU_OVERHEAD:
    case FGPU_MOVE:
    case FGPU_REAP:
    case FGPU_RAISE:
    case FGPU_MARK:
    case FGPU_EXEMPT:
    case FGPU_BEGIN_PARK:
    case FGPU_PARK:
    case FGPU_WAKE:
    case FGPU_FINISH_MOVE:
    case FGPU_CONTEXT_SEEN:
    case FGPU_CONTEXT_GONE:
        return adjust_process(ctx, ctx->args[1]);
    default:
        return -22;
    }
}
