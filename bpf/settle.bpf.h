/* settle.bpf.h: the result of a driver call: allocated memory is recorded, and freed memory is released. */

/* Subtract freed bytes from the parts of a process's bytes. */
static void lower_parts(struct fgpu_process *p, u32 device, u64 bytes, int handle, u64 managed, u64 exported)
{
    struct fgpu_holding *has = on(p, device);
    if (!bytes) return;
    if (handle || managed) subtract(handle ? &has->vmm : &has->managed, bytes);
    if (managed && !handle) free_managed(p, device, bytes);
    if (exported) subtract(handle ? &has->exported_vmm : &has->exported, bytes);
}

/* Add a charge to the overhead, which reconcile corrects: no probe has reported the end of the memory. `kept` bytes are
 * left out, because they stay in the entry. If other processes may have the memory open, orphan all bytes instead. */
static void leave_stale(struct fgpu_process *p, u32 tgid, struct fgpu_allocation *old, u64 kept)
{
    lower_parts(p, old->device, old->exported ? old->bytes : 0, 0, 0, old->exported);
    if (old->exported)
        orphan_part(p, tgid, old->device, old->bytes);
    else
        add_overhead(p, old->device, old->bytes - kept);
}

/* Return the bytes that a free of this key frees if two charges have the key. The result is the smaller number, because
 * either memory may be freed. The result is 0 if the charges are on different devices, or if one memory may be open in
 * another process. */
static u64 least_of(struct fgpu_allocation *old, struct fgpu_allocation *new)
{
    if (old->exported || old->device != new->device) return 0;
    return new->bytes < old->bytes ? new->bytes : old->bytes;
}

/* Keep one of two charges under one key. Either a free was not recorded, or the key that a call returned is forged. A
 * tenant gains nothing by a forged key: this function releases nothing, and no free of this key releases more than the
 * driver frees. (A forged key without a charge is not detected: docs/security.md, "What is not promised".) The rest has
 * no entry: managed memory and handles stay charged until the process exits; reconcile corrects all other memory. */
static void keep_one(struct fgpu_process *p, struct fgpu_allocation_key *key, struct fgpu_allocation *old,
                     struct fgpu_allocation *new)
{
    int handle = key->space == FGPU_SPACE_HANDLE;
    u64 is_managed = !handle && new->owner, was_managed = !handle && old->owner, least = least_of(old, new);
    anomaly(FGPU_ANOMALY_STALE);
    if (!handle && !was_managed) leave_stale(p, key->tgid, old, is_managed ? least : 0);
    if (!handle && !is_managed) add_overhead(p, new->device, new->bytes - least);
    new->bytes = least;
    new->owner = is_managed &&was_managed;
    new->references = old->references;
    new->level = old->level;
    allocations.update(key, new);
}

/* Record a new handle. If an older charge has the same key, the older memory was freed with its context, or it is
 * unknown which of the two charges is right. */
static void keep(struct fgpu_process *p, struct fgpu_allocation_key *key, u64 bytes, u32 device, u64 owner)
{
    struct fgpu_allocation value = {
        .bytes = bytes, .device = device, .era = on(p, device)->era, .references = 1, .owner = owner};
    if (!UNLIKELY(enter_allocation(key, &value, levels_of(p, p->turn)))) return;
    struct fgpu_allocation *there = allocations.lookup(key);
    if (!there) return;
    struct fgpu_allocation old = *there;
    int is_there = old.era == on(p, old.device)->era || key->space == FGPU_SPACE_HANDLE;
    if (is_there && key->space != FGPU_SPACE_CONTEXT) {
        keep_one(p, key, &old, &value);
        return;
    }
    value.level = old.level;
    allocations.update(key, &value);
}

static void tally_witnessed(struct fgpu_process *p, u32 device, u64 bytes)
{
    struct fgpu_usage_page *page = page_at(levels_of(p, p->turn));
    if (page) __sync_fetch_and_add(&page->tallies[slot(device)].witnessed, bytes);
}

/* Record a new mapping, which refers to its handle. Memory without a handle's entry (of the host, imported, multicast)
 * has a mapping without an owner, so that the end of a range with this mapping ends all mappings of the range. If the
 * end of an older mapping at this address is not recorded yet, it is unknown which mapping a recorded end will end.
 * Therefore the mapping then has no owner either, and both handles keep a reference. On entry `key` is the key of the
 * handle; this function changes it into the key of the mapping. */
static void mapped(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key)
{
    key->space = FGPU_SPACE_HANDLE;
    key->handle = f->arguments[2];
    struct fgpu_allocation *a = allocations.lookup(key);
    struct fgpu_allocation value = {.bytes = f->arguments[1], .device = f->device, .references = 1};
    if (a) {
        __sync_fetch_and_add(&a->references, 1);
        value.device = a->device;
        value.owner = f->arguments[2];
    }
    key->space = FGPU_SPACE_MAPPING;
    key->handle = f->arguments[0];
    if (!UNLIKELY(enter_allocation(key, &value, levels_of(p, p->turn)))) return;
    struct fgpu_allocation *there = allocations.lookup(key);
    if (!there) return;
    value.level = there->level;
    value.owner = 0;
    allocations.update(key, &value);
}

/* Return 0 if two levels are equal. */
static u64 apart(struct fgpu_level *a, struct fgpu_level *b) { return (a->cgroup ^ b->cgroup) | (a->place ^ b->place); }

/* Record that a range (pointer, bytes) was unmapped. The range may cover several mappings, one after the other. Each
 * mapping has a reference to its handle. The last reference frees the memory, unless another process may have the
 * memory open. The loop only adds, because the verifier follows each iteration. Therefore all mappings of a run have
 * one device and one level, and so have their handles. The rest of a range is stored in the call's arguments. */
static u64 unmapped(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key, struct outcome *out)
{
    u64 at = f->arguments[0], end = at + f->arguments[1], mappings = 0, handles = 0, bytes = 0, exported = 0;
    struct fgpu_level of_mappings = {}, of_handles = {};
    for (int i = 0; i < SPAN && at < end; i++) {
        key->space = FGPU_SPACE_MAPPING;
        key->handle = at;
        struct fgpu_allocation *mapping = allocations.lookup(key);
        if (!mapping) at = end;
        if (!mapping) break;
        u64 owner = mapping->owner, size = mapping->bytes;
        key->space = FGPU_SPACE_HANDLE;
        key->handle = owner;
        struct fgpu_allocation *a = owner ? allocations.lookup(key) : 0;
        if (!i) {
            f->device = mapping->device & DEVICE_MASK;
            of_mappings = mapping->level;
            of_handles = a ? a->level : mapping->level;
        }
        if ((mapping->device ^ f->device) | apart(&mapping->level, &of_mappings)) break;
        if (a && apart(&a->level, &of_handles)) break;
        key->space = FGPU_SPACE_MAPPING;
        key->handle = at;
        mappings += 1 - differs(allocations.delete(key), 0);
        at += size;
        if (!a || __sync_fetch_and_add(&a->references, -1ULL) != 1) continue;
        key->space = FGPU_SPACE_HANDLE;
        key->handle = owner;
        bytes += a->bytes;
        exported += a->bytes & -differs(a->exported, 0);
        out->orphaned += a->bytes & -differs(a->exported | may_be_open(p, f), 0);
        handles += 1 - differs(allocations.delete(key), 0);
    }
    give_places(&of_mappings, FGPU_ALLOCATIONS, mappings);
    give_places(&of_handles, FGPU_ALLOCATIONS, handles);
    subtract(&on(p, f->device)->vmm, bytes);
    subtract(&on(p, f->device)->exported_vmm, exported);
    f->arguments[0] = at;
    f->arguments[1] = end > at ? end - at : 0;
    return bytes - out->orphaned;
}

static void allocated(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key, struct outcome *out)
{
    if (!f->bytes) return; /* host memory, or no memory yet */
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

/* Return bytes that are known only after the call: the bytes of a pitched allocation, or of a context without an
 * admission. For all other calls, return the size that no admission covered; 0: an admission covered all bytes. Bytes
 * that did not fit when the call began are charged now. */
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
    case FGPU_FUNCTION_GREEN:
        if (on(p, device)->primary || refers_to_unseen(p, f)) return 0; /* fallthrough */
    case FGPU_FUNCTION_CONTEXT_V2:
    case FGPU_FUNCTION_CONTEXT_V3:
    case FGPU_FUNCTION_CONTEXT_V4:
        known = contexts.lookup(&device);
        return !(f->admitted & BELOW_ERA) && !(p->flags & FGPU_SEEN_SHIM) && known ? *known : f->uncovered;
    default:
        return f->uncovered;
    }
}

static u64 freed(struct fgpu_process *p, struct fgpu_call *f, u64 *orphaned, int trusted)
{
    int handle = f->function == FGPU_FUNCTION_RELEASE;
    u32 exported = f->exported;
    lower_parts(p, f->device, f->bytes, handle, f->arguments[2], exported);
    if (trusted && !exported && !may_be_open(p, f)) return f->bytes;
    *orphaned = f->bytes;
    return 0;
}

/* Record that another process may open the memory of `space` and `handle`. A pointer into the middle of an allocation
 * has no entry. */
static void exported(struct fgpu_process *p, struct fgpu_allocation_key *key, u32 space, u64 handle)
{
    key->space = space;
    key->handle = handle;
    struct fgpu_allocation *a = allocations.lookup(key);
    if (!a) {
        note(p, FGPU_SEEN_EXPORT);
        return;
    }
    if (__sync_val_compare_and_swap(&a->exported, 0, 1)) return;
    if (!*(volatile u64 *)&a->references) note(p, FGPU_SEEN_EXPORT); /* a free may already have read the entry */
    u64 *sum = space == FGPU_SPACE_HANDLE ? &on(p, a->device)->exported_vmm : &on(p, a->device)->exported;
    __sync_fetch_and_add(sum, a->bytes);
}

/* A library that the tenant brought reports that it dropped a reference. The reference may still exist, and may keep
 * memory that a trusted library appears to free. Therefore no memory of this process counts as freed from now on. */
static void distrust(struct fgpu_process *p, u64 function)
{
    if (function == FGPU_FUNCTION_UNMAP || function == FGPU_FUNCTION_RELEASE) note(p, FGPU_SEEN_EXPORT);
}

/* Charge the context that a successful call shows and that was not counted. */
static void charge_unseen(struct fgpu_process *p, struct fgpu_call *f, u64 lost)
{
    u64 more = 0;
    if (UNLIKELY(!on(p, f->device)->contexts) && shows_context(p, f)) more = count_unseen(p, f->device);
    charge_anew(p, f, lost + more);
    f->bytes -= more;
    add_overhead(p, f->device, more);
}

/* Settle a successful call. Returns the bytes that it freed. `key` has the process's pid and generation. */
static u64 settle(struct fgpu_process *p, struct fgpu_call *f, struct fgpu_allocation_key *key, struct outcome *out,
                  int trusted)
{
    u64 bytes;
    switch (f->function) {
    case FGPU_FUNCTION_FREE:
    case FGPU_FUNCTION_RELEASE:
    case FGPU_FUNCTION_ARRAY_DESTROY:
        return freed(p, f, &out->orphaned, trusted);
    case FGPU_FUNCTION_DESTROY:
        if (!trusted) return 0;
        return f->references ? end_context(p, f->device, out) : end_unseen(p, f->device);
    case FGPU_FUNCTION_MAP:
        mapped(p, f, key);
        return 0;
    case FGPU_FUNCTION_UNMAP:
        return unmapped(p, f, key, out);
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
    case FGPU_FUNCTION_EXPORT_RANGE:
        exported(p, key, FGPU_SPACE_POINTER, f->arguments[1]);
        return 0;
    case FGPU_FUNCTION_EXPORT_POOL:
        note(p, FGPU_SEEN_POOL_EXPORT);
        return 0;
    case FGPU_FUNCTION_IMPORT:
        note(p, FGPU_SEEN_IMPORT);
        return 0;
    case FGPU_FUNCTION_GREEN:
        green_made(p, f, key); /* fallthrough */
    case FGPU_FUNCTION_RETAIN:
        bytes = retained(p, f);
        key->space = FGPU_SPACE_CONTEXT;
        key->handle = (u32)f->arguments[2]; /* CUDA's ordinal -> the ledger's index */
        out->new = 1;
        return bytes;
    case FGPU_FUNCTION_PRIMARY_RESET: /* references to the primary context stay */
        if (!trusted) return 0;
        f->device = device_of_ordinal(p, key, f->arguments[0]);
        return on(p, f->device)->primary ? end_primary(p, f->device, out) : end_unseen(p, f->device);
    case FGPU_FUNCTION_GREEN_DESTROY:
    case FGPU_FUNCTION_PRIMARY_RELEASE:
        if (!trusted) return 0;
        if (f->function == FGPU_FUNCTION_GREEN_DESTROY) {
            if (!green_ended(f, key)) return 0;
        } else {
            f->device = device_of_ordinal(p, key, f->arguments[0]);
        }
        return dropped(p, f->device, out);
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
