/* settle.bpf.h: how a driver call ended: what it adds is entered, what it frees is answered, in bytes. */

/* What is told apart within a process's bytes, less what is freed of it. */
static void lower_parts(struct fgpu_process *p, u32 device, u64 bytes, int handle, u64 managed, u64 exported)
{
    struct fgpu_holding *has = on(p, device);
    if (!bytes) return;
    if (handle || managed) subtract(handle ? &has->vmm : &has->managed, bytes);
    if (exported) subtract(handle ? &has->exported_vmm : &has->exported, bytes);
}

/* A charge whose end nobody saw. NVML may have taken it out of the overhead already, unless it was managed: then that
 * comes back, and nothing is released twice. */
static void let_stale_go(struct fgpu_process *p, int handle, struct fgpu_allocation *old)
{
    u64 back = !handle && old->owner ? 0 : take_cut(p, old->device, old->bytes);
    anomaly(FGPU_ANOMALY_STALE);
    add_overhead(p, old->device, back);
    lower_parts(p, old->device, old->bytes, handle, old->owner, old->exported);
    let_go(p, old->device, old->bytes - back, !!old->exported);
}

/* Enters a new handle; an older charge of the same name is one whose end nobody saw. */
static void keep(struct fgpu_process *p, struct fgpu_allocation_key *key, u64 bytes, u32 device, u64 owner)
{
    struct fgpu_allocation value = {
        .bytes = bytes, .device = device, .era = on(p, device)->era, .references = 1, .owner = owner};
    if (!UNLIKELY(enter_allocation(key, &value, levels_of(p, p->turn)))) return;
    struct fgpu_allocation *old = allocations.lookup(key);
    if (!old) return;
    if (old->bytes && old->era == on(p, old->device)->era) let_stale_go(p, key->space == FGPU_SPACE_HANDLE, old);
    value.level = old->level;
    allocations.update(key, &value);
}

static void tally_witnessed(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_at(levels_of(p, p->turn));
    if (page) __sync_fetch_and_add(&page->tallies[slot(device)].witnessed, bytes);
}

/* All that lived in the device's contexts is gone with the last; VMM handles belong to the process. */
static u64 end_context(struct fgpu_process *p, u32 device, u64 *orphaned)
{
    u64 *known, bytes = on(p, device)->bytes, vmm = on(p, device)->vmm;
    device &= DEVICE_MASK;
    s64 left = one_less(&on(p, device)->contexts);
    if (left < 0) return 0;
    if (left) {
        known = contexts.lookup(&device);
        s64 overhead = on(p, device)->overhead, own = known ? *known : 0;
        if (own > overhead) own = overhead;
        if (own <= 0) return 0;
        add_overhead(p, device, -own);
        return own;
    }
    u64 open = p->flags & FGPU_SEEN_EXPORT ? bytes : on(p, device)->exported;
    on(p, device)->overhead = 0;
    on(p, device)->doubtful = 0;
    on(p, device)->managed = 0;
    on(p, device)->pool = 0;
    on(p, device)->exported = 0;
    on(p, device)->era++;
    bytes = bytes > vmm ? bytes - vmm : 0;
    if (open > bytes) open = bytes;
    *orphaned = open;
    return bytes - open;
}

static u64 end_primary(struct fgpu_process *p, u32 device, u64 *orphaned)
{
    device &= DEVICE_MASK;
    if (!__sync_val_compare_and_swap(&on(p, device)->primary, 1, 0)) return 0;
    return end_context(p, device, orphaned);
}

/* A context has come to be. Its bytes are overhead: NVML corrects them. */
static void begin_context(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    add_overhead(p, device, f->bytes);
    __sync_fetch_and_add(&on(p, device)->contexts, 1);
    p->last_device = device;
}

/* The first reference makes the context; else another thread was first, or it was there: what was admitted goes. The
 * reference itself was counted before the driver did: who releases meanwhile must not take it for the last. */
static u64 retained(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    if (__sync_val_compare_and_swap(&on(p, device)->primary, 0, 1)) return f->bytes;
    begin_context(p, f);
    return 0;
}

/* A mapping refers to its handle; `key` names the handle and is made to name the mapping. */
static void mapped(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    key->space = FGPU_SPACE_HANDLE;
    key->handle = f->arguments[2];
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a) return;
    __sync_fetch_and_add(&a->references, 1);
    struct fgpu_allocation value = {
        .bytes = f->arguments[1], .device = a->device, .references = 1, .owner = f->arguments[2]};
    key->space = FGPU_SPACE_MAPPING;
    key->handle = f->arguments[0];
    enter_allocation(key, &value, levels_of(p, p->turn));
}

/* One reference less; the last one frees the memory. */
static void drop_reference(struct fgpu_process *p, struct fgpu_allocation_key *key)
{
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a || __sync_fetch_and_add(&a->references, -1ULL) != 1) return;
    u64 bytes = a->bytes, exported = a->exported;
    u32 device = a->device;
    delete_allocation(key, a);
    subtract(&on(p, device)->vmm, bytes);
    if (exported) subtract(&on(p, device)->exported_vmm, bytes);
    let_go(p, device, bytes, !!exported);
}

/* (pointer, bytes): may cover several mappings, one after the other. */
static void unmapped(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    u64 at = f->arguments[0], end = at + f->arguments[1];
    for (int i = 0; i < SPAN && at < end; i++) {
        key->space = FGPU_SPACE_MAPPING;
        key->handle = at;
        struct fgpu_allocation *mapping = allocations.lookup(key);
        if (!mapping) break;
        u64 bytes = mapping->bytes, owner = mapping->owner;
        delete_allocation(key, mapping);
        key->space = FGPU_SPACE_HANDLE;
        key->handle = owner;
        drop_reference(p, key);
        at += bytes;
    }
}

static u64 device_of_ordinal(struct fgpu_process *p, struct fgpu_allocation_key *key, u32 ordinal)
{
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = ordinal;
    struct fgpu_allocation *a = allocations.lookup(key);
    return (a ? a->device : ordinal) & DEVICE_MASK;
}

/* What the call gave stands where its first argument points. */
static u64 given(struct fgpu_call *f)
{
    u64 handle = 0;
    bpf_probe_read_user(&handle, sizeof(handle), (void *)f->arguments[0]);
    return handle;
}

/* What comes of a call that succeeded: bytes freed on its device, and those freed that others may have open; and a
 * handle that is new. */
struct outcome {
    u64 freed, orphaned;
    u64 bytes, owner;
    int new;
};

static void allocated(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key, struct outcome *out)
{
    if (!f->bytes) return; /* host memory, or none yet */
    if (f->function == FGPU_FUNCTION_ALLOC_MANAGED) {
        __sync_fetch_and_add(&on(p, f->device)->managed, f->bytes);
        out->owner = 1;
    }
    if (f->function == FGPU_FUNCTION_CREATE) __sync_fetch_and_add(&on(p, f->device)->vmm, f->bytes);
    key->space = f->function == FGPU_FUNCTION_CREATE  ? FGPU_SPACE_HANDLE
                 : f->function >= FGPU_FUNCTION_ARRAY ? FGPU_SPACE_ARRAY
                                                      : FGPU_SPACE_POINTER;
    key->handle = given(f);
    tally_witnessed(p, f->device, f->bytes);
    out->bytes = f->bytes;
    out->new = 1;
}

static void context_made(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key,
                         struct outcome *out)
{
    begin_context(p, f);
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = given(f);
    out->new = 1;
}

/* Bytes that are known only now: of a pitched allocation; of a context that nobody asked about. Else those that did not
 * fit when the call began, if there were any. */
static u64 late_bytes(struct fgpu_process *p, struct fgpu_call *f)
{
    u64 pitch = 0, *known;
    u32 device = f->device & DEVICE_MASK;
    switch (f->function) {
    case FGPU_FUNCTION_ALLOC_PITCH:
        if (!f->bytes && !f->uncovered) return 0;
        bpf_probe_read_user(&pitch, sizeof(pitch), (void *)f->arguments[1]);
        return pitch_bytes(pitch, f->arguments[2]);
    case FGPU_FUNCTION_RETAIN:
        if (on(p, device)->primary) return 0; /* fallthrough */
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        known = contexts.lookup(&device);
        return !f->admitted && !(p->flags & FGPU_SEEN_SHIM) && known ? *known : 0;
    default:
        return f->uncovered;
    }
}

static u64 freed(struct fgpu_process *p, struct fgpu_call *f, u64 *orphaned)
{
    int handle = f->function == FGPU_FUNCTION_RELEASE;
    lower_parts(p, f->device, f->bytes, handle, f->arguments[2], f->exported);
    if (!f->exported && !(p->flags & FGPU_SEEN_EXPORT)) return f->bytes;
    *orphaned = f->bytes;
    return 0;
}

/* Another process may open what `space` and `handle` name. A pointer into the middle of an allocation has no entry. */
static void exported(struct fgpu_process *p, struct fgpu_allocation_key *key, u32 space, u64 handle)
{
    key->space = space;
    key->handle = handle;
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a) {
        p->flags |= FGPU_SEEN_EXPORT;
        return;
    }
    if (a->exported) return;
    a->exported = 1;
    u64 *sum = space == FGPU_SPACE_HANDLE ? &on(p, a->device)->exported_vmm : &on(p, a->device)->exported;
    __sync_fetch_and_add(sum, a->bytes);
}

/* The call succeeded; answers the bytes that it freed. `key` has the process's name. */
static u64 settle(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key, struct outcome *out)
{
    u64 bytes;
    switch (f->function) {
    case FGPU_FUNCTION_FREE:
    case FGPU_FUNCTION_RELEASE:
    case FGPU_FUNCTION_ARRAY_DESTROY:
        return freed(p, f, &out->orphaned);
    case FGPU_FUNCTION_DESTROY:
        return f->references ? end_context(p, f->device, &out->orphaned) : 0;
    case FGPU_FUNCTION_MAP:
        mapped(p, f, key);
        return 0;
    case FGPU_FUNCTION_UNMAP:
        unmapped(p, f, key);
        return 0;
    case FGPU_FUNCTION_RETAIN_HANDLE: {
        key->space = FGPU_SPACE_HANDLE;
        key->handle = given(f);
        struct fgpu_allocation *a = allocations.lookup(key);
        if (a) __sync_fetch_and_add(&a->references, 1);
        return 0;
    }
    case FGPU_FUNCTION_EXPORT:
        exported(p, key, FGPU_SPACE_HANDLE, f->arguments[1]);
        return 0;
    case FGPU_FUNCTION_EXPORT_POINTER:
        exported(p, key, FGPU_SPACE_POINTER, f->arguments[1]);
        return 0;
    case FGPU_FUNCTION_RETAIN:
        bytes = retained(p, f);
        key->space = FGPU_SPACE_CONTEXT;
        key->handle = (u32)f->arguments[1]; /* CUDA's ordinal -> the ledger's index */
        out->new = 1;
        return bytes;
    case FGPU_FUNCTION_PRIMARY_RESET: /* its references stay */
        f->device = device_of_ordinal(p, key, f->arguments[0]);
        return end_primary(p, f->device, &out->orphaned);
    case FGPU_FUNCTION_PRIMARY_RELEASE:
        f->device = device_of_ordinal(p, key, f->arguments[0]);
        if (one_less(&on(p, f->device)->retained)) return 0;
        return end_primary(p, f->device, &out->orphaned);
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        context_made(p, f, key, out);
        return 0;
    default:
        allocated(p, f, key, out);
        return 0;
    }
}

#define OUT_OF_MEMORY 2 /* CUDA_ERROR_OUT_OF_MEMORY */

/* It succeeded, and nobody had asked, or for less. A call that fails (after a fork, without a context) names nobody. */
static void name_bypass(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 known = p->flags & FGPU_SEEN_BYPASS;
    p->flags |= FGPU_SEEN_BYPASS;
    anomaly(FGPU_ANOMALY_BYPASS);
    if (!known) tell(page_of(p->levels[0]), FGPU_NEWS_BYPASS, f->device, f->uncovered, operation_of(f), 0);
}

int call_return(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_thread *t = threads.lookup(&id);
    own_stack(ctx);
    if (!t || !t->call.function || t->call.function != bpf_get_attach_cookie(ctx)) return 0;
    struct fgpu_call f = t->call;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->state != READY || t->open != p->generation) return 0; /* charged to an earlier life */
    t->call.function = FGPU_FUNCTION_NONE;
    if (!UNLIKELY((u32)PT_REGS_RC(ctx))) {
        struct fgpu_allocation_key key = {.tgid = tgid, .generation = p->generation};
        struct outcome out = {};
        cover(p, &f, late_bytes(p, &f), 1);
        out.freed = settle(p, &f, &key, &out);
        if (out.new) keep(p, &key, out.bytes, f.device, out.owner);
        for (int i = 0; i < 2; i++) let_go(p, f.device, i ? out.orphaned : out.freed, i);
        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);
    } else {
        if ((u32)PT_REGS_RC(ctx) == OUT_OF_MEMORY && f.bytes) device_full(p, f.device, operation_of(&f), f.bytes);
        put_back(p, tgid, &f);
    }
    quiet(p, t);
    return 0;
}
