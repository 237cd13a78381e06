/*
 * fgpu.bpf.c: witness and bookkeeper. Admits, charges and releases, per cgroup and device; decides no policy.
 *
 * Order everywhere: a charge goes to the levels first and to the process second, a release the other way round, so
 * that a level never holds less than its processes do. One word, `bytes`, is what a process's end takes back.
 *
 * The loader puts PINS (a folder in bpffs) and SPARSE (BPF_F_NO_PREALLOC where the kernel may) on the command line.
 */
#include "fgpu.h"

#define VERDICT_MASK (FGPU_VERDICTS - 1)
#define DEVICE_MASK (FGPU_DEVICES - 1)
#define TICKET_MASK ((1ULL << 62) - 1)
#define DEPTH 16 /* cgroups below the root that are looked at */
#define TRIES 8
#define SPAN 32 /* mappings that one unmap may cover */
#define READY 2
#define OBSERVED 4 /* beside the verdicts: admitted because nobody enforces */

BPF_F_TABLE("array", u32, struct fgpu_usage_page, page_template, 1, 1U << 10 /* BPF_F_MMAPABLE */);
BPF_TABLE_PINNED("hash_of_maps$page_template", u64, int, pages, 4096, PINS "pages");
BPF_TABLE_PINNED("hash", u64, u32, resolved, 16384, PINS "resolved", SPARSE);
BPF_TABLE_PINNED("hash", struct fgpu_level_device, struct fgpu_limit, limits, 65536, PINS "limits", SPARSE);
BPF_TABLE_PINNED("hash", u32, struct fgpu_process, processes, 16384, PINS "processes", SPARSE);
BPF_TABLE_PINNED("hash", struct fgpu_allocation_key, struct fgpu_allocation, allocations, 262144, PINS "allocations",
                 SPARSE);
BPF_TABLE_PINNED("hash", u64, struct fgpu_thread, threads, 65536, PINS "threads", SPARSE);
BPF_TABLE_PINNED("array", u32, u64, contexts, FGPU_DEVICES, PINS "contexts");
BPF_TABLE_PINNED("array", u32, struct fgpu_device, devices, FGPU_DEVICES, PINS "devices");
BPF_TABLE_PINNED("hash", struct fgpu_file, u32, files, 4096, PINS "files", SPARSE);
BPF_TABLE_PINNED("array", u32, u64, host, 4, PINS "host"); /* 0: epoch, 1: flags for control pages */
BPF_TABLE_PINNED("hash", struct fgpu_counter_key, u64, counters, 65536, PINS "counters", SPARSE);
BPF_ARRAY(blanks, struct fgpu_process, 1); /* never written: too large for the stack */

/* -- small things ------------------------------------------------------------------------------------------------ */

/* A device as an index that the verifier believes: masked where it is used, whatever the compiler remembers. */
static u64 slot(u64 device)
{
    __asm__ volatile("" : "+r"(device));
    device &= DEVICE_MASK;
    return device;
}

static struct fgpu_usage_page *page_of(u64 cgroup)
{
    void *inner = pages.lookup(&cgroup);
    u32 zero = 0;
    return inner ? bpf_map_lookup_elem(inner, &zero) : 0;
}

static void count(u64 cgroup, u32 device, u16 kind, u16 reason)
{
    struct fgpu_counter_key key = {.cgroup = cgroup, .device = device, .kind = kind, .reason = reason};
    u64 zero = 0, *n = counters.lookup(&key);
    if (!n) {
        counters.insert(&key, &zero);
        n = counters.lookup(&key);
    }
    if (n) __sync_fetch_and_add(n, 1);
}

static void anomaly(u16 what) { count(0, 0, FGPU_KINDS, what); }

/* Subtracts; what would go below zero is given back and counted. */
static void subtract(u64 *word, u64 bytes)
{
    u64 was = __sync_fetch_and_add(word, -bytes);
    if (was < bytes) {
        __sync_fetch_and_add(word, bytes - was);
        anomaly(FGPU_ANOMALY_RELEASE);
    }
}

/* -- levels ------------------------------------------------------------------------------------------------------ */

static int fits(struct fgpu_usage_page *page, u32 device, u64 bytes)
{
    struct fgpu_usage *usage = &page->devices[slot(device)];
    u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit;
    return used + bytes <= limit;
}

/* Takes only what fits: to add first and undo later would fail neighbours that fit. */
static int take(struct fgpu_usage_page *page, u32 device, u64 bytes, int force)
{
    struct fgpu_usage *usage = &page->devices[slot(device)];
    for (int i = 0; i < TRIES; i++) {
        u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit, now = used + bytes;
        int over = now > limit;
        if (over && !force && !(page->flags & FGPU_OBSERVE)) return FGPU_REFUSED;
        if (__sync_val_compare_and_swap(&usage->used, used, now) != used) continue;
        u64 peak = *(volatile u64 *)&usage->peak;
        if (now > peak) __sync_val_compare_and_swap(&usage->peak, peak, now);
        return over ? OBSERVED : limit == FGPU_NO_LIMIT ? FGPU_UNLIMITED : FGPU_ADMITTED;
    }
    if (!force) return FGPU_AGAIN;
    __sync_fetch_and_add(&usage->used, bytes);
    return FGPU_ADMITTED;
}

/* The pages of a process's levels, looked up once; 0: no longer managed. Loops over them are unrolled: the verifier
 * follows pointers on the stack only at places that it knows. */
struct held {
    struct fgpu_usage_page *page[FGPU_LEVELS];
};
#define EACH_LEVEL _Pragma("unroll") for (int i = 0; i < FGPU_LEVELS; i++)

static void look_up(struct fgpu_process *p, struct held *h)
{
    EACH_LEVEL h->page[i] = i < p->level_count ? page_of(p->levels[i]) : 0;
}

static void give_back_levels(struct held *h, u32 device, u64 bytes, u32 below)
{
    EACH_LEVEL if (i < below && h->page[i]) subtract(&h->page[i]->devices[slot(device)].used, bytes);
}

/* All levels are looked at before any is touched, so that an asker who never fits disturbs nobody. */
static int refused_by_a_level(struct held *h, u32 device, u64 bytes, u32 kind)
{
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = h->page[i];
        if (!page || fits(page, device, bytes)) continue;
        if (page->flags & FGPU_OBSERVE) {
            count(page->cgroup, device, kind, FGPU_REASON_OBSERVED);
            continue;
        }
        __sync_fetch_and_add(&page->devices[slot(device)].refused, 1);
        count(page->cgroup, device, kind, FGPU_REASON_LIMIT);
        return 1;
    }
    return 0;
}

static int take_levels(struct held *h, u32 device, u64 bytes, int force)
{
    int verdict = FGPU_UNLIMITED;
    EACH_LEVEL
    {
        if (!h->page[i]) continue;
        int got = take(h->page[i], device, bytes, force);
        if (got == FGPU_REFUSED || got == FGPU_AGAIN) { /* it fitted a moment ago: somebody was quicker */
            give_back_levels(h, device, bytes, i);
            return FGPU_AGAIN;
        }
        if (got != FGPU_UNLIMITED) verdict = FGPU_ADMITTED;
    }
    return verdict;
}

/* Whatever changes a process's numbers stands between these two: the agent corrects none that is in the middle of it.
 */
static void begin(struct fgpu_process *p) { __sync_fetch_and_add(&p->begun, 1); }
static void end(struct fgpu_process *p) { __sync_fetch_and_add(&p->changes, 1); }

static int charge(struct fgpu_process *p, struct held *h, u32 device, u64 bytes, int force)
{
    int verdict = take_levels(h, device, bytes, force);
    if (verdict != FGPU_AGAIN) __sync_fetch_and_add(&p->bytes[slot(device)], bytes);
    return verdict;
}

static void release(struct fgpu_process *p, u32 device, u64 bytes)
{
    device &= DEVICE_MASK;
    struct held h;
    if (!bytes) return;
    look_up(p, &h);
    subtract(&p->bytes[slot(device)], bytes);
    give_back_levels(&h, device, bytes, FGPU_LEVELS);
}

/* -- processes --------------------------------------------------------------------------------------------------- */

/* The managed cgroups of the current task, leaf first. */
static u32 find_levels(u64 *levels)
{
    u32 n = 0;
    for (int i = 0; i < DEPTH; i++) {
        u64 id = bpf_get_current_ancestor_cgroup_id(DEPTH - 1 - i);
        if (!id || n >= FGPU_LEVELS || !pages.lookup(&id)) continue;
        levels[n & (FGPU_LEVELS - 1)] = id;
        n++;
    }
    return n;
}

static void name_process(struct fgpu_process *p, u64 *levels, u32 n)
{
    for (int i = 0; i < FGPU_LEVELS; i++) p->levels[i] = levels[i];
    p->level_count = n;
    p->generation = bpf_ktime_get_ns();
    __sync_fetch_and_add(&p->state, 1); /* claimed -> ready; orders the stores before it */
}

/* The entry of the current process, made when it is managed and has none; 0: unmanaged, or the map is full. */
static struct fgpu_process *own_process(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid), *blank;
    u64 levels[FGPU_LEVELS] = {};
    u32 zero = 0, n;
    if (p) return p->state == READY ? p : 0;
    n = find_levels(levels);
    if (!n) return 0;
    blank = blanks.lookup(&zero);
    if (!blank) return 0;
    processes.insert(&tgid, blank);
    p = processes.lookup(&tgid);
    if (!p) {
        anomaly(FGPU_ANOMALY_FULL);
        return 0;
    }
    if (__sync_val_compare_and_swap(&p->state, 0, 1)) return 0; /* another thread is naming it */
    name_process(p, levels, n);
    return p;
}

static void release_all(struct fgpu_process *p)
{
    struct held h;
    look_up(p, &h);
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        u64 bytes = p->bytes[d];
        if (!bytes) continue;
        __sync_fetch_and_add(&p->bytes[d], -bytes);
        give_back_levels(&h, d, bytes, FGPU_LEVELS);
    }
}

static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_call *f);

/* What a thread leaves behind: an admission that nothing settled, a call that never returned. */
static void end_thread(u64 id)
{
    struct fgpu_thread *t = threads.lookup(&id);
    u32 tgid = id >> 32;
    if (!t) return;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (p) {
        begin(p);
        release(p, t->admission.device, t->admission.bytes);
        if (t->call.function) put_back(p, tgid, &t->call);
        end(p);
    }
    threads.delete(&id);
}

static void end_process(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p) return;
    release_all(p);
    processes.delete(&tgid);
}

int process_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread(id);
    if (ctx->args[1]) end_process(id >> 32); /* group_dead: never pid == tgid, the leader may leave first */
    return 0;
}

int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread((id >> 32 << 32) | (u32)ctx->args[1]); /* the thread's own number before it became the leader */
    end_process(id >> 32);
    return 0;
}

/* -- admission --------------------------------------------------------------------------------------------------- */

static struct fgpu_thread *own_thread(u64 id)
{
    struct fgpu_thread *t = threads.lookup(&id), none = {};
    if (t) return t;
    threads.insert(&id, &none);
    t = threads.lookup(&id);
    if (!t) anomaly(FGPU_ANOMALY_FULL);
    return t;
}

static int granted(u64 verdict) { return verdict == FGPU_ADMITTED || verdict == FGPU_UNLIMITED; }

static void grant(struct fgpu_process *p, struct held *h, struct fgpu_admission *a, u32 device, u64 bytes)
{
    if (a->kind != FGPU_CONTEXT && h->page[0]) __sync_fetch_and_add(&h->page[0]->tallies[slot(device)].admitted, bytes);
    if (a->kind == FGPU_POOL) /* committed at once */
        __sync_fetch_and_add(&p->pool[slot(device)], bytes);
    else
        a->bytes = bytes;
}

static u64 ask(struct fgpu_process *p, struct held *h, struct fgpu_thread *t, u32 device, u64 bytes, u32 kind,
               u64 ticket)
{
    struct fgpu_admission *a = &t->admission;
    if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;
    if (a->bytes) {
        begin(p);
        release(p, a->device, a->bytes); /* an older one that nothing settled */
        a->bytes = 0;
        end(p);
    }
    a->ticket = ticket;
    a->device = device;
    a->kind = kind;
    a->verdict = FGPU_REFUSED;
    if (device >= FGPU_DEVICES) {
        anomaly(FGPU_ANOMALY_DEVICE);
        return FGPU_REFUSED;
    }
    if (kind == FGPU_CONTEXT) {
        u64 *known = contexts.lookup(&device);
        bytes = known ? *known : 0;
    }
    if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES; /* fits nowhere, and no sum with it overflows */
    if (refused_by_a_level(h, device, bytes, kind)) return FGPU_REFUSED;
    begin(p);
    a->verdict = charge(p, h, device, bytes, 0);
    if (granted(a->verdict)) grant(p, h, a, device, bytes);
    end(p);
    return a->verdict;
}

int admit(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), ticket = PT_REGS_PARM4(ctx) & TICKET_MASK, verdict = FGPU_ADMITTED;
    u32 kind = PT_REGS_PARM3(ctx);
    struct fgpu_process *p = own_process(id >> 32);
    struct fgpu_thread *t = p ? own_thread(id) : 0;
    struct held h;
    if (!t) return 0; /* no answer: the shim says hello again */
    look_up(p, &h);
    if (!h.page[0]) return 0;
    if (kind == FGPU_HELLO)
        p->flags |= FGPU_SEEN_SHIM;
    else
        verdict = ask(p, &h, t, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), kind < FGPU_KINDS ? kind : FGPU_MEMORY, ticket);
    *(volatile u64 *)&h.page[0]->verdicts[ticket & VERDICT_MASK] = ticket << 2 | verdict;
    return 0;
}

/* Pool bytes only, and never more than the process has. */
int give_back(struct pt_regs *ctx)
{
    u64 bytes = PT_REGS_PARM2(ctx);
    u32 device = PT_REGS_PARM1(ctx), kind = PT_REGS_PARM3(ctx), tgid = bpf_get_current_pid_tgid() >> 32;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->state != READY || kind != FGPU_POOL || device >= FGPU_DEVICES) return 0;
    begin(p);
    for (int i = 0; i < TRIES; i++) {
        u64 was = *(volatile u64 *)&p->pool[slot(device)], less = bytes < was ? bytes : was;
        if (__sync_val_compare_and_swap(&p->pool[slot(device)], was, was - less) != was) continue;
        if (less < bytes) anomaly(FGPU_ANOMALY_RELEASE);
        release(p, device, less);
        break;
    }
    end(p);
    return 0;
}

/* -- witness ----------------------------------------------------------------------------------------------------- */

static void add_overhead(struct fgpu_process *p, u32 device, u64 bytes)
{
    __sync_fetch_and_add((u64 *)&p->overhead[slot(device)], bytes);
}

static int frees(u64 function) { return function >= FGPU_FUNCTION_FREE; }

static u32 space_of(u64 function)
{
    return function == FGPU_FUNCTION_RELEASE         ? FGPU_SPACE_HANDLE
           : function == FGPU_FUNCTION_DESTROY       ? FGPU_SPACE_CONTEXT
           : function == FGPU_FUNCTION_ARRAY_DESTROY ? FGPU_SPACE_ARRAY
                                                     : FGPU_SPACE_POINTER;
}

/* A call that failed, or will never be seen to end: what it was charged goes, what it took comes back. */
static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    if (!frees(f->function)) {
        release(p, f->device, f->bytes);
        return;
    }
    if (!f->references) return;
    struct fgpu_allocation_key key = {
        .tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation value = {.bytes = f->bytes,
                                    .device = f->device,
                                    .era = p->era[slot(f->device)],
                                    .references = f->references,
                                    .owner = f->arguments[2]};
    struct fgpu_allocation *there = allocations.lookup(&key);
    if (there)
        __sync_fetch_and_add(&there->references, f->references);
    else
        allocations.update(&key, &value);
}

/* Takes one reference of the allocation into the flight; the last one takes the entry, before the driver can hand
 * the same pointer to another thread. */
static void take_entry(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    struct fgpu_allocation_key key = {
        .tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation *a = allocations.lookup(&key);
    if (!a) return;
    f->device = a->device;
    f->references = 1;
    f->bytes = a->bytes;
    f->arguments[2] = a->owner;
    if (__sync_fetch_and_add(&a->references, -1ULL) != 1) {
        f->bytes = 0;
        return;
    }
    if (a->era != p->era[slot(a->device)] && f->function != FGPU_FUNCTION_RELEASE)
        f->bytes = 0; /* went with its context */
    allocations.delete(&key);
}

/* The witnessed size, if larger than what was admitted, is charged all the same: the driver will hand it out. */
static void cover(struct fgpu_process *p, struct fgpu_call *f, u64 bytes)
{
    if (bytes <= f->bytes || bytes > FGPU_MOST_BYTES) return;
    struct held h;
    look_up(p, &h);
    p->flags |= FGPU_SEEN_BYPASS;
    anomaly(FGPU_ANOMALY_BYPASS);
    charge(p, &h, f->device, bytes - f->bytes, 1);
    f->bytes = bytes;
}

static int same_call(struct fgpu_call *a, struct fgpu_call *b)
{
    return a->function == b->function && a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1];
}

/* CUDA_ARRAY3D_DESCRIPTOR, and CUDA_ARRAY_DESCRIPTOR but for the depth. */
struct shape {
    u64 width, height, depth;
    u32 format, channels, flags;
};
#define NO_MEMORY_YET 0xc0 /* CUDA_ARRAY3D_SPARSE, _DEFERRED_MAPPING */
#define MOST_EXTENT (1 << 17)

static u64 element_bytes(u32 format)
{
    if (format == 1 || format == 8) return 1;
    if (format == 2 || format == 9 || format == 0x10) return 2;
    return 4; /* 32 bits; compressed and planar formats take no more than this */
}

static u64 extent(u64 n, u32 level)
{
    n = n > MOST_EXTENT ? MOST_EXTENT : n;
    n >>= level & 31;
    return n ? n : 1;
}

/* At least these bytes: for a call that nobody asked about. The driver pads; NVML tells by how much. */
static u64 shape_bytes(u64 function, void *descriptor, u32 levels)
{
    struct shape s = {.depth = 1};
    u64 bytes = 0, element;
    if (function == FGPU_FUNCTION_ARRAY) {
        bpf_probe_read_user(&s, 16, descriptor);
        bpf_probe_read_user(&s.format, 8, descriptor + 16);
    } else {
        bpf_probe_read_user(&s, 36, descriptor);
    }
    if (s.flags & NO_MEMORY_YET) return 0;
    if (function != FGPU_FUNCTION_ARRAY_MIPMAPPED) levels = 1;
    element = element_bytes(s.format) * (s.channels & 7);
    for (u32 i = 0; i < 18 && i < levels; i++)
        bytes += extent(s.width, i) * extent(s.height, i) * extent(s.depth, i) * element;
    return bytes;
}

/* CUmemAllocationProp: the location's type stands at byte 8, its id at 12; 1 is a device. */
static u64 create_bytes(struct fgpu_call *f, void *prop)
{
    u32 location[2] = {};
    bpf_probe_read_user(location, sizeof(location), prop + 8);
    f->device = location[1];
    return location[0] == 1 ? f->arguments[1] : 0;
}

#define MOST_HEIGHT (1 << 15)
static u64 pitch_bytes(u64 pitch, u64 height)
{
    return pitch < FGPU_MOST_BYTES && height < MOST_HEIGHT ? pitch * height : pitch;
}

/* What the driver is asked for, as far as its arguments say, and on which device: CUDA's ordinal, which an admission
 * replaces by the ledger's index. */
static u64 asked_bytes(struct pt_regs *ctx, struct fgpu_call *f)
{
    f->device = FGPU_DEVICES; /* not said: the process's last */
    switch (f->function) {
    case FGPU_FUNCTION_ALLOC:
    case FGPU_FUNCTION_ALLOC_MANAGED:
        return f->arguments[1];
    case FGPU_FUNCTION_ALLOC_PITCH:
        return pitch_bytes(PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx));
    case FGPU_FUNCTION_ARRAY:
    case FGPU_FUNCTION_ARRAY_3D:
    case FGPU_FUNCTION_ARRAY_MIPMAPPED:
        return shape_bytes(f->function, (void *)PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx));
    case FGPU_FUNCTION_CREATE:
        return create_bytes(f, (void *)PT_REGS_PARM3(ctx));
    case FGPU_FUNCTION_RETAIN:
        f->device = PT_REGS_PARM2(ctx);
        return 0;
    case FGPU_FUNCTION_CONTEXT_V2:
        f->device = PT_REGS_PARM3(ctx);
        return 0;
    case FGPU_FUNCTION_CONTEXT_V3:
        f->device = PT_REGS_PARM5(ctx);
        return 0;
    case FGPU_FUNCTION_CONTEXT_V4:
        f->device = PT_REGS_PARM4(ctx);
        return 0;
    default:
        return 0;
    }
}

/* The call takes over what its thread was admitted. */
static void take_over(struct fgpu_admission *a, struct fgpu_call *f)
{
    if (granted(a->verdict)) {
        f->bytes = a->bytes;
        f->device = a->device & DEVICE_MASK;
        f->admitted = 1;
    }
    a->ticket = 0;
    a->bytes = 0;
}

static void entered(struct pt_regs *ctx, struct fgpu_process *p, u32 tgid, struct fgpu_thread *t)
{
    struct fgpu_call now = {.function = bpf_get_attach_cookie(ctx)};
    now.arguments[0] = PT_REGS_PARM1(ctx);
    now.arguments[1] = PT_REGS_PARM2(ctx);
    now.arguments[2] = PT_REGS_PARM4(ctx); /* of a mapping: the handle; of a pitched allocation: the height */
    int settles = t->admission.ticket && !frees(now.function);
    if (t->call.function) {
        /* A second probe on one file; or a call left by longjmp and made again, for which the old entry serves. */
        if (!settles && same_call(&t->call, &now)) return;
        put_back(p, tgid, &t->call); /* a call left by longjmp */
    }
    u64 bytes = asked_bytes(ctx, &now);
    if (settles) take_over(&t->admission, &now);
    if (now.device >= FGPU_DEVICES) now.device = p->last_device & DEVICE_MASK;
    if (frees(now.function))
        take_entry(p, tgid, &now);
    else
        cover(p, &now, bytes);
    t->call = now;
}

int call_enter(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_process *p = own_process(tgid);
    struct fgpu_thread *t = p ? own_thread(id) : 0;
    if (!t) return 0;
    begin(p);
    entered(ctx, p, tgid, t);
    end(p);
    return 0;
}

/* -- how a call ended: what it adds is entered, what it frees is answered, in bytes ------------------------------- */

/* Enters a new handle; an older charge of the same name is one whose end nobody saw. */
static void keep(struct fgpu_process *p, struct fgpu_allocation_key *key, u64 bytes, u32 device, u64 owner)
{
    struct fgpu_allocation value = {
        .bytes = bytes, .device = device, .era = p->era[slot(device)], .references = 1, .owner = owner};
    struct fgpu_allocation *old = allocations.lookup(key);
    if (old && old->bytes && old->era == p->era[slot(old->device)]) {
        anomaly(FGPU_ANOMALY_STALE);
        release(p, old->device, old->bytes);
    }
    if (allocations.update(key, &value)) anomaly(FGPU_ANOMALY_FULL);
}

static void tally_witnessed(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_of(p->levels[0]);
    if (page) __sync_fetch_and_add(&page->tallies[slot(device)].witnessed, bytes);
}

/* All that lived in the device's contexts is gone with the last; VMM handles belong to the process. */
static u64 end_context(struct fgpu_process *p, u32 device)
{
    u64 *known, bytes = p->bytes[slot(device)], vmm = p->vmm[slot(device)];
    device &= DEVICE_MASK;
    if (!p->contexts[slot(device)]) return 0;
    if (--p->contexts[slot(device)]) {
        known = contexts.lookup(&device);
        s64 overhead = p->overhead[slot(device)], own = known ? *known : 0;
        if (own > overhead) own = overhead;
        if (own <= 0) return 0;
        add_overhead(p, device, -own);
        return own;
    }
    p->overhead[slot(device)] = 0;
    p->managed[slot(device)] = 0;
    p->pool[slot(device)] = 0;
    p->era[slot(device)]++;
    return bytes > vmm ? bytes - vmm : 0;
}

static u64 end_primary(struct fgpu_process *p, u32 device)
{
    device &= DEVICE_MASK;
    if (!p->primary[slot(device)]) return 0;
    p->primary[slot(device)] = 0;
    return end_context(p, device);
}

/* A context has come to be. Its bytes are overhead: NVML corrects them. Without an admission they are charged here. */
static void begin_context(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    u64 *known = contexts.lookup(&device);
    if (!f->admitted && !(p->flags & FGPU_SEEN_SHIM) && known) cover(p, f, *known);
    add_overhead(p, device, f->bytes);
    p->contexts[slot(device)]++;
    p->last_device = device;
}

/* The first reference makes the context; else another thread was first, or it was there: what was admitted goes. */
static u64 retained(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    p->retained[slot(device)]++;
    if (p->primary[slot(device)]) return f->bytes;
    p->primary[slot(device)] = 1;
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
    if (allocations.update(key, &value)) anomaly(FGPU_ANOMALY_FULL);
}

/* One reference less; the last one frees the memory. */
static void drop_reference(struct fgpu_process *p, struct fgpu_allocation_key *key)
{
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a || __sync_fetch_and_add(&a->references, -1ULL) != 1) return;
    u64 bytes = a->bytes;
    u32 device = a->device;
    allocations.delete(key);
    subtract(&p->vmm[slot(device)], bytes);
    release(p, device, bytes);
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
        allocations.delete(key);
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

static void allocated(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    u64 pitch = 0, owner = 0;
    if (!f->bytes) return; /* host memory, or none yet */
    if (f->function == FGPU_FUNCTION_ALLOC_PITCH) {
        bpf_probe_read_user(&pitch, sizeof(pitch), (void *)f->arguments[1]);
        cover(p, f, pitch_bytes(pitch, f->arguments[2]));
    }
    if (f->function == FGPU_FUNCTION_ALLOC_MANAGED) {
        __sync_fetch_and_add(&p->managed[slot(f->device)], f->bytes);
        owner = 1;
    }
    if (f->function == FGPU_FUNCTION_CREATE) __sync_fetch_and_add(&p->vmm[slot(f->device)], f->bytes);
    key->space = f->function == FGPU_FUNCTION_CREATE  ? FGPU_SPACE_HANDLE
                 : f->function >= FGPU_FUNCTION_ARRAY ? FGPU_SPACE_ARRAY
                                                      : FGPU_SPACE_POINTER;
    key->handle = given(f);
    tally_witnessed(p, f->device, f->bytes);
    keep(p, key, f->bytes, f->device, owner);
}

static void context_made(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    begin_context(p, f);
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = given(f);
    keep(p, key, 0, f->device, 0);
}

static u64 freed(struct fgpu_process *p, struct fgpu_call *f)
{
    u64 *part = f->function == FGPU_FUNCTION_RELEASE ? &p->vmm[slot(f->device)] : &p->managed[slot(f->device)];
    if (f->bytes && (f->function == FGPU_FUNCTION_RELEASE || f->arguments[2])) subtract(part, f->bytes);
    return f->bytes;
}

/* The call succeeded; answers the bytes that it freed on f->device. */
static u64 settle(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    struct fgpu_allocation_key key = {.tgid = tgid, .generation = p->generation};
    u64 bytes;
    switch (f->function) {
    case FGPU_FUNCTION_FREE:
    case FGPU_FUNCTION_RELEASE:
    case FGPU_FUNCTION_ARRAY_DESTROY:
        return freed(p, f);
    case FGPU_FUNCTION_DESTROY:
        return f->references ? end_context(p, f->device) : 0;
    case FGPU_FUNCTION_MAP:
        mapped(p, f, &key);
        return 0;
    case FGPU_FUNCTION_UNMAP:
        unmapped(p, f, &key);
        return 0;
    case FGPU_FUNCTION_RETAIN_HANDLE: {
        key.space = FGPU_SPACE_HANDLE;
        key.handle = given(f);
        struct fgpu_allocation *a = allocations.lookup(&key);
        if (a) __sync_fetch_and_add(&a->references, 1);
        return 0;
    }
    case FGPU_FUNCTION_RETAIN:
        bytes = retained(p, f);
        key.space = FGPU_SPACE_CONTEXT;
        key.handle = (u32)f->arguments[1]; /* CUDA's ordinal -> the ledger's index */
        keep(p, &key, 0, f->device, 0);
        return bytes;
    case FGPU_FUNCTION_PRIMARY_RESET: /* its references stay */
        f->device = device_of_ordinal(p, &key, f->arguments[0]);
        return end_primary(p, f->device);
    case FGPU_FUNCTION_PRIMARY_RELEASE:
        f->device = device_of_ordinal(p, &key, f->arguments[0]);
        if (!p->retained[slot(f->device)] || --p->retained[slot(f->device)]) return 0;
        return end_primary(p, f->device);
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        context_made(p, f, &key);
        return 0;
    default:
        allocated(p, f, &key);
        return 0;
    }
}

int call_return(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_thread *t = threads.lookup(&id);
    if (!t || !t->call.function || t->call.function != bpf_get_attach_cookie(ctx)) return 0;
    struct fgpu_call f = t->call;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->state != READY) return 0;
    begin(p);
    t->call.function = FGPU_FUNCTION_NONE;
    if ((u32)PT_REGS_RC(ctx) == 0)
        release(p, f.device, settle(p, tgid, &f));
    else
        put_back(p, tgid, &f);
    end(p);
    return 0;
}

/* -- adjust: what the agent enters, run by BPF_PROG_TEST_RUN ----------------------------------------------------- */

static int publish(u64 cgroup)
{
    struct fgpu_usage_page *page = page_of(cgroup);
    if (!page) return -2;
    u64 flags = 0;
    page->version = FGPU_LAYOUT;
    page->cgroup = cgroup;
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        struct fgpu_level_device key = {.cgroup = cgroup, .device = d};
        struct fgpu_limit *limit = limits.lookup(&key);
        *(volatile u64 *)&page->devices[d].limit = limit ? limit->bytes : 0;
        if (limit) flags |= limit->flags;
    }
    page->flags = flags;
    return 0;
}

static int set_overhead(u32 tgid, u64 generation, u32 device, s64 bytes, u64 changes)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->generation != generation) return -3;
    if (p->begun != changes || p->changes != changes) return -11;
    device &= DEVICE_MASK;
    s64 more = bytes - p->overhead[slot(device)];
    struct held h;
    look_up(p, &h);
    begin(p);
    if (more > 0) charge(p, &h, device, more, 1);
    if (more < 0) release(p, device, -more);
    add_overhead(p, device, more);
    end(p);
    return 0;
}

static void move_charges(struct fgpu_process *p, int away)
{
    struct held h;
    look_up(p, &h);
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        u64 bytes = p->bytes[d];
        if (!bytes) continue;
        if (away)
            give_back_levels(&h, d, bytes, FGPU_LEVELS);
        else
            take_levels(&h, d, bytes, 1);
    }
}

static int move(u32 tgid, u64 generation, u32 n, u64 *levels)
{
    struct fgpu_process *p = processes.lookup(&tgid), *blank;
    u32 zero = 0;
    if (!p) {
        blank = blanks.lookup(&zero);
        if (generation || !blank) return -3;
        processes.insert(&tgid, blank);
        p = processes.lookup(&tgid);
        if (!p) return -7;
        if (__sync_val_compare_and_swap(&p->state, 0, 1)) return -11;
        name_process(p, levels, n);
        return 0;
    }
    if (p->generation != generation) return -3;
    move_charges(p, 1);
    for (int i = 0; i < FGPU_LEVELS; i++) p->levels[i] = levels[i];
    p->level_count = n;
    move_charges(p, 0);
    if (!n) processes.delete(&tgid); /* no longer managed */
    return 0;
}

static int reap(u32 tgid, u64 generation)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->generation != generation) return -3;
    end_process(tgid);
    return 0;
}

int adjust(struct bpf_raw_tracepoint_args *ctx)
{
    u64 levels[FGPU_LEVELS] = {ctx->args[4], ctx->args[5], ctx->args[6], ctx->args[7]};
    switch (ctx->args[0]) {
    case FGPU_PUBLISH:
        return publish(ctx->args[1]);
    case FGPU_OVERHEAD:
        return set_overhead(ctx->args[1], ctx->args[2], ctx->args[3], ctx->args[4], ctx->args[5]);
    case FGPU_MOVE:
        return move(ctx->args[1], ctx->args[2], ctx->args[3], levels);
    case FGPU_REAP:
        return reap(ctx->args[1], ctx->args[2]);
    default:
        return -22;
    }
}
