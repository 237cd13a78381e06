/* admission.bpf.h: the admission request before an allocation, and its verdict. */

static void grant(struct fgpu_process *p, struct held *h, struct fgpu_admission *a, u32 device, u64 bytes)
{
    u32 kind = a->kind & BELOW_ERA;
    if (kind != FGPU_CONTEXT && h->page[0]) __sync_fetch_and_add(&h->page[0]->tallies[slot(device)].admitted, bytes);
    if (kind == FGPU_POOL) /* committed at once */
        __sync_fetch_and_add(&on(p, device)->pool, bytes);
    else
        a->bytes = bytes;
}

/* Charge an admission that no driver call settled as overhead: the memory may have been allocated by a call without a
 * probe. The bytes stay charged until NVML shows that the process does not have this memory. */
static void leave_unsettled(struct fgpu_process *p, struct fgpu_admission *a)
{
    if (a->bytes && is_of_era(p, a->device, a->kind)) add_overhead(p, a->device, a->bytes);
    a->bytes = 0;
}

/* Decide on a request. `kind` may include the flag FGPU_PATIENT. */
static u64 ask(struct fgpu_process *p, struct held *h, struct fgpu_thread *t, u32 device, u64 bytes, u32 kind,
               u64 ticket)
{
    struct fgpu_admission *a = &t->admission;
    u32 patient = kind & FGPU_PATIENT;
    kind &= FGPU_KIND_MASK;
    if (UNLIKELY(a->bytes)) leave_unsettled(p, a);
    a->ticket = ticket;
    a->device = device;
    a->kind = kind;
    a->verdict = FGPU_REFUSED;
    if (UNLIKELY(device >= FGPU_DEVICES)) {
        anomaly(FGPU_ANOMALY_DEVICE);
        return FGPU_REFUSED;
    }
    a->kind |= era_of(p, device);
    if (UNLIKELY(kind == FGPU_CONTEXT)) {
        u64 *known = contexts.lookup(&device);
        bytes = known ? *known : 0;
    }
    kind = forget(kind, p->generation);                   /* from now on, a context is charged like every other kind */
    if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES; /* fits in no level, and no sum overflows */
    if (crowded(h->page[0], device, bytes, kind)) return FGPU_REFUSED;
    if (is_uncommitted(h, device, bytes, kind)) return FGPU_REFUSED;
    if (refused_by_a_level(h, device, bytes, kind, patient)) return FGPU_REFUSED;
    busy(p, t); /* not before this point: otherwise a thread that repeats a refused request would always be in a change,
                   and the agent could never correct the thread's process */
    a->verdict = charge(p, h, device, bytes, 0);
    if (granted(a->verdict)) grant(p, h, a, device, bytes);
    return a->verdict;
}

static u64 answer(struct fgpu_process *p, struct held *h, struct fgpu_thread *t, u32 device, u64 bytes, u32 kind,
                  u64 ticket)
{
    struct fgpu_admission *a = &t->admission;
    if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;
    u64 verdict = ask(p, h, t, device, bytes, kind, ticket);
    quiet(p, t);
    return verdict;
}

/* Decide for a process without an entry, which cannot be charged. If all levels only observe, the request is admitted,
 * and NVML shows the memory. If the process's own level has too many entries, the request is refused, and the refusal
 * is reported. FGPU_AGAIN: there is no verdict. */
static u64 without_entry(struct held *h, u32 device, u64 bytes, u32 kind)
{
    struct fgpu_usage_page *leaf = h->page[0];
    u64 observed = FGPU_OBSERVE;
    EACH_LEVEL if (h->page[i]) observed &= h->page[i]->flags;
    if (observed) return FGPU_ADMITTED;
    if (device >= FGPU_DEVICES) return FGPU_REFUSED;
    if (!is_crowded(leaf, FGPU_THREADS) && !is_crowded(leaf, FGPU_PROCESSES)) return FGPU_AGAIN;
    refuse_entry(leaf, device, bytes, kind);
    return FGPU_REFUSED;
}

/* Publish a verdict by one store of an aligned word. Because of the tag, no process can write the verdict that another
 * process waits for. A process without an entry has no tag: its tagged request gets no verdict, and the shim registers
 * again. */
static void publish_answer(struct fgpu_usage_page *page, struct fgpu_process *p, u32 flags, u64 ticket, u64 verdict)
{
    u64 slot_of_ticket = ticket & VERDICT_MASK;
    if (!(flags & FGPU_TAGGED))
        *(volatile u64 *)&page->verdicts[slot_of_ticket] = ticket << 2 | verdict;
    else if (p)
        *(volatile u64 *)&page->answers[slot_of_ticket] =
            (u64)p->tag << FGPU_TAG_SHIFT | (ticket & FGPU_TICKET_BITS) << 2 | verdict;
}

/* Return the kind. An unknown number counts as memory. */
static u32 known_kind(u64 said)
{
    u32 kind = said & FGPU_KIND_MASK;
    return kind < FGPU_KINDS ? kind : FGPU_MEMORY;
}

static void report_called(struct fgpu_process *p, struct fgpu_usage_page *page)
{
    page->called_ns = bpf_ktime_get_ns();
    if (p) note(p, FGPU_SEEN_CALLED);
}

int admit(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), ticket = PT_REGS_PARM4(ctx) & TICKET_MASK, verdict = FGPU_ADMITTED;
    u32 kind = known_kind(PT_REGS_PARM3(ctx)), flags = PT_REGS_PARM3(ctx) & ~FGPU_KIND_MASK;
    u32 tgid = id >> 32;
    struct held h = {};
    if (UNLIKELY(flags & FGPU_ANNOUNCE)) {
        announce(tgid);
        return 0;
    }
    struct fgpu_process *p = own_process(&tgid, &h);
    struct fgpu_thread *t = p && !(flags & (FGPU_CALLED | FGPU_LACKS)) ? own_thread(p, id) : 0;
    own_stack(ctx);
    hit(FGPU_HIT_ADMIT);
    if (!UNLIKELY(!p)) look_up(p, &h);
    if (UNLIKELY(flags & FGPU_KNOCK)) {
        tell_of_knock(h.page[0], tgid, PT_REGS_PARM1(ctx));
        return 0;
    }
    if (!h.page[0]) return 0;
    if (UNLIKELY(flags & FGPU_FREED)) {
        h.page[0]->freed_ns = bpf_ktime_get_ns();
        return 0;
    }
    if (UNLIKELY(flags & (FGPU_CALLED | FGPU_LACKS))) {
        if (flags & FGPU_CALLED)
            report_called(p, h.page[0]);
        else if (h.page[0]->flags & FGPU_WAITS)
            tell(h.page[0], FGPU_NEWS_LACKS, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), FGPU_MEMORY, 0);
        return 0;
    }
    if (kind == FGPU_HELLO) {
        if (!p) return 0;
        note(p, FGPU_SEEN_SHIM);
    } else if (UNLIKELY(!t)) {
        verdict = without_entry(&h, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), kind);
        if (verdict == FGPU_AGAIN) return 0; /* the shim registers again */
    } else {
        verdict = answer(p, &h, t, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), kind | (flags & FGPU_PATIENT), ticket);
    }
    publish_answer(h.page[0], p, flags, ticket, verdict);
    return 0;
}

/* Report that the bytes fit in the level, but the device was out of memory. */
static void device_full(struct fgpu_process *p, u32 device, u32 kind, u64 bytes)
{
    count(p->levels[0], device, kind, FGPU_REASON_DEVICE_FULL);
    tell(page_of(p->levels[0]), FGPU_NEWS_REFUSED, device, bytes, kind, FGPU_REASON_DEVICE_FULL);
}

/* Return whether these bytes were released already. During an upgrade, programs of two versions run at each call. Each
 * release has its own ticket. While a thread is in no driver call, the field for the call's first argument can hold
 * that ticket. */
static int given_back(struct fgpu_process *p, u64 id, u64 ticket)
{
    struct fgpu_thread *t = own_thread(p, id);
    if (!t || t->call.function) return 0;
    if (t->call.arguments[0] == ticket) return 1;
    t->call.arguments[0] = ticket;
    return 0;
}

/* Return the part of released pool bytes that is charged. If the process did not use all bytes of its pools, the last
 * correction has lowered the overhead below the size of the contexts by the unused bytes. These unused bytes are
 * released first, and become overhead again. Memory that was freed with a context lowers the overhead too, so the agent
 * must check NVML before the agent refuses a request. */
static u64 charged_part(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page;
    u64 *known = contexts.lookup(&device);
    s64 unused = known ? (s64)(*known * on(p, device)->contexts) - on(p, device)->overhead : 0;
    if (unused <= 0) return bytes;
    if (unused > bytes) unused = bytes;
    add_overhead(p, device, unused);
    page = page_at(levels_of(p, p->turn));
    if (page) page->freed_ns = bpf_ktime_get_ns();
    return bytes - unused;
}

/* Release bytes of pools, at most as many as the process has. */
int give_back(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), bytes = PT_REGS_PARM2(ctx);
    u32 device = PT_REGS_PARM1(ctx), kind = PT_REGS_PARM3(ctx), tgid = id >> 32;
    struct held unused;
    struct fgpu_process *p = own_process(&tgid, &unused);
    own_stack(ctx);
    hit(FGPU_HIT_GIVE_BACK);
    if (!p || (kind & ~FGPU_FULL) != FGPU_POOL || device >= FGPU_DEVICES) return 0;
    if (given_back(p, id, PT_REGS_PARM4(ctx))) return 0;
    if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES; /* no pool has more, and no difference overflows */
    if (kind & FGPU_FULL) device_full(p, device, FGPU_POOL, bytes);
    begin(p);
    u64 less = subtract_most((s64 *)&on(p, device)->pool, bytes);
    if (less < bytes) anomaly(FGPU_ANOMALY_RELEASE);
    less = charged_part(p, device, less);
    if (p->flags & (FGPU_SEEN_POOL_EXPORT | FGPU_SEEN_EXPORT) || opens_now(p) || !on(p, device)->contexts)
        orphan_part(p, tgid, device, less); /* an importer may have the memory open, or no row of NVML shows it */
    else
        release(p, device, less);
    end(p);
    return 0;
}
