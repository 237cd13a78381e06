/* calls.bpf.h: the probes at the entry and the return of the driver's functions. */

static int same_call(struct fgpu_call *a, struct fgpu_call *b)
{
    int is_mapping = a->function == FGPU_FUNCTION_MAP; /* the mapping may be of another handle */
    return a->function == b->function && a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1] &&
           (!is_mapping || a->arguments[2] == b->arguments[2]);
}

/* Return whether an admission is for a driver call. Pool bytes are committed at once, and no call settles pool
 * bytes. */
static int is_for_a_call(struct fgpu_admission *a) { return a->ticket && (a->kind & BELOW_ERA) != FGPU_POOL; }

/* Move a thread's admission into its call. Return the admitted bytes that were released with the last context. */
static u64 take_over(struct fgpu_process *p, struct fgpu_admission *a, struct fgpu_call *f)
{
    if (granted(a->verdict)) {
        f->device = a->device & DEVICE_MASK;
        f->admitted = 1 | (a->kind & ~BELOW_ERA);
        f->bytes = a->bytes;
    }
    a->ticket = 0;
    a->bytes = 0;
    return lost_with_context(p, f);
}

/* Return the device of a reference to a primary context. Only the first reference has an admission, which has the
 * ledger's index. */
static u32 referred_device(struct fgpu_process *p, u32 tgid, u32 ordinal)
{
    struct fgpu_allocation_key key = {.tgid = tgid, .generation = p->generation};
    return device_of_ordinal(p, &key, ordinal);
}

static void entered(struct pt_regs *ctx, struct fgpu_process *p, u32 tgid, struct fgpu_thread *t)
{
    u64 cookie = bpf_get_attach_cookie(ctx);
    struct fgpu_call now = {.function = cookie & FGPU_FUNCTION_MASK};
    now.arguments[0] = PT_REGS_PARM1(ctx);
    now.arguments[1] = PT_REGS_PARM2(ctx);
    now.arguments[2] = PT_REGS_PARM4(ctx); /* of a mapping: the handle; of a pitched allocation: the height */
    int settles = is_for_a_call(&t->admission) && takes(now.function);
    if (UNLIKELY(t->call.function)) {
        /* A second probe on one file, or a call that was left by longjmp and made again: the existing entry is kept. */
        if (!settles && same_call(&t->call, &now)) return;
        give_up(p, tgid, &t->call); /* a call left by longjmp */
    }
    u64 any = p->generation, bytes = forget(asked_bytes(ctx, &now, any), any); /* each function leaves other values,
                                                                                  which are hidden from the verifier */
    now.function = forget(now.function, any);
    now.device = forget(now.device, any);
    if (UNLIKELY(retains(now.function))) now.device = referred_device(p, tgid, now.device);
    u64 lost = settles ? take_over(p, &t->admission, &now) : 0;
    if (now.device >= FGPU_DEVICES) now.device = p->last_device & DEVICE_MASK;
    begin_opening(p, &now);
    if (!now.bytes) now.admitted = (now.admitted & BELOW_ERA) | era_of(p, now.device);
    if (frees(now.function))
        take_entry(p, tgid, &now, is_trusted(cookie));
    else
        cover(p, &now, bytes > lost ? bytes : lost, 0);
    if (now.bytes && now.uncovered <= lost) now.uncovered = 0; /* the call had an admission, and its bytes fit again */
    if (retains(now.function)) __sync_fetch_and_add(&on(p, now.device)->retained, 1);
    t->call = now;
}

int call_enter(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct held unused;
    if (!(bpf_get_attach_cookie(ctx) & FGPU_FUNCTION_MASK)) return 0; /* MARK of driver/probe_plan.py */
    struct fgpu_process *p = own_process(&tgid, &unused);
    struct fgpu_thread *t = p ? own_thread(p, id) : 0;
    own_stack(ctx);
    hit(bpf_get_attach_cookie(ctx) & FGPU_FUNCTION_MASK);
    if (UNLIKELY(!p) && processes.lookup(&tgid)) anomaly(FGPU_ANOMALY_LOST);
    if (!t) return 0;
    if (!(p->flags & FGPU_SEEN_CALL)) note(p, FGPU_SEEN_CALL);
    busy(p, t);
    entered(ctx, p, tgid, t);
    return 0;
}

#define OUT_OF_MEMORY 2 /* CUDA_ERROR_OUT_OF_MEMORY */

/* Report a call that succeeded without an admission, or with a smaller admission. A call that fails (after a fork,
 * without a context) is not a bypass. The event is sent once for each process; FGPU_TOLD_BYPASS is set only if the
 * event was sent. */
static void name_bypass(struct fgpu_process *p, struct fgpu_call *f)
{
    note(p, FGPU_SEEN_BYPASS);
    anomaly(FGPU_ANOMALY_BYPASS);
    if (p->flags & FGPU_TOLD_BYPASS) return;
    if (tell_urgently(page_of(p->levels[0]), FGPU_NEWS_BYPASS, f->device, f->uncovered, operation_of(f), 0))
        note(p, FGPU_TOLD_BYPASS);
}

/* Report a call that has allocated memory in a thread or process without an entry. The entry is missing because the
 * level has reached its bound, or because `borrowers` is full. The kernel refuses all requests of such a thread, unless
 * all levels only observe. */
static void name_unrecorded(u32 tgid, u64 function)
{
    struct fgpu_call f = {.function = function};
    u64 levels[FGPU_LEVELS] = {}, observed = FGPU_OBSERVE, any = bpf_ktime_get_ns();
    if (!takes(function) || !find_levels(levels)) return;
    struct fgpu_process *p = processes.lookup(&tgid);
    int full = 0;
    if (!p || !p->space) lender(&tgid, current_space(), &full);
    if (p && retains(function) && on(p, p->last_device)->primary) return; /* a further reference */
    struct fgpu_usage_page *leaf = page_of(levels[0]);
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = levels[i] ? page_of(levels[i]) : 0;
        observed = forget(observed & (page ? page->flags : FGPU_OBSERVE), any);
    }
    if (!leaf || observed) return;
    if (!full && !is_crowded(leaf, FGPU_THREADS) && !is_crowded(leaf, FGPU_PROCESSES)) return;
    if (p) {
        name_bypass(p, &f);
        return;
    }
    anomaly(FGPU_ANOMALY_BYPASS);
    tell_urgently(leaf, FGPU_NEWS_BYPASS, 0, 0, operation_of(&f), 0);
}

/* Run call_return again, for the rest of a range with more mappings than one run releases. The kernel permits a chain
 * of 34 programs. Further bytes of a longer range stay charged until NVML shows that the device does not hold these
 * bytes. */
static void go_on(struct pt_regs *ctx, struct fgpu_thread *t, struct fgpu_call *rest)
{
    t->call = *rest;
    again.call(ctx, 0);
    t->call.function = FGPU_FUNCTION_NONE;
}

int call_return(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_thread *t = threads.lookup(&id);
    own_stack(ctx);
    u64 cookie = bpf_get_attach_cookie(ctx);
    if (UNLIKELY(!t) && !(u32)PT_REGS_RC(ctx)) name_unrecorded(tgid, cookie & FGPU_FUNCTION_MASK);
    if (!t || !t->call.function || t->call.function != (cookie & FGPU_FUNCTION_MASK)) return 0;
    struct fgpu_call f = t->call;
    struct fgpu_process *p = owner_of(&tgid);
    if (!p || p->state != READY || t->open != p->generation) return 0; /* charged in an earlier generation */
    t->call.function = FGPU_FUNCTION_NONE;
    u64 lost = lost_with_context(p, &f);
    if (!UNLIKELY((u32)PT_REGS_RC(ctx))) {
        struct fgpu_allocation_key key = {.tgid = tgid, .generation = p->generation};
        struct outcome out = {};
        charge_unseen(p, &f, lost);
        cover(p, &f, late_bytes(p, &f), 1);
        if (!is_trusted(cookie)) distrust(p, f.function);
        out.freed = settle(p, &f, &key, &out, is_trusted(cookie));
        f.function = forget(f.function, p->generation); /* each function leaves other values in this field too */
        out.freed = forget(out.freed, p->generation);
        if (out.new) keep(p, &key, out.bytes, f.device, out.owner);
        release(p, f.device, out.freed);
        orphan_part(p, tgid, f.device, out.orphaned);
        if (UNLIKELY(f.function == FGPU_FUNCTION_UNMAP && f.arguments[1])) go_on(ctx, t, &f);
        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);
    } else {
        if ((u32)PT_REGS_RC(ctx) == OUT_OF_MEMORY && f.bytes) device_full(p, f.device, operation_of(&f), f.bytes);
        put_back(p, tgid, &f);
    }
    end_opening(p, &f);
    quiet(p, t);
    return 0;
}
