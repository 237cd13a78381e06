/* contexts.bpf.h: creation and destruction of contexts, and the memory that is freed with the last context. */

/* The effects of a successful call: bytes freed on the call's device, bytes that the call released and that the device
 * may still hold, and whether a new handle exists. */
struct outcome {
    u64 freed, orphaned;
    u64 bytes, owner;
    int new;
};

/* Return the bytes of pools. The number may be below 0 for a moment, see subtract_most(). */
static u64 pool_of(struct fgpu_holding *has)
{
    s64 pool = *(volatile s64 *)&has->pool;
    return pool & ~(pool >> 63);
}

/* Make handles, pools and overhead add up to the charge again, after the last context has ended. If the process did not
 * use all bytes of its pools, the charge may be smaller than handles and pools. The unused bytes are then subtracted
 * from the pools, so that the process cannot release these bytes a second time from the charge of its handles. */
static void drop_unused(struct fgpu_process *p, u32 device, u64 left)
{
    struct fgpu_holding *has = on(p, device);
    u64 pool = pool_of(has), handles = has->vmm, most = left > handles ? left - handles : 0;
    if (pool > most && __sync_val_compare_and_swap(&has->pool, pool, most) == pool) pool = most;
    if (left < handles + pool) add_overhead(p, device, left - handles - pool);
}

/* The last context of a device was destroyed, with all memory of the device's contexts. Handles and pools remain, and
 * memory that other processes may have open remains too. Imported handles, and pools that grew without an admission,
 * also remain. Their bytes are in the overhead, and without a context no row of NVML shows these bytes. Therefore the
 * overhead beyond the size of a context is orphaned. */
static u64 end_last_context(struct fgpu_process *p, u32 device, struct outcome *out)
{
    struct fgpu_holding *has = on(p, device);
    u64 kept = has->vmm + pool_of(has), bytes = has->bytes, managed = has->managed;
    u64 open = p->flags & (FGPU_SEEN_EXPORT | FGPU_SEEN_IMPORT) || opens_now(p) ? bytes : has->exported;
    u64 *known = contexts.lookup(&device);
    s64 unknown = has->overhead - (s64)(known ? *known : 0);
    if (unknown > 0) open += unknown;
    has->overhead = 0;
    has->exported = 0;
    has->managed = 0;
    has->era++;
    free_managed(p, device, managed);
    if (bytes < kept) drop_unused(p, device, bytes);
    bytes = bytes > kept ? bytes - kept : 0;
    if (open > bytes) open = bytes;
    out->orphaned = open;
    return bytes - open;
}

/* A context was destroyed, and others may remain. Its own bytes are released at once. NVML shows how much memory was
 * allocated in the context. */
static u64 end_own_bytes(struct fgpu_process *p, u32 device)
{
    u64 *known = contexts.lookup(&device);
    s64 overhead = on(p, device)->overhead, own = known ? *known : 0;
    __sync_fetch_and_add(&on(p, device)->ended, 1);
    if (own > overhead) own = overhead;
    if (own <= 0) return 0;
    add_overhead(p, device, -own);
    return own;
}

static u64 end_context(struct fgpu_process *p, u32 device, struct outcome *out)
{
    device &= DEVICE_MASK;
    s64 left = one_less(&on(p, device)->contexts);
    if (left < 0) return 0;
    if (!left) return end_last_context(p, device, out);
    return end_own_bytes(p, device);
}

static u64 unseen_on(u32 device) { return 1ULL << FGPU_UNSEEN_SHIFT << slot(device); }

/* Return whether a call has succeeded that the driver refuses to a process without a context on the device: each
 * allocation except cuMemCreate. The context of the call may have been destroyed during the call, as the last one. */
static int shows_context(struct fgpu_process *p, struct fgpu_call *f)
{
    return f->function >= FGPU_FUNCTION_ALLOC && f->function < FGPU_FUNCTION_CREATE &&
           is_of_era(p, f->device, f->admitted);
}

/* Count the context of a process without a recorded context: the context is older than the entry, or a function without
 * a probe has created it. The process may have more such contexts, of which no call shows the number. Returns the bytes
 * of the context that are not charged as overhead yet. */
static u64 count_unseen(struct fgpu_process *p, u32 device)
{
    device &= DEVICE_MASK;
    if (__sync_val_compare_and_swap(&on(p, device)->contexts, 0, 1)) return 0;
    note(p, unseen_on(device));
    p->last_device = device;
    u64 *known = contexts.lookup(&device);
    s64 overhead = on(p, device)->overhead, more = known ? *known : 0;
    more -= overhead & ~(overhead >> 63);
    return more & ~(more >> 63);
}

/* A context was destroyed whose creation was not recorded. Other such contexts may remain. Therefore the memory that
 * was allocated in contexts stays charged until it is freed, or until NVML shows that it is freed. */
static u64 end_unseen(struct fgpu_process *p, u32 device)
{
    device &= DEVICE_MASK;
    if (!withdraw_note(p, unseen_on(device))) return 0;
    return one_less(&on(p, device)->contexts) < 0 ? 0 : end_own_bytes(p, device);
}

/* Return whether a call without an admission refers to a context whose creation was not recorded: the shim requests an
 * admission if the device has no primary context. */
static int refers_to_unseen(struct fgpu_process *p, struct fgpu_call *f)
{
    return !(f->admitted & 1) && p->flags & unseen_on(f->device);
}

static u64 end_primary(struct fgpu_process *p, u32 device, struct outcome *out)
{
    device &= DEVICE_MASK;
    if (!__sync_val_compare_and_swap(&on(p, device)->primary, 1, 0)) return 0;
    return end_context(p, device, out);
}

/* A context was created. Its bytes are overhead, which reconcile corrects. */
static void begin_context(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    add_overhead(p, device, f->bytes);
    __sync_fetch_and_add(&on(p, device)->contexts, 1);
    p->last_device = device;
}

/* The primary context was retained. The first reference creates the context. If another thread was first, or the
 * context existed already, the admitted bytes are released. The reference itself was counted before the driver counted
 * the reference: otherwise a thread that releases its reference in between would treat that reference as the last
 * reference. */
static u64 retained(struct fgpu_process *p, struct fgpu_call *f)
{
    u32 device = f->device & DEVICE_MASK;
    if (refers_to_unseen(p, f)) return f->bytes;
    if (__sync_val_compare_and_swap(&on(p, device)->primary, 0, 1)) return f->bytes;
    begin_context(p, f);
    return 0;
}

/* A reference to the primary context was dropped. If no recorded reference is left, the dropped reference is older than
 * the entry. */
static u64 dropped(struct fgpu_process *p, u32 device, struct outcome *out)
{
    s64 left = one_less(&on(p, device)->retained);
    if (left > 0) return 0;
    return left ? end_unseen(p, device) : end_primary(p, device, out);
}

static u64 device_of_ordinal(struct fgpu_process *p, struct fgpu_allocation_key *key, u32 ordinal)
{
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = ordinal;
    struct fgpu_allocation *a = allocations.lookup(key);
    return (a ? a->device : ordinal) & DEVICE_MASK;
}

/* Return the handle that the call returned: its first argument points to it. */
static u64 given(struct fgpu_call *f)
{
    u64 handle = 0;
    bpf_probe_read_user(&handle, sizeof(handle), (void *)f->arguments[0]);
    return handle;
}

/* A green context was created. Like other contexts, a green context has an entry under its handle. */
static void green_made(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    struct fgpu_allocation value = {.device = f->device, .references = 1};
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = given(f);
    enter_allocation(key, &value, levels_of(p, p->turn));
}

/* A green context was destroyed. Store its device in the call. Returns 0 if the context has no entry; its reference to
 * the primary context then stays. */
static int green_ended(struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    key->space = FGPU_SPACE_CONTEXT;
    key->handle = f->arguments[0];
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a) return 0;
    f->device = a->device & DEVICE_MASK;
    delete_allocation(key, a);
    return 1;
}
