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

enum function { ALLOC, MANAGED, PITCH, FREE, CREATE, MAP, UNMAP, RELEASE, RETAIN_HANDLE, RETAIN, PRIMARY_RELEASE, PRIMARY_RESET, CONTEXT, DESTROY, ARRAY, ARRAY_DESTROY };

BPF_F_TABLE("array", u32, struct fgpu_usage_page, page_template, 1, 1U << 10 /* BPF_F_MMAPABLE */);
BPF_TABLE_PINNED("hash_of_maps$page_template", u64, int, pages, 4096, PINS "pages");
BPF_TABLE_PINNED("hash", u64, u32, resolved, 16384, PINS "resolved", SPARSE);
BPF_TABLE_PINNED("hash", struct fgpu_level_device, struct fgpu_limit, limits, 65536, PINS "limits", SPARSE);
BPF_TABLE_PINNED("hash", u32, struct fgpu_process, processes, 16384, PINS "processes", SPARSE);
BPF_TABLE_PINNED("hash", struct fgpu_allocation_key, struct fgpu_allocation, allocations, 262144, PINS "allocations", SPARSE);
BPF_TABLE_PINNED("hash", u64, struct fgpu_pending, pending, 16384, PINS "pending");
BPF_TABLE_PINNED("hash", u64, struct fgpu_flight, flight, 16384, PINS "flight");
BPF_TABLE_PINNED("array", u32, u64, contexts, FGPU_DEVICES, PINS "contexts");
BPF_TABLE_PINNED("array", u32, struct fgpu_device, devices, FGPU_DEVICES, PINS "devices");
BPF_TABLE_PINNED("hash", struct fgpu_file, u32, files, 4096, PINS "files", SPARSE);
BPF_TABLE_PINNED("array", u32, u64, host, 4, PINS "host"); /* 0: epoch, 1: flags for control pages */
BPF_TABLE_PINNED("hash", struct fgpu_counter_key, u64, counters, 65536, PINS "counters", SPARSE);
BPF_ARRAY(blanks, struct fgpu_process, 1); /* never written: too large for the stack */

/* -- small things ------------------------------------------------------------------------------------------------ */

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
    struct fgpu_usage *usage = &page->devices[device & DEVICE_MASK];
    u64 used = *(volatile u64 *)&usage->used, limit = *(volatile u64 *)&usage->limit;
    return used + bytes <= limit;
}

/* Takes only what fits: to add first and undo later would fail neighbours that fit. */
static int take(struct fgpu_usage_page *page, u32 device, u64 bytes, int force)
{
    struct fgpu_usage *usage = &page->devices[device & DEVICE_MASK];
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

static void give_back_levels(struct fgpu_process *p, u32 device, u64 bytes, u32 below)
{
    for (u32 i = 0; i < FGPU_LEVELS; i++) {
        if (i >= below || i >= p->level_count) break;
        struct fgpu_usage_page *page = page_of(p->levels[i]);
        if (page) subtract(&page->devices[device & DEVICE_MASK].used, bytes);
    }
}

/* All levels are looked at before any is touched, so that an asker who never fits disturbs nobody. */
static int refused_by_a_level(struct fgpu_process *p, u32 device, u64 bytes, u32 kind)
{
    for (u32 i = 0; i < FGPU_LEVELS; i++) {
        if (i >= p->level_count) break;
        struct fgpu_usage_page *page = page_of(p->levels[i]);
        if (!page || fits(page, device, bytes)) continue;
        u64 cgroup = p->levels[i];
        if (page->flags & FGPU_OBSERVE) {
            count(cgroup, device, kind, FGPU_REASON_OBSERVED);
            continue;
        }
        __sync_fetch_and_add(&page->devices[device & DEVICE_MASK].refused, 1);
        count(cgroup, device, kind, FGPU_REASON_LIMIT);
        return 1;
    }
    return 0;
}

static int charge(struct fgpu_process *p, u32 device, u64 bytes, u32 kind, int force)
{
    int verdict = FGPU_UNLIMITED;
    device &= DEVICE_MASK;
    if (!force && refused_by_a_level(p, device, bytes, kind)) return FGPU_REFUSED;
    for (u32 i = 0; i < FGPU_LEVELS; i++) {
        if (i >= p->level_count) break;
        struct fgpu_usage_page *page = page_of(p->levels[i]);
        if (!page) continue;
        int got = take(page, device, bytes, force);
        if (got == FGPU_REFUSED || got == FGPU_AGAIN) { /* it fitted a moment ago: somebody was quicker */
            give_back_levels(p, device, bytes, i);
            return FGPU_AGAIN;
        }
        if (got != FGPU_UNLIMITED) verdict = FGPU_ADMITTED;
    }
    __sync_fetch_and_add(&p->bytes[device], bytes);
    __sync_fetch_and_add(&p->changes, 1);
    return verdict;
}

static void release(struct fgpu_process *p, u32 device, u64 bytes)
{
    device &= DEVICE_MASK;
    if (!bytes) return;
    subtract(&p->bytes[device], bytes);
    give_back_levels(p, device, bytes, FGPU_LEVELS);
    __sync_fetch_and_add(&p->changes, 1);
}

static void tally_admitted(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_of(p->levels[0]);
    if (page) __sync_fetch_and_add(&page->tallies[device & DEVICE_MASK].admitted, bytes);
}

static void tally_witnessed(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_of(p->levels[0]);
    if (page) __sync_fetch_and_add(&page->tallies[device & DEVICE_MASK].witnessed, bytes);
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
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        u64 bytes = p->bytes[d];
        if (!bytes) continue;
        __sync_fetch_and_add(&p->bytes[d], -bytes);
        give_back_levels(p, d, bytes, FGPU_LEVELS);
    }
}

static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_flight *f);

/* What a thread leaves behind: an admission that nothing settled, a call that never returned. */
static void end_thread(u64 id)
{
    struct fgpu_pending *asked = pending.lookup(&id);
    struct fgpu_flight *call = flight.lookup(&id);
    u32 tgid = id >> 32;
    if (asked) {
        struct fgpu_process *p = processes.lookup(&tgid);
        if (p) release(p, asked->device, asked->bytes);
        pending.delete(&id);
    }
    if (call) {
        struct fgpu_process *p = processes.lookup(&tgid);
        if (p) put_back(p, tgid, call);
        flight.delete(&id);
    }
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

static u64 ask(struct fgpu_process *p, u64 id, u32 device, u64 bytes, u32 kind, u64 ticket)
{
    struct fgpu_pending *old = pending.lookup(&id);
    if (old) {
        if (old->ticket == ticket && old->verdict != FGPU_AGAIN) return old->verdict;
        release(p, old->device, old->bytes);
        old->bytes = 0;
    }
    struct fgpu_pending now = {.ticket = ticket, .device = device, .kind = kind, .verdict = FGPU_REFUSED};
    u32 slot = device & DEVICE_MASK;
    if (kind == FGPU_HELLO) {
        p->flags |= FGPU_SEEN_SHIM;
        return FGPU_ADMITTED;
    }
    if (kind == FGPU_CONTEXT) {
        u64 *known = contexts.lookup(&slot);
        bytes = known ? *known : 0;
    }
    if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES; /* fits nowhere, and no sum with it overflows */
    if (device >= FGPU_DEVICES)
        anomaly(FGPU_ANOMALY_DEVICE);
    else
        now.verdict = charge(p, device, bytes, kind, 0);
    if (now.verdict == FGPU_ADMITTED || now.verdict == FGPU_UNLIMITED) {
        now.bytes = bytes;
        if (kind != FGPU_CONTEXT) tally_admitted(p, device, bytes);
        if (kind == FGPU_POOL) { /* committed at once */
            __sync_fetch_and_add(&p->pool[device & DEVICE_MASK], bytes);
            now.bytes = 0;
        }
    }
    pending.update(&id, &now);
    return now.verdict;
}

int admit(struct pt_regs *ctx)
{
    u64 id = bpf_get_current_pid_tgid(), bytes = PT_REGS_PARM2(ctx), ticket = PT_REGS_PARM4(ctx) & TICKET_MASK, verdict;
    u32 device = PT_REGS_PARM1(ctx), kind = PT_REGS_PARM3(ctx);
    struct fgpu_process *p = own_process(id >> 32);
    struct fgpu_usage_page *page = p ? page_of(p->levels[0]) : 0;
    if (!page) return 0; /* no answer: the shim says hello again */
    if (kind >= FGPU_KINDS) kind = FGPU_MEMORY;
    verdict = ask(p, id, device, bytes, kind, ticket);
    *(volatile u64 *)&page->verdicts[ticket & VERDICT_MASK] = ticket << 2 | verdict;
    return 0;
}

/* Pool bytes only, and never more than the process has. */
int give_back(struct pt_regs *ctx)
{
    u64 bytes = PT_REGS_PARM2(ctx);
    u32 device = PT_REGS_PARM1(ctx), kind = PT_REGS_PARM3(ctx), tgid = bpf_get_current_pid_tgid() >> 32;
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->state != READY || kind != FGPU_POOL || device >= FGPU_DEVICES) return 0;
    for (int i = 0; i < TRIES; i++) {
        u64 was = *(volatile u64 *)&p->pool[device & DEVICE_MASK], less = bytes < was ? bytes : was;
        if (__sync_val_compare_and_swap(&p->pool[device & DEVICE_MASK], was, was - less) != was) continue;
        if (less < bytes) anomaly(FGPU_ANOMALY_RELEASE);
        release(p, device, less);
        return 0;
    }
    return 0;
}

/* -- witness ----------------------------------------------------------------------------------------------------- */

static void add_overhead(struct fgpu_process *p, u32 device, u64 bytes)
{
    __sync_fetch_and_add((u64 *)&p->overhead[device & DEVICE_MASK], bytes);
}

static int frees(u64 function) { return function == FREE || function == RELEASE || function == DESTROY || function == ARRAY_DESTROY; }

static u32 space_of(u64 function)
{
    return function == RELEASE || function == CREATE ? FGPU_SPACE_HANDLE
           : function == DESTROY || function == CONTEXT     ? FGPU_SPACE_CONTEXT
           : function == ARRAY || function == ARRAY_DESTROY ? FGPU_SPACE_ARRAY
                                                            : FGPU_SPACE_POINTER;
}

/* A call that failed, or will never be seen to end: what it was charged goes, what it took comes back. */
static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_flight *f)
{
    if (!frees(f->function)) {
        release(p, f->device, f->bytes);
        return;
    }
    if (!f->references) return;
    struct fgpu_allocation_key key = {.tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation value = {.bytes = f->bytes, .device = f->device, .era = p->era[f->device & DEVICE_MASK], .references = f->references};
    struct fgpu_allocation *there = allocations.lookup(&key);
    if (there)
        __sync_fetch_and_add(&there->references, f->references);
    else
        allocations.update(&key, &value);
}

/* Takes one reference of the allocation into the flight; the last one takes the entry, before the driver can hand
 * the same pointer to another thread. */
static void take_entry(struct fgpu_process *p, u32 tgid, struct fgpu_flight *f)
{
    struct fgpu_allocation_key key = {.tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation *a = allocations.lookup(&key);
    if (!a) return;
    f->device = a->device;
    f->references = 1;
    f->bytes = a->bytes;
    __sync_fetch_and_add(&p->changes, 1); /* from now on the driver may show less than the ledger */
    if (__sync_fetch_and_add(&a->references, -1ULL) != 1) {
        f->bytes = 0;
        return;
    }
    if (a->era != p->era[a->device & DEVICE_MASK] && f->function != RELEASE) f->bytes = 0; /* went with its context */
    allocations.delete(&key);
}

/* The witnessed size, if larger than what was admitted, is charged all the same: the driver will hand it out. */
static void cover(struct fgpu_process *p, struct fgpu_flight *f, u64 bytes)
{
    if (bytes <= f->bytes || bytes > FGPU_MOST_BYTES) return;
    p->flags |= FGPU_SEEN_BYPASS;
    anomaly(FGPU_ANOMALY_BYPASS);
    charge(p, f->device, bytes - f->bytes, FGPU_MEMORY, 1);
    f->bytes = bytes;
}

static int same_call(struct fgpu_flight *a, struct fgpu_flight *b)
{
    return a->function == b->function && a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1];
}

static int enter(struct pt_regs *ctx, u64 function, u32 device, u64 first, u64 second, u64 third, u64 bytes)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_process *p = own_process(tgid);
    if (!p) return 0;
    struct fgpu_flight now = {.function = function, .arguments = {first, second, third}, .device = device};
    struct fgpu_pending *asked = frees(function) ? 0 : pending.lookup(&id);
    struct fgpu_flight *old = flight.lookup(&id);
    if (old) {
        /* A second probe on one file; or a call left by longjmp and made again, for which the old entry serves. */
        if (!asked && same_call(old, &now)) return 0;
        put_back(p, tgid, old); /* a call left by longjmp */
    }
    if (now.device >= FGPU_DEVICES) now.device = p->last_device & DEVICE_MASK;
    if (asked && (asked->verdict == FGPU_ADMITTED || asked->verdict == FGPU_UNLIMITED)) {
        now.bytes = asked->bytes;
        now.device = asked->device;
        now.admitted = 1;
    }
    if (asked) pending.delete(&id);
    if (frees(function))
        take_entry(p, tgid, &now);
    else
        cover(p, &now, bytes);
    flight.update(&id, &now);
    return 0;
}

/* Ends the current thread's flight; answers 0 where there is none of this function. */
static struct fgpu_process *leave(struct pt_regs *ctx, u64 function, struct fgpu_flight *out)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32;
    struct fgpu_flight *f = flight.lookup(&id);
    if (!f || f->function != function) return 0;
    *out = *f;
    flight.delete(&id);
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!p || p->state != READY) return 0;
    if ((u32)PT_REGS_RC(ctx) == 0) return p;
    put_back(p, tgid, out);
    return 0;
}

/* Enters a new handle; an older charge of the same name is one whose end nobody saw. */
static void keep(struct fgpu_process *p, u32 space, u64 handle, u64 bytes, u32 device)
{
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = space, .generation = p->generation, .handle = handle};
    struct fgpu_allocation value = {.bytes = bytes, .device = device, .era = p->era[device & DEVICE_MASK], .references = 1};
    struct fgpu_allocation *old = allocations.lookup(&key);
    if (old && old->era == p->era[old->device & DEVICE_MASK]) {
        anomaly(FGPU_ANOMALY_STALE);
        release(p, old->device, old->bytes);
    }
    if (allocations.update(&key, &value)) anomaly(FGPU_ANOMALY_FULL);
}

static void keep_at(struct fgpu_process *p, u32 space, struct fgpu_flight *f)
{
    u64 handle = 0;
    __sync_fetch_and_add(&p->changes, 1);
    bpf_probe_read_user(&handle, sizeof(handle), (void *)f->arguments[0]);
    tally_witnessed(p, f->device, f->bytes);
    keep(p, space, handle, f->bytes, f->device);
}

#define NO_DEVICE FGPU_DEVICES
#define ENTER(name, function, device, bytes)                                                                           \
    int name(struct pt_regs *ctx)                                                                                      \
    {                                                                                                                  \
        return enter(ctx, function, device, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM4(ctx), bytes);        \
    }

ENTER(alloc_enter, ALLOC, NO_DEVICE, PT_REGS_PARM2(ctx))
ENTER(managed_enter, MANAGED, NO_DEVICE, PT_REGS_PARM2(ctx))
ENTER(free_enter, FREE, NO_DEVICE, 0)
ENTER(map_enter, MAP, NO_DEVICE, 0)
ENTER(unmap_enter, UNMAP, NO_DEVICE, 0)
ENTER(release_enter, RELEASE, NO_DEVICE, 0)
ENTER(retain_handle_enter, RETAIN_HANDLE, NO_DEVICE, 0)
ENTER(retain_enter, RETAIN, PT_REGS_PARM2(ctx), 0)
ENTER(primary_release_enter, PRIMARY_RELEASE, NO_DEVICE, 0)
ENTER(primary_reset_enter, PRIMARY_RESET, NO_DEVICE, 0)
ENTER(context_v2_enter, CONTEXT, PT_REGS_PARM3(ctx), 0)
ENTER(context_v3_enter, CONTEXT, PT_REGS_PARM5(ctx), 0)
ENTER(context_v4_enter, CONTEXT, PT_REGS_PARM4(ctx), 0)
ENTER(destroy_enter, DESTROY, NO_DEVICE, 0)
ENTER(array_destroy_enter, ARRAY_DESTROY, NO_DEVICE, 0)

/* (pointer*, pitch*, width, height, element): the third argument kept is the height. */
int pitch_enter(struct pt_regs *ctx)
{
    u64 width = PT_REGS_PARM3(ctx), height = PT_REGS_PARM4(ctx);
    u64 bytes = width < FGPU_MOST_BYTES && height < (1 << 15) ? width * height : width;
    return enter(ctx, PITCH, NO_DEVICE, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), height, bytes);
}

/* (handle*, bytes, CUmemAllocationProp*, flags): the location's type stands at byte 8, its id at 12; 1 is a device. */
int create_enter(struct pt_regs *ctx)
{
    u32 location[2] = {};
    bpf_probe_read_user(location, sizeof(location), (void *)(PT_REGS_PARM3(ctx) + 8));
    return enter(ctx, CREATE, location[1], PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, location[0] == 1 ? PT_REGS_PARM2(ctx) : 0);
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
static u64 shape_bytes(struct shape *s, u32 levels)
{
    u64 bytes = 0, element = element_bytes(s->format) * (s->channels & 7);
    if (s->flags & NO_MEMORY_YET) return 0;
    for (u32 i = 0; i < 18 && i < levels; i++)
        bytes += extent(s->width, i) * extent(s->height, i) * extent(s->depth, i) * element;
    return bytes;
}

int array_enter(struct pt_regs *ctx)
{
    struct shape s = {.depth = 1};
    bpf_probe_read_user(&s, 16, (void *)PT_REGS_PARM2(ctx));
    bpf_probe_read_user(&s.format, 8, (void *)(PT_REGS_PARM2(ctx) + 16));
    return enter(ctx, ARRAY, NO_DEVICE, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, shape_bytes(&s, 1));
}

int array3d_enter(struct pt_regs *ctx)
{
    struct shape s = {};
    bpf_probe_read_user(&s, 36, (void *)PT_REGS_PARM2(ctx));
    return enter(ctx, ARRAY, NO_DEVICE, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, shape_bytes(&s, 1));
}

/* (array*, descriptor*, levels) */
int mipmapped_enter(struct pt_regs *ctx)
{
    struct shape s = {};
    bpf_probe_read_user(&s, 36, (void *)PT_REGS_PARM2(ctx));
    return enter(ctx, ARRAY, NO_DEVICE, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, shape_bytes(&s, PT_REGS_PARM3(ctx)));
}

int array_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, ARRAY, &f);
    if (p && f.bytes) keep_at(p, FGPU_SPACE_ARRAY, &f);
    return 0;
}

int array_destroy_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, ARRAY_DESTROY, &f);
    if (p) release(p, f.device, f.bytes);
    return 0;
}

int alloc_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, ALLOC, &f);
    if (p) keep_at(p, FGPU_SPACE_POINTER, &f);
    return 0;
}

int managed_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, MANAGED, &f);
    if (!p) return 0;
    keep_at(p, FGPU_SPACE_POINTER, &f);
    __sync_fetch_and_add(&p->managed[f.device & DEVICE_MASK], f.bytes);
    return 0;
}

int pitch_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, PITCH, &f);
    u64 pitch = 0;
    if (!p) return 0;
    bpf_probe_read_user(&pitch, sizeof(pitch), (void *)f.arguments[1]);
    if (pitch < FGPU_MOST_BYTES && f.arguments[2] < (1 << 15)) cover(p, &f, pitch * f.arguments[2]);
    keep_at(p, FGPU_SPACE_POINTER, &f);
    return 0;
}

int free_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, FREE, &f);
    if (p) release(p, f.device, f.bytes);
    return 0;
}

int create_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, CREATE, &f);
    if (!p || !f.bytes) return 0;
    __sync_fetch_and_add(&p->vmm[f.device & DEVICE_MASK], f.bytes);
    keep_at(p, FGPU_SPACE_HANDLE, &f);
    return 0;
}

static void drop_vmm(struct fgpu_process *p, u32 device, u64 bytes)
{
    if (!bytes) return;
    subtract(&p->vmm[device & DEVICE_MASK], bytes);
    release(p, device, bytes);
}

int release_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, RELEASE, &f);
    if (p) drop_vmm(p, f.device, f.bytes);
    return 0;
}

static struct fgpu_allocation *handle_entry(struct fgpu_process *p, u64 handle)
{
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = FGPU_SPACE_HANDLE, .generation = p->generation, .handle = handle};
    return allocations.lookup(&key);
}

/* (pointer, bytes, offset, handle, flags) */
int map_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, MAP, &f);
    struct fgpu_allocation *a = p ? handle_entry(p, f.arguments[2]) : 0;
    if (!a) return 0;
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = FGPU_SPACE_MAPPING, .generation = p->generation, .handle = f.arguments[0]};
    struct fgpu_allocation value = {.bytes = f.arguments[1], .device = a->device, .references = 1, .owner = f.arguments[2]};
    __sync_fetch_and_add(&a->references, 1);
    if (allocations.update(&key, &value)) anomaly(FGPU_ANOMALY_FULL);
    return 0;
}

static void drop_reference(struct fgpu_process *p, u64 handle)
{
    struct fgpu_allocation *a = handle_entry(p, handle);
    if (!a || __sync_fetch_and_add(&a->references, -1ULL) != 1) return;
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = FGPU_SPACE_HANDLE, .generation = p->generation, .handle = handle};
    u64 bytes = a->bytes;
    u32 device = a->device;
    allocations.delete(&key);
    drop_vmm(p, device, bytes);
}

/* (pointer, bytes): may cover several mappings, one after the other. */
int unmap_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, UNMAP, &f);
    if (!p) return 0;
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = FGPU_SPACE_MAPPING, .generation = p->generation, .handle = f.arguments[0]};
    u64 end = f.arguments[0] + f.arguments[1];
    for (int i = 0; i < SPAN && key.handle < end; i++) {
        struct fgpu_allocation *mapping = allocations.lookup(&key);
        if (!mapping) break;
        u64 bytes = mapping->bytes, owner = mapping->owner;
        allocations.delete(&key);
        drop_reference(p, owner);
        key.handle += bytes;
    }
    return 0;
}

int retain_handle_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, RETAIN_HANDLE, &f);
    u64 handle = 0;
    if (!p) return 0;
    bpf_probe_read_user(&handle, sizeof(handle), (void *)f.arguments[0]);
    struct fgpu_allocation *a = handle_entry(p, handle);
    if (a) __sync_fetch_and_add(&a->references, 1);
    return 0;
}

/* -- contexts ---------------------------------------------------------------------------------------------------- */

/* A context has come to be. Its bytes are overhead: NVML corrects them. Without an admission they are charged here. */
static void begin_context(struct fgpu_process *p, struct fgpu_flight *f)
{
    u32 device = f->device & DEVICE_MASK;
    u64 *known = contexts.lookup(&device);
    if (!f->admitted && !(p->flags & FGPU_SEEN_SHIM) && known) cover(p, f, *known);
    add_overhead(p, device, f->bytes);
    __sync_fetch_and_add(&p->changes, 1);
    p->contexts[device]++;
    p->last_device = device;
}

/* All that lived in the device's contexts is gone; VMM handles belong to the process. */
static void end_device(struct fgpu_process *p, u32 device)
{
    device &= DEVICE_MASK;
    u64 bytes = p->bytes[device], vmm = p->vmm[device];
    p->overhead[device] = 0;
    p->managed[device] = 0;
    p->pool[device] = 0;
    p->era[device]++;
    if (bytes > vmm) release(p, device, bytes - vmm);
}

static void end_context(struct fgpu_process *p, u32 device)
{
    device &= DEVICE_MASK;
    u64 *known = contexts.lookup(&device);
    if (!p->contexts[device]) return;
    if (!--p->contexts[device]) {
        end_device(p, device);
        return;
    }
    s64 overhead = p->overhead[device], bytes = known ? *known : 0;
    if (bytes > overhead) bytes = overhead;
    if (bytes <= 0) return;
    add_overhead(p, device, -bytes);
    release(p, device, bytes);
}

static void end_primary(struct fgpu_process *p, u32 device)
{
    if (p->primary[device & DEVICE_MASK]) end_context(p, device);
    p->primary[device & DEVICE_MASK] = 0;
}

/* (context*, device): the first reference makes the context. */
int retain_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, RETAIN, &f);
    if (!p) return 0;
    u32 device = f.device & DEVICE_MASK;
    p->retained[device]++;
    if (p->primary[device]) {
        release(p, device, f.bytes); /* one more reference, or another thread was first */
        return 0;
    }
    p->primary[device] = 1;
    begin_context(p, &f);
    keep(p, FGPU_SPACE_CONTEXT, (u32)f.arguments[1], 0, device); /* CUDA's ordinal -> the ledger's index */
    return 0;
}

static u32 device_of_ordinal(struct fgpu_process *p, u32 ordinal)
{
    struct fgpu_allocation_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .space = FGPU_SPACE_CONTEXT, .generation = p->generation, .handle = ordinal};
    struct fgpu_allocation *a = allocations.lookup(&key);
    return (a ? a->device : ordinal) & DEVICE_MASK;
}

int primary_release_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, PRIMARY_RELEASE, &f);
    if (!p) return 0;
    u32 device = device_of_ordinal(p, f.arguments[0]);
    if (p->retained[device] && !--p->retained[device]) end_primary(p, device);
    return 0;
}

int primary_reset_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, PRIMARY_RESET, &f);
    if (!p) return 0;
    u32 device = device_of_ordinal(p, f.arguments[0]);
    end_primary(p, device); /* its references stay */
    return 0;
}

int context_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, CONTEXT, &f);
    u64 handle = 0;
    if (!p) return 0;
    bpf_probe_read_user(&handle, sizeof(handle), (void *)f.arguments[0]);
    begin_context(p, &f);
    keep(p, FGPU_SPACE_CONTEXT, handle, 0, f.device);
    return 0;
}

int destroy_return(struct pt_regs *ctx)
{
    struct fgpu_flight f;
    struct fgpu_process *p = leave(ctx, DESTROY, &f);
    if (p && f.references) end_context(p, f.device);
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
    if (p->changes != changes) return -11;
    device &= DEVICE_MASK;
    s64 more = bytes - p->overhead[device];
    if (more > 0) charge(p, device, more, FGPU_CONTEXT, 1);
    if (more < 0) release(p, device, -more);
    add_overhead(p, device, more);
    return 0;
}

static void move_charges(struct fgpu_process *p, int away)
{
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        u64 bytes = p->bytes[d];
        if (!bytes) continue;
        if (away) {
            give_back_levels(p, d, bytes, FGPU_LEVELS);
            continue;
        }
        for (u32 i = 0; i < FGPU_LEVELS; i++) {
            if (i >= p->level_count) break;
            struct fgpu_usage_page *page = page_of(p->levels[i]);
            if (page) take(page, d, bytes, 1);
        }
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
    case FGPU_PUBLISH: return publish(ctx->args[1]);
    case FGPU_OVERHEAD: return set_overhead(ctx->args[1], ctx->args[2], ctx->args[3], ctx->args[4], ctx->args[5]);
    case FGPU_MOVE: return move(ctx->args[1], ctx->args[2], ctx->args[3], levels);
    case FGPU_REAP: return reap(ctx->args[1], ctx->args[2]);
    default: return -22;
    }
}
