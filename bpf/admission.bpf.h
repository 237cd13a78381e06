/* admission.bpf.h: the question before an allocation, and the verdict. */

/* The entry of the current thread, made where it has none in this life of its process; 0: there is no room for it, of
 * its level's part or at all. */
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

static int granted(u64 verdict) { return verdict == FGPU_ADMITTED || verdict == FGPU_UNLIMITED; }

static void grant(struct fgpu_process *p, struct held *h, struct fgpu_admission *a, u32 device, u64 bytes)
{
    if (a->kind != FGPU_CONTEXT && h->page[0]) __sync_fetch_and_add(&h->page[0]->tallies[slot(device)].admitted, bytes);
    if (a->kind == FGPU_POOL) /* committed at once */
        __sync_fetch_and_add(&on(p, device)->pool, bytes);
    else
        a->bytes = bytes;
}

static u64 ask(struct fgpu_process *p, struct held *h, struct fgpu_thread *t, u32 device, u64 bytes, u32 kind,
               u64 ticket)
{
    struct fgpu_admission *a = &t->admission;
    if (UNLIKELY(a->bytes)) {
        release(p, a->device, a->bytes); /* an older one that nothing settled */
        a->bytes = 0;
    }
    a->ticket = ticket;
    a->device = device;
    a->kind = kind;
    a->verdict = FGPU_REFUSED;
    if (UNLIKELY(device >= FGPU_DEVICES)) {
        anomaly(FGPU_ANOMALY_DEVICE);
        return FGPU_REFUSED;
    }
    if (UNLIKELY(kind == FGPU_CONTEXT)) {
        u64 *known = contexts.lookup(&device);
        bytes = known ? *known : 0;
    }
    if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES; /* fits nowhere, and no sum with it overflows */
    if (crowded(h->page[0], device, bytes, kind) || refused_by_a_level(h, device, bytes, kind)) return FGPU_REFUSED;
    a->verdict = charge(p, h, device, bytes, 0);
    if (granted(a->verdict)) grant(p, h, a, device, bytes);
    return a->verdict;
}

static u64 answer(struct fgpu_process *p, struct held *h, struct fgpu_thread *t, u32 device, u64 bytes, u32 kind,
                  u64 ticket)
{
    struct fgpu_admission *a = &t->admission;
    if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;
    busy(p, t);
    u64 verdict = ask(p, h, t, device, bytes, kind, ticket);
    quiet(p, t);
    return verdict;
}

/* Nobody can be charged for who has no entry: it is refused, and told so where its own level has too many. Where all
 * only observe, nothing is refused: NVML tells of it. FGPU_AGAIN: no answer. */
static u64 without_entry(struct held *h, u32 device, u64 bytes, u32 kind)
{
    struct fgpu_usage_page *leaf = h->page[0];
    u64 observed = FGPU_OBSERVE;
    EACH_LEVEL if (h->page[i]) observed &= h->page[i]->flags;
    if (observed) return FGPU_ADMITTED;
    if (device >= FGPU_DEVICES) return FGPU_REFUSED;
    if (*(volatile u64 *)&leaf->entries[FGPU_THREADS] < PART(MOST_THREADS) &&
        *(volatile u64 *)&leaf->entries[FGPU_PROCESSES] < PART(MOST_PROCESSES))
        return FGPU_AGAIN;
    refuse_entry(leaf, device, bytes, kind);
    return FGPU_REFUSED;
}

int admit(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), ticket = PT_REGS_PARM4(ctx) & TICKET_MASK, verdict = FGPU_ADMITTED;
    u32 kind = PT_REGS_PARM3(ctx);
    struct held h = {};
    struct fgpu_process *p = own_process(id >> 32, &h);
    struct fgpu_thread *t = p ? own_thread(p, id) : 0;
    own_stack(ctx);
    hit(FGPU_HIT_ADMIT);
    if (!UNLIKELY(!p)) look_up(p, &h);
    if (!h.page[0]) return 0;
    if (kind != FGPU_HELLO && kind >= FGPU_KINDS) kind = FGPU_MEMORY;
    if (kind == FGPU_HELLO) {
        if (!p) return 0;
        p->flags |= FGPU_SEEN_SHIM;
    } else if (UNLIKELY(!t)) {
        verdict = without_entry(&h, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), kind);
        if (verdict == FGPU_AGAIN) return 0; /* the shim says hello again */
    } else {
        verdict = answer(p, &h, t, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), kind, ticket);
    }
    *(volatile u64 *)&h.page[0]->verdicts[ticket & VERDICT_MASK] = ticket << 2 | verdict;
    return 0;
}

/* The level had room, the device has not. */
static void device_full(struct fgpu_process *p, u32 device, u32 kind, u64 bytes)
{
    count(p->levels[0], device, kind, FGPU_REASON_DEVICE_FULL);
    tell(page_of(p->levels[0]), FGPU_NEWS_REFUSED, device, bytes, kind, FGPU_REASON_DEVICE_FULL);
}

/* While an upgrade goes on, the programs of two versions see one call. What is given back has a ticket of its own each
 * time; where a thread is in no call of the driver, the place of the call's first argument is free for it. */
static int given_back(struct fgpu_process *p, u64 id, u64 ticket)
{
    struct fgpu_thread *t = own_thread(p, id);
    if (!t || t->call.function) return 0;
    if (t->call.arguments[0] == ticket) return 1;
    t->call.arguments[0] = ticket;
    return 0;
}

/* Pool bytes only, and never more than the process has. */
int give_back(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), bytes = PT_REGS_PARM2(ctx);
    u32 device = PT_REGS_PARM1(ctx), kind = PT_REGS_PARM3(ctx), tgid = id >> 32;
    struct fgpu_process *p = processes.lookup(&tgid);
    own_stack(ctx);
    hit(FGPU_HIT_GIVE_BACK);
    if (!p || p->state != READY || (kind & ~FGPU_FULL) != FGPU_POOL || device >= FGPU_DEVICES) return 0;
    if (given_back(p, id, PT_REGS_PARM4(ctx))) return 0;
    if (kind & FGPU_FULL) device_full(p, device, FGPU_POOL, bytes);
    begin(p);
    for (int i = 0; i < TRIES; i++) {
        u64 was = *(volatile u64 *)&on(p, device)->pool, less = bytes < was ? bytes : was;
        if (__sync_val_compare_and_swap(&on(p, device)->pool, was, was - less) != was) continue;
        if (less < bytes) anomaly(FGPU_ANOMALY_RELEASE);
        release(p, device, less);
        break;
    }
    end(p);
    return 0;
}
