/* entries.bpf.h: the number of entries that each level, and each owner of a bound, has in the shared maps. */

/* Return how many entries a shared map can have. 0: the number is unknown, and new entries are refused. */
static u64 most_of(u32 shared)
{
    u64 *most = sizes.lookup(&shared);
    return most ? *most : 0;
}

/* Return the owner in a slot. Slot 0 is for levels without an owner. The entries of slot 0 are counted too, without a
 * bound. A check for 0 would add a branch at every use, and the verifier follows each branch both ways. */
static struct fgpu_owner *owner_in(u32 slot_of_owner) { return owners.lookup(&slot_of_owner); }

/* Return a pointer to the number of entries of a map that all owners together have claimed. */
static u64 *claims_on(u32 shared)
{
    u32 last = FGPU_OWNERS - 1;
    struct fgpu_owner *all = owners.lookup(&last);
    return all ? &all->entries[shared] : 0;
}

/* Return whether the rest of the map is reserved for owners that have claimed nothing yet. */
static int is_scarce(u64 claimed_by_all, u32 shared)
{
    u64 most = most_of(shared);
    return claimed_by_all + FEW(most) > most - RESERVE(most);
}

/* Claim more entries for an owner. If only the map's reserve is left, an owner with claims gets no entries, unless
 * `force` is set. Several threads may claim at the same time. The agent releases claims that are no longer needed
 * (`trim`), because a release in each program that frees would cost too much. */
static int claim(struct fgpu_owner *owner, u32 shared, int force)
{
    u64 most = most_of(shared), few = FEW(most), *all = claims_on(shared);
    if (!all) return 0;
    u64 was = __sync_fetch_and_add(all, few);
    if (!force && *(volatile u64 *)&owner->claimed[shared] && is_scarce(was, shared)) {
        __sync_fetch_and_add(all, -few);
        return 0;
    }
    __sync_fetch_and_add(&owner->claimed[shared], few);
    return 1;
}

static int own_entry(struct fgpu_owner *owner, u32 shared, int force)
{
    u64 was = __sync_fetch_and_add(&owner->entries[shared], 1), most = *(volatile u64 *)&owner->most[shared];
    if (!most) return 1;
    if (force || was < most) {
        if (!UNLIKELY(was >= *(volatile u64 *)&owner->claimed[shared])) return 1;
        if (claim(owner, shared, force)) return 1;
    }
    one_less(&owner->entries[shared]);
    return 0;
}

/* Return whether an owner has reached its bound. */
static int owner_is_full(struct fgpu_usage_page *page, u32 shared)
{
    struct fgpu_owner *owner = owner_in(page->owner);
    u64 most = owner ? *(volatile u64 *)&owner->most[shared] : 0;
    if (!owner || !most) return 0;
    u64 has = *(volatile u64 *)&owner->entries[shared], claimed = *(volatile u64 *)&owner->claimed[shared];
    if (UNLIKELY(has >= most)) return 1;
    if (!UNLIKELY(has >= claimed && claimed)) return 0;
    u64 *all = claims_on(shared);
    return all && is_scarce(*(volatile u64 *)all, shared);
}

/* Return whether a level, or its owner, has reached its bound. */
static int is_crowded(struct fgpu_usage_page *page, u32 shared)
{
    if (UNLIKELY(*(volatile u64 *)&page->entries[shared] >= PART(most_of(shared)))) return 1;
    return owner_is_full(page, shared);
}

/* Count one more entry in a shared map. Returns 0 if the level, or its owner, has reached its bound. A level whose page
 * was removed has no count of its own. */
static int take_place(struct fgpu_level *level, u32 shared, int force)
{
    struct fgpu_usage_page *page = page_at(level);
    struct fgpu_owner *owner = owner_in(level->place >> 32);
    if (UNLIKELY(!page)) level->cgroup = 0;
    if (owner && !own_entry(owner, shared, force)) return 0;
    if (!page || __sync_fetch_and_add(&page->entries[shared], 1) < PART(most_of(shared)) || force) return 1;
    one_less(&page->entries[shared]);
    if (owner) lower(&owner->entries[shared], 1);
    return 0;
}

static void give_places(struct fgpu_level *level, u32 shared, u64 n)
{
    struct fgpu_usage_page *page = level->cgroup ? page_at(level) : 0;
    struct fgpu_owner *owner = owner_in(level->place >> 32);
    if (page) lower(&page->entries[shared], n);
    if (owner) lower(&owner->entries[shared], n);
}

static void give_place(struct fgpu_level *level, u32 shared) { give_places(level, shared, 1); }

/* Create the entry of an allocation. Returns 1 if an entry with this key exists already, and leaves that entry
 * unchanged. If the bound is reached, or the map is full, no entry is created, and the bytes stay charged until the
 * process exits. */
static int enter_allocation(struct fgpu_allocation_key *key, struct fgpu_allocation *value, struct fgpu_level *leaf)
{
    value->level = *leaf;
    if (take_place(&value->level, FGPU_ALLOCATIONS, 0)) {
        int failed = allocations.insert(key, value);
        if (!UNLIKELY(failed)) return 0;
        give_place(&value->level, FGPU_ALLOCATIONS);
    }
    if (allocations.lookup(key)) return 1;
    anomaly(FGPU_ANOMALY_FULL);
    return 0;
}

static void delete_allocation(struct fgpu_allocation_key *key, struct fgpu_allocation *value)
{
    struct fgpu_level level = value->level;
    if (!allocations.delete(key)) give_place(&level, FGPU_ALLOCATIONS);
}

static void give_orphan_place(struct fgpu_level *leaf)
{
    struct fgpu_usage_page *page = page_at(leaf);
    struct fgpu_owner *owner = owner_in(leaf->place >> 32);
    if (page) lower(&page->orphans, 1);
    if (owner) lower(&owner->entries[FGPU_OWNED_ORPHANS], 1);
}

/* Count one more entry of `orphans`, for which the page has a counter of its own. Nothing in that map is reserved for
 * owners that have few entries. */
static int take_orphan_place(struct fgpu_level *leaf)
{
    struct fgpu_usage_page *page = page_at(leaf);
    struct fgpu_owner *owner = owner_in(leaf->place >> 32);
    u64 others = owner ? __sync_fetch_and_add(&owner->entries[FGPU_OWNED_ORPHANS], 1) : 0;
    u64 own = page ? __sync_fetch_and_add(&page->orphans, 1) : 0;
    u64 most = owner ? *(volatile u64 *)&owner->most[FGPU_OWNED_ORPHANS] : 0;
    if (own < PART(MOST_ORPHANS) && (!most || others < most)) return 1;
    give_orphan_place(leaf);
    return 0;
}
