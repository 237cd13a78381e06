/* levels.bpf.h: the managed cgroups of a process, and their charges: bytes are added if they fit, and are later
 * subtracted from the same levels. */

static int fits(struct fgpu_usage_page *page, u32 device, u64 bytes)
{
    struct fgpu_usage *usage = &page->devices[slot(device)];
    u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit;
    return used + bytes <= limit;
}

/* Raise a peak. If a race leaves a peak too low, the next charge raises it. */
static void raise_peak(u64 *peak, u64 now)
{
    u64 was = *(volatile u64 *)peak;
    if (UNLIKELY(now > was)) __sync_val_compare_and_swap(peak, was, now);
}

/* Charge one level, if the bytes fit, if the level only observes, or if `force` is set. Returns whether the level is
 * charged. The bytes are compared with the limit before the addition. An addition with a later subtraction would refuse
 * requests of neighbours that fit. */
static int take(struct fgpu_usage_page *page, u32 device, u64 bytes, int force)
{
    struct fgpu_usage *usage = &page->devices[slot(device)];
    if (force) {
        raise_peak(&usage->peak, __sync_fetch_and_add(&usage->used, bytes) + bytes);
        return 1;
    }
    for (int i = 0; i < TRIES; i++) {
        u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit, now = used + bytes;
        if (UNLIKELY(now > limit) && !(page->flags & FGPU_OBSERVE)) return 0;
        if (UNLIKELY(__sync_val_compare_and_swap(&usage->used, used, now) != used)) continue;
        raise_peak(&usage->peak, now);
        return 1;
    }
    return 0;
}

/* Return the side for a number of moves. A move cannot stop threads that are charging at the same time. Therefore a
 * process has two sides. Each side has levels and the bytes charged to these levels. A move fills the other side and
 * then makes this side current. A thread that determined the side before the move charges the old side. The agent moves
 * that remainder when the agent next examines the process. */
static u64 side_of(u64 turn)
{
    __asm__ volatile("" : "+r"(turn));
    return turn & 1;
}

static struct fgpu_level *levels_of(struct fgpu_process *p, u64 side) { return &p->sides[side_of(side) * FGPU_LEVELS]; }

/* Set a flag. Two threads may set flags at the same time, and no flag may be lost. LLVM 14 has this operation for 64
 * bits only, so the operation is applied to the word whose lower half is `level_count` and whose upper half is the
 * flags. */
static void note(struct fgpu_process *p, u64 flag) { __sync_fetch_and_or((u64 *)&p->level_count, flag << 32); }

/* Clear a flag. Returns whether this call has cleared the flag. If another thread changes a flag at the same time, this
 * flag may stay set. */
static int withdraw_note(struct fgpu_process *p, u64 flag)
{
    u64 *word = (u64 *)&p->level_count, was = *(volatile u64 *)word;
    return was & flag << 32 && __sync_val_compare_and_swap(word, was, was & ~(flag << 32)) == was;
}

static struct fgpu_holding *on(struct fgpu_process *p, u64 device) { return &p->devices[slot(device)]; }
static s64 *charged(struct fgpu_process *p, u64 side, u32 device) { return &on(p, device)->charged[side_of(side)]; }

/* The era of a device plus 1, in the upper bits of an admission or a call. The era is read before the bytes are
 * charged. If another era has begun since, the charge was released with the last context, although the memory may be
 * allocated after this release. 0: unknown era, because programs of an earlier version wrote the word. */
#define ERA_SHIFT 8
#define BELOW_ERA ((1 << ERA_SHIFT) - 1)
static u32 in_word(u32 era) { return (era + 1) << ERA_SHIFT; }
static u32 era_of(struct fgpu_process *p, u32 device) { return in_word(*(volatile u32 *)&on(p, device)->era); }
static int is_of_era(struct fgpu_process *p, u32 device, u32 word)
{
    u32 era = word & ~BELOW_ERA;
    return !era || era == era_of(p, device);
}

#define OPENINGS_BEGUN 0
#define OPENINGS_OVER 1

/* Count `n` calls that may open memory: at their entry, and at the recording of their result. `openings` is the upper
 * half of the incremented word. */
static void count_opening(struct fgpu_process *p, u32 at, u64 n)
{
    if (UNLIKELY(n)) __sync_fetch_and_add((u64 *)&on(p, at)->era, n << 32);
}
static u32 openings(struct fgpu_process *p, u32 at) { return *(volatile u32 *)&on(p, at)->openings; }
static int opens_now(struct fgpu_process *p) { return openings(p, OPENINGS_OVER) != openings(p, OPENINGS_BEGUN); }

/* Return whether memory that this call has freed may still be in use; 0: no. An overlapping call may have opened the
 * memory before the driver freed the memory, and may have found no entry or may not be recorded yet. The code has no
 * branch, because the function is called in a loop. */
static u64 may_be_open(struct fgpu_process *p, struct fgpu_call *f)
{
    return (p->flags & FGPU_SEEN_EXPORT) | (f->exported >> 32 ^ openings(p, OPENINGS_BEGUN));
}

static void add_overhead(struct fgpu_process *p, u32 device, u64 bytes)
{
    __sync_fetch_and_add((u64 *)&on(p, device)->overhead, bytes);
}

/* Set the cgroup of a level. The index of the level's page is looked up only in this function. */
static void enter_level(struct fgpu_level *level, u64 cgroup)
{
    struct fgpu_usage_page *page = cgroup ? page_of(cgroup) : 0;
    level->place = page ? page->place | page->owner << 32 : 0;
    level->cgroup = cgroup;
}

/* The pages of one side's levels, looked up once; 0: the level is no longer managed. Loops over the pages are unrolled,
 * because the verifier follows pointers on the stack only at known offsets. */
struct held {
    struct fgpu_usage_page *page[FGPU_LEVELS];
    u64 side;
};
#define EACH_LEVEL _Pragma("unroll") for (int i = 0; i < FGPU_LEVELS; i++)

static void look_up_side(struct fgpu_process *p, u64 side, struct held *h)
{
    struct fgpu_level *levels = levels_of(p, side);
    h->side = side;
    EACH_LEVEL h->page[i] = levels[i].cgroup ? page_at(&levels[i]) : 0;
}

static void look_up(struct fgpu_process *p, struct held *h) { look_up_side(p, *(volatile u64 *)&p->turn, h); }

/* Bytes by device; a struct, because an array alone has another layout on every architecture. */
struct amounts {
    s64 of[FGPU_DEVICES];
};

static void give_back_levels(struct held *h, u32 device, u64 bytes, u32 below)
{
    EACH_LEVEL if (i < below && h->page[i]) subtract(&h->page[i]->devices[slot(device)].used, bytes);
}

/* Return whether the bytes would fit without the level's orphaned bytes. */
static int fits_without_orphans(struct fgpu_usage_page *page, u32 device, u64 bytes)
{
    struct fgpu_usage *usage = &page->devices[slot(device)];
    u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit;
    u64 orphaned = *(volatile u64 *)&page->orphaned[slot(device)];
    return orphaned <= used && used - orphaned + bytes <= limit;
}

/* Return whether a level refuses the bytes. All levels are read before any level is charged, so that a request that
 * never fits affects no other request. The report follows the loop, because code in the loop is compiled for every
 * level. A patient request that would fit without orphaned bytes is refused and not reported, because the shim repeats
 * the request. */
static int refused_by_a_level(struct held *h, u32 device, u64 bytes, u32 kind, u32 patient)
{
    struct fgpu_usage_page *full = 0;
    u16 reason = FGPU_REASON_OBSERVED;
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = h->page[i];
        if (!page || reason == FGPU_REASON_LIMIT || !UNLIKELY(!fits(page, device, bytes))) continue;
        full = page;
        if (page->flags & FGPU_OBSERVE)
            count(page->cgroup, device, kind, FGPU_REASON_OBSERVED);
        else
            reason = FGPU_REASON_LIMIT;
    }
    if (!UNLIKELY(full)) return 0;
    if (patient && reason == FGPU_REASON_LIMIT && fits_without_orphans(full, device, bytes)) return 1;
    tell(full, FGPU_NEWS_REFUSED, device, bytes, kind, reason);
    if (reason != FGPU_REASON_LIMIT) return 0;
    __sync_fetch_and_add(&full->devices[slot(device)].refused, 1);
    count(full->cgroup, device, kind, FGPU_REASON_LIMIT);
    return 1;
}

/* Return whether the limit of a level does not count against the device yet, and request the agent's decision. The
 * request is counted on the program's own page: a program that registered before a group had its limit has no page of
 * the group. */
static int is_uncommitted(struct held *h, u32 device, u64 bytes, u32 kind)
{
    u64 flag = 1ULL << FGPU_UNCOMMITTED_SHIFT << slot(device);
    struct fgpu_usage_page *level = 0;
    EACH_LEVEL if (h->page[i] && UNLIKELY(*(volatile u64 *)&h->page[i]->flags & flag)) level = h->page[i];
    if (!UNLIKELY(level)) return 0;
    if (h->page[0]) __sync_fetch_and_add(&h->page[0]->undecided[slot(device)], 1);
    tell_urgently(level, FGPU_NEWS_FIRST_USE, device, bytes, kind, 0);
    return 1;
}

static void refuse_entry(struct fgpu_usage_page *page, u32 device, u64 bytes, u32 kind)
{
    tell(page, FGPU_NEWS_REFUSED, device, bytes, kind, FGPU_REASON_ENTRIES);
    __sync_fetch_and_add(&page->devices[slot(device)].refused, 1);
    __sync_fetch_and_add(&page->crowded, 1);
    count(page->cgroup, device, kind, FGPU_REASON_ENTRIES);
}

/* Return whether the level or its owner has reached its bound in a shared map. At the bound, no allocation of any size
 * can get an entry. */
static int crowded(struct fgpu_usage_page *page, u32 device, u64 bytes, u32 kind)
{
    if (!page || kind == FGPU_POOL || page->flags & FGPU_OBSERVE) return 0;
    if (!is_crowded(page, FGPU_ALLOCATIONS)) return 0;
    refuse_entry(page, device, bytes, kind);
    return 1;
}

/* Charge all levels. If a level refuses the bytes, which fitted a moment ago, or if other threads charge the level at
 * the same time, no level is charged, and the request is to be repeated. */
static int take_levels(struct held *h, u32 device, u64 bytes, int force)
{
    u64 limits = FGPU_NO_LIMIT;
    EACH_LEVEL
    {
        if (!h->page[i]) continue;
        if (UNLIKELY(!take(h->page[i], device, bytes, force))) {
            give_back_levels(h, device, bytes, i);
            return FGPU_AGAIN;
        }
        limits &= *(volatile u64 *)&h->page[i]->devices[slot(device)].limit;
    }
    return limits == FGPU_NO_LIMIT ? FGPU_UNLIMITED : FGPU_ADMITTED;
}

/* Each change of a process's numbers is between begin() and end(). The agent does not correct a process during a
 * change. */
static void begin(struct fgpu_process *p) { __sync_fetch_and_add(&p->begun, 1); }
static void end(struct fgpu_process *p) { __sync_fetch_and_add(&p->changes, 1); }

/* A thread is in a change from its admission to the end of the driver call that settles the admission. During this
 * time, the driver may or may not have allocated the bytes. The generation is compared, because a process that has left
 * its cgroups and returns has a new generation. */
static void busy(struct fgpu_process *p, struct fgpu_thread *t)
{
    if (t->open == p->generation) return;
    t->open = p->generation;
    begin(p);
}

static void quiet(struct fgpu_process *p, struct fgpu_thread *t)
{
    if (t->admission.bytes || t->call.function || t->open != p->generation) return;
    t->open = p->generation | IDLE;
    end(p);
}

static int granted(u64 verdict) { return verdict == FGPU_ADMITTED || verdict == FGPU_UNLIMITED; }

static int charge(struct fgpu_process *p, struct held *h, u32 device, u64 bytes, int force)
{
    int verdict = take_levels(h, device, bytes, force);
    if (verdict == FGPU_AGAIN) return verdict;
    __sync_fetch_and_add(charged(p, h->side, device), bytes);
    raise_peak(&on(p, device)->peak, __sync_fetch_and_add(&on(p, device)->bytes, bytes) + bytes);
    return verdict;
}

/* Subtract bytes from a number, at most as many as the number has. Returns how many bytes were subtracted. While two
 * threads subtract, the number may be below 0. */
static u64 subtract_most(s64 *has, u64 bytes)
{
    s64 was = __sync_fetch_and_add(has, -bytes);
    if (!UNLIKELY(was < (s64)bytes)) return bytes;
    if (was < 0) was = 0;
    __sync_fetch_and_add(has, bytes - was);
    return was;
}

static u64 draw(struct fgpu_process *p, u64 side, u32 device, u64 bytes)
{
    return subtract_most(charged(p, side, device), bytes);
}
