/* witness.bpf.h: the memory that a driver call allocates, as far as its arguments show the size, and the memory that
 * the call is about to free. */

/* Return whether a call adds a reference to the primary context of a device. */
static int retains(u64 function) { return function == FGPU_FUNCTION_RETAIN || function == FGPU_FUNCTION_GREEN; }

static int takes(u64 function)
{
    return function <= FGPU_FUNCTION_CREATE || retains(function) ||
           (function >= FGPU_FUNCTION_CONTEXT_V2 && function <= FGPU_FUNCTION_CONTEXT_V4);
}

static int frees(u64 function) { return function >= FGPU_FUNCTION_FREE && function <= FGPU_FUNCTION_DESTROY; }

#define OPENS                                                                                                          \
    (1ULL << FGPU_FUNCTION_MAP | 1ULL << FGPU_FUNCTION_RETAIN_HANDLE | 1ULL << FGPU_FUNCTION_EXPORT |                  \
     1ULL << FGPU_FUNCTION_EXPORT_POINTER | 1ULL << FGPU_FUNCTION_EXPORT_RANGE | 1ULL << FGPU_FUNCTION_EXPORT_POOL)

/* Return 1 if a call may create a reference to memory, or let other processes open it, else 0. The code has no
 * comparison, because the verifier would follow each comparison both ways. */
static u64 opens(u64 function)
{
    u64 all = OPENS;
    __asm__ volatile("" : "+r"(all));
    return all >> (function & 63) & 1;
}

/* Count a call that may open memory. Another call, before reading any entry, stores the number of counted calls that
 * have ended and whose results are recorded. */
static void begin_opening(struct fgpu_process *p, struct fgpu_call *f)
{
    u64 is_opening = opens(f->function);
    f->exported = is_opening | (u64)openings(p, OPENINGS_OVER) << 32;
    count_opening(p, OPENINGS_BEGUN, is_opening);
}

static void end_opening(struct fgpu_process *p, struct fgpu_call *f)
{
    count_opening(p, OPENINGS_OVER, opens(f->function) & f->exported);
}

/* Return whether a library is trusted. A library that the tenant brought may report frees that did not happen. */
static int is_trusted(u64 cookie) { return cookie >> FGPU_CLASS_SHIFT != FGPU_CLASS_UNKNOWN; }

static u32 space_of(u64 function)
{
    return function == FGPU_FUNCTION_RELEASE         ? FGPU_SPACE_HANDLE
           : function == FGPU_FUNCTION_DESTROY       ? FGPU_SPACE_CONTEXT
           : function == FGPU_FUNCTION_ARRAY_DESTROY ? FGPU_SPACE_ARRAY
                                                     : FGPU_SPACE_POINTER;
}

/* Restore the entry of an allocation that a call was about to free. */
static void enter_again(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    if (!f->references) return;
    struct fgpu_allocation_key key = {
        .tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation value = {.bytes = f->bytes,
                                    .device = f->device,
                                    .era = on(p, f->device)->era,
                                    .references = f->references,
                                    .owner = f->arguments[2],
                                    .exported = (u32)f->exported};
    struct fgpu_allocation *there = allocations.lookup(&key);
    if (there)
        __sync_fetch_and_add(&there->references, f->references);
    else
        enter_allocation(&key, &value, levels_of(p, p->turn));
}

/* Return the bytes that an allocating call has lost with the last context. The last context may have been destroyed
 * during a call of another thread, together with the charge of that call. Memory that a call was about to free was
 * freed too, except handles. */
static u64 lost_with_context(struct fgpu_process *p, struct fgpu_call *f)
{
    if (!f->bytes || is_of_era(p, f->device, f->admitted) || f->function == FGPU_FUNCTION_RELEASE) return 0;
    u64 lost = frees(f->function) ? 0 : f->bytes;
    f->bytes = 0;
    if (frees(f->function)) f->references = 0;
    return lost;
}

/* Undo a failed call: release the bytes that were charged for the call, or restore the entry that was removed. */
static void put_back(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    if (frees(f->function)) {
        enter_again(p, tgid, f);
        return;
    }
    if (retains(f->function)) one_less(&on(p, f->device)->retained);
    release(p, f->device, f->bytes);
}

/* Charge bytes that a call has allocated, whether or not they fit. */
static void charge_anew(struct fgpu_process *p, struct fgpu_call *f, u64 bytes)
{
    struct held h;
    if (!UNLIKELY(bytes)) return;
    look_up(p, &h);
    charge(p, &h, f->device, bytes, 1);
    f->bytes += bytes;
}

static void make_primary(struct fgpu_process *p, u32 device)
{
    if (!__sync_val_compare_and_swap(&on(p, device)->primary, 0, 1)) __sync_fetch_and_add(&on(p, device)->contexts, 1);
}

static void hold_handle(struct fgpu_process *p, u32 tgid, u64 handle)
{
    struct fgpu_allocation_key key = {
        .tgid = tgid, .space = FGPU_SPACE_HANDLE, .generation = p->generation, .handle = handle};
    struct fgpu_allocation *a = allocations.lookup(&key);
    if (a) __sync_fetch_and_add(&a->references, 1);
}

/* Settle a call whose return was not recorded, because its thread has exited or has left the call by longjmp or for
 * another call. The driver may have completed the call. Therefore its bytes stay charged. Managed memory and handles,
 * which NVML may not show, stay charged until the process exits; other memory becomes overhead, which reconcile
 * corrects. If the call may have created a context, another context does not count as the last. A mapping keeps its
 * handle. After an export, memory that is freed later counts as possibly open elsewhere. */
static void give_up(struct fgpu_process *p, u32 tgid, struct fgpu_call *f)
{
    u64 missing = lost_with_context(p, f);
    if (f->uncovered > f->bytes + missing) missing = f->uncovered - f->bytes; /* the bytes did not fit at the entry */
    charge_anew(p, f, missing);
    switch (f->function) {
    case FGPU_FUNCTION_FREE:
    case FGPU_FUNCTION_RELEASE:
    case FGPU_FUNCTION_ARRAY_DESTROY:
    case FGPU_FUNCTION_DESTROY:
        enter_again(p, tgid, f);
        return;
    case FGPU_FUNCTION_ALLOC_MANAGED:
        __sync_fetch_and_add(&on(p, f->device)->managed, f->bytes);
        return;
    case FGPU_FUNCTION_CREATE:
        __sync_fetch_and_add(&on(p, f->device)->vmm, f->bytes);
        return;
    case FGPU_FUNCTION_MAP:
        hold_handle(p, tgid, f->arguments[2]);
        break;
    case FGPU_FUNCTION_RETAIN: /* the reference is counted already */
    case FGPU_FUNCTION_GREEN:
        make_primary(p, f->device);
        break;
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        __sync_fetch_and_add(&on(p, f->device)->contexts, 1);
        break;
    case FGPU_FUNCTION_RETAIN_HANDLE:
    case FGPU_FUNCTION_EXPORT:
    case FGPU_FUNCTION_EXPORT_POINTER:
    case FGPU_FUNCTION_EXPORT_RANGE:
        note(p, FGPU_SEEN_EXPORT);
        break;
    case FGPU_FUNCTION_EXPORT_POOL:
        note(p, FGPU_SEEN_POOL_EXPORT);
        break;
    default:
        break;
    }
    add_overhead(p, f->device, f->bytes);
    end_opening(p, f);
}

/* Return whether a call ends an allocation. NVML does not show managed memory, and whether its charge is released
 * depends on which context is the last. Therefore a library that is not trusted can end neither managed memory nor a
 * context. Their bytes stay charged until the process exits, or until a trusted library ends the allocation. */
static int is_ended(u64 function, struct fgpu_allocation *a, int trusted)
{
    return trusted || (function != FGPU_FUNCTION_DESTROY && !(function == FGPU_FUNCTION_FREE && a->owner));
}

/* Move one reference of the allocation into the call. The last reference removes the entry, before the driver can
 * return the same pointer to another thread. */
static void take_entry(struct fgpu_process *p, u32 tgid, struct fgpu_call *f, int trusted)
{
    struct fgpu_allocation_key key = {
        .tgid = tgid, .space = space_of(f->function), .generation = p->generation, .handle = f->arguments[0]};
    struct fgpu_allocation *a = allocations.lookup(&key);
    if (!a || !is_ended(f->function, a, trusted)) return;
    f->device = a->device;
    f->references = 1;
    f->bytes = a->bytes;
    f->admitted = in_word(a->era);
    f->arguments[2] = a->owner;
    u64 references = __sync_fetch_and_add(&a->references, -1ULL);
    f->exported |= *(volatile u64 *)&a->exported; /* not before this point, see exported() */
    if (UNLIKELY(references != 1)) {
        f->bytes = 0;
        return;
    }
    if (a->era != on(p, a->device)->era && f->function != FGPU_FUNCTION_RELEASE) {
        f->bytes = 0;                                                /* the memory was freed with its context */
        if (f->function != FGPU_FUNCTION_DESTROY) f->references = 0; /* no restored references if the free fails */
    }
    delete_allocation(&key, a);
}

static u32 operation_of(struct fgpu_call *f)
{
    switch (f->function) {
    case FGPU_FUNCTION_CREATE:
        return FGPU_VMM;
    case FGPU_FUNCTION_RETAIN:
    case FGPU_FUNCTION_GREEN:
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        return FGPU_CONTEXT;
    default:
        return FGPU_MEMORY;
    }
}

static int kills(struct fgpu_usage_page *page)
{
    return page && page->flags & FGPU_KILL && !(page->flags & FGPU_OBSERVE);
}

/* Return a level in which these additional bytes do not fit, preferably a level under `onBypass: kill`; 0: the bytes
 * fit in all levels. */
static struct fgpu_usage_page *exceeded(struct held *h, u32 device, u64 bytes)
{
    struct fgpu_usage_page *full = 0;
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = h->page[i];
        if (page && !kills(full) && !fits(page, device, bytes)) full = page;
    }
    return full;
}

/* Kill the process of a call without an admission that exceeds the limit, under `onBypass: kill`. If the size is known
 * at the entry of the call, the process is killed before the driver runs. */
static void kill_caller(struct fgpu_usage_page *full, struct fgpu_call *f, u64 bytes)
{
    __sync_fetch_and_add(&full->devices[slot(f->device)].refused, 1);
    count(full->cgroup, f->device, operation_of(f), FGPU_REASON_LIMIT);
    tell_urgently(full, FGPU_NEWS_KILLED, f->device, bytes, operation_of(f), FGPU_REASON_LIMIT);
    bpf_send_signal(SIGKILL);
}

/* Charge the witnessed size if it is larger than the admitted size. A difference that does not fit is charged only if
 * the call `has` the memory, which means that the call has returned and the driver has allocated the memory. A charge
 * at the entry of a call that may fail would cause refusals of other requests that fit. */
static void cover(struct fgpu_process *p, struct fgpu_call *f, u64 bytes, int has)
{
    if (!UNLIKELY(bytes > f->bytes) || bytes > FGPU_MOST_BYTES) return;
    struct held h;
    look_up(p, &h);
    f->uncovered = bytes;
    struct fgpu_usage_page *full = exceeded(&h, f->device, bytes - f->bytes);
    if (kills(full)) {
        kill_caller(full, f, bytes - f->bytes);
        if (!has) f->uncovered = 0; /* the driver does not run */
    } else if (has || !full) {
        charge(p, &h, f->device, bytes - f->bytes, 1);
        f->bytes = bytes;
    }
}

/* CUDA_ARRAY3D_DESCRIPTOR; CUDA_ARRAY_DESCRIPTOR has no depth. */
struct shape {
    u64 width, height, depth;
    u32 format, channels, flags;
};
#define NO_MEMORY_YET 0xc0 /* CUDA_ARRAY3D_SPARSE, _DEFERRED_MAPPING */
#define MOST_EXTENT (1 << 17)

/* Return an extent at a mipmap level, at least 1. The code has no branch, because the function is called in a loop, and
 * the verifier would follow both ways at each level. */
static u64 extent(u64 n, u32 level)
{
    n >>= level & 31;
    u64 none = n - 1;
    __asm__ volatile("" : "+r"(none));
    return n | none >> 63;
}

/* Return all ones if i < n, else 0, without a branch. */
static u64 below(u64 i, u64 n)
{
    s64 less = i - n;
    __asm__ volatile("" : "+r"(less));
    return less >> 63;
}

static u64 at_most(u64 n) { return n > MOST_EXTENT ? MOST_EXTENT : n; }

/* Return the minimum size of an array, for a call without an admission. The driver adds padding, which only NVML
 * shows. */
static u64 shape_bytes(u64 function, void *descriptor, u32 levels, u64 any)
{
    struct shape s = {.depth = 1};
    u64 bits = 0, texel;
    if (function == FGPU_FUNCTION_ARRAY) {
        bpf_probe_read_user(&s, 16, descriptor);
        bpf_probe_read_user(&s.format, 8, descriptor + 16);
    } else {
        bpf_probe_read_user(&s, 36, descriptor);
    }
    if (s.flags & NO_MEMORY_YET) return 0;
    if (function != FGPU_FUNCTION_ARRAY_MIPMAPPED) levels = 1;
    texel = forget(fgpu_texel_bits(s.format, s.channels & 7), any);
    u64 width = forget(at_most(s.width), any), height = forget(at_most(s.height), any);
    u64 depth = forget(at_most(s.depth), any), count = forget(levels, any);
    for (u32 i = 0; i < 18; i++) /* the loop always runs to its end: Linux 6.1's verifier follows each exit */
        bits += extent(width, i) * extent(height, i) * extent(depth, i) * texel & below(i, count);
    return bits / 8;
}

/* CUmemAllocationProp: the location's type is at byte 8, its id at 12; type 1 is a device. */
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

/* Return the size that the call requests, as far as its arguments show it, and find the device: CUDA's ordinal, which
 * an admission replaces by the ledger's index. `any` is for forget(). */
static u64 asked_bytes(struct pt_regs *ctx, struct fgpu_call *f, u64 any)
{
    f->device = FGPU_DEVICES; /* unknown device: the last device of the process is used */
    switch (f->function) {
    case FGPU_FUNCTION_ALLOC:
    case FGPU_FUNCTION_ALLOC_MANAGED:
        return f->arguments[1];
    case FGPU_FUNCTION_ALLOC_PITCH:
        return pitch_bytes(PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx));
    case FGPU_FUNCTION_ARRAY:
    case FGPU_FUNCTION_ARRAY_3D:
    case FGPU_FUNCTION_ARRAY_MIPMAPPED:
        return shape_bytes(f->function, (void *)PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx), any);
    case FGPU_FUNCTION_CREATE:
        return create_bytes(f, (void *)PT_REGS_PARM3(ctx));
    case FGPU_FUNCTION_RETAIN:
        f->device = f->arguments[2] = PT_REGS_PARM2(ctx);
        return 0;
    case FGPU_FUNCTION_GREEN:
        f->device = f->arguments[2] = PT_REGS_PARM3(ctx);
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
