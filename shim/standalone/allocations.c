/*
 * allocations.c: the allocations that the standalone ledger has admitted for this process, by the driver's handles.
 * Owns a table that is empty while the kernel keeps the ledger, and in every forked child. Decides nothing.
 *
 * An entry is taken and freed by compare-and-swap of its key, which is BUSY in between. Entries are in buckets, and a
 * bucket is searched as a whole. Buckets are in tables, each twice as large as the table before. If the kernel refuses
 * memory for a table, the admitted bytes stay charged until the process exits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "standalone/standalone.h"

#define BUSY 1ULL
#define BUCKET 8
#define FIRST_BUCKETS 64
#define TABLES 20

struct entry {
    _Atomic uint64_t key; /* 0: free */
    _Atomic uint64_t references;
    _Atomic uint64_t owner; /* a copy that all threads may read: only the thread that takes the entry reads the grant */
    struct fgpu_grant grant;
};

_Atomic bool fgpu_grants_any;
static _Atomic(struct entry *) tables[TABLES];
static _Atomic uint64_t contexts; /* number of contexts so far: each has a number, because the driver reuses
                                     handles */

/* the highest bits of an address are always 0 */
static uint64_t key_of(enum fgpu_space space, uint64_t handle) { return handle ^ ((uint64_t)space + 2) << 60; }
static enum fgpu_space space_of(uint64_t key) { return (enum fgpu_space)((key >> 60) - 2); }

static size_t buckets(unsigned table) { return (size_t)FIRST_BUCKETS << table; }

static struct entry *table_at(unsigned table, bool make)
{
    struct entry *entries = atomic_load_explicit(&tables[table], memory_order_acquire), *none = NULL;
    if (entries || !make) return entries;
    size_t bytes = buckets(table) * BUCKET * sizeof *entries;
    entries = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (entries == MAP_FAILED) return NULL;
    madvise(entries, bytes, MADV_WIPEONFORK);
    if (atomic_compare_exchange_strong(&tables[table], &none, entries)) return entries;
    munmap(entries, bytes);
    return none;
}

static struct entry *bucket_of(unsigned table, struct entry *entries, uint64_t key)
{
    uint64_t mixed = (key ^ key >> 32) * 0x9e3779b97f4a7c15ULL;
    return entries + (mixed >> 32 & (buckets(table) - 1)) * BUCKET;
}

static struct entry *find(uint64_t key)
{
    for (unsigned table = 0; table < TABLES; table++) {
        struct entry *entries = table_at(table, false);
        if (!entries) return NULL;
        struct entry *bucket = bucket_of(table, entries, key);
        for (unsigned i = 0; i < BUCKET; i++)
            if (atomic_load_explicit(&bucket[i].key, memory_order_acquire) == key) return &bucket[i];
    }
    return NULL;
}

static bool put(struct entry *entry, uint64_t key, const struct fgpu_grant *grant)
{
    uint64_t none = 0;
    if (atomic_load_explicit(&entry->key, memory_order_relaxed)) return false;
    if (!atomic_compare_exchange_strong(&entry->key, &none, BUSY)) return false;
    entry->grant = *grant;
    atomic_store_explicit(&entry->owner, grant->owner, memory_order_relaxed);
    atomic_store_explicit(&entry->references, 1, memory_order_relaxed);
    atomic_store_explicit(&entry->key, key, memory_order_release);
    return true;
}

void fgpu_grant_keep(struct fgpu_grant grant)
{
    uint64_t key = key_of(grant.space, grant.handle);
    int saved = errno;
    for (unsigned table = 0; table < TABLES; table++) {
        struct entry *entries = table_at(table, true);
        if (!entries) break;
        struct entry *bucket = bucket_of(table, entries, key);
        for (unsigned i = 0; i < BUCKET; i++)
            if (put(&bucket[i], key, &grant)) goto out;
    }
out:
    atomic_store_explicit(&fgpu_grants_any, true, memory_order_relaxed);
    errno = saved;
}

static bool take(struct entry *entry, uint64_t key, struct fgpu_grant *grant)
{
    if (!atomic_compare_exchange_strong(&entry->key, &key, BUSY)) return false;
    *grant = entry->grant;
    atomic_store_explicit(&entry->key, 0, memory_order_release);
    return true;
}

bool fgpu_grant_take(enum fgpu_space space, uint64_t handle, struct fgpu_grant *grant)
{
    uint64_t key = key_of(space, handle);
    for (struct entry *entry; (entry = find(key));)
        if (take(entry, key, grant)) return true;
    return false;
}

/* The driver has returned: the allocation was freed, or exists unchanged. */
void fgpu_grant_ended(const struct fgpu_grant *grant, CUresult result)
{
    if (result)
        fgpu_grant_keep(*grant);
    else
        fgpu_standalone_release(grant->index, grant->bytes);
}

/* -- handles of cuMemCreate: the memory is freed with the last reference; a mapping is a reference too */

bool fgpu_grant_refer(uint64_t handle)
{
    struct entry *entry = find(key_of(FGPU_SPACE_HANDLE, handle));
    if (entry) atomic_fetch_add(&entry->references, 1);
    return entry != NULL;
}

/* Drop a reference. Returns true if there was an entry; `grant` is the memory that the driver frees with this
 * reference: 0 bytes unless the reference is the last. */
bool fgpu_grant_drop(uint64_t handle, struct fgpu_grant *grant)
{
    uint64_t key = key_of(FGPU_SPACE_HANDLE, handle);
    struct entry *entry = find(key);
    *grant = (struct fgpu_grant){.handle = handle, .space = FGPU_SPACE_HANDLE};
    if (!entry) return false;
    if (atomic_fetch_sub(&entry->references, 1) == 1) take(entry, key, grant);
    return true;
}

void fgpu_grant_dropped(const struct fgpu_grant *grant, CUresult result)
{
    if (grant->bytes)
        fgpu_grant_ended(grant, result);
    else if (result)
        fgpu_grant_refer(grant->handle);
}

/* -- contexts, and the memory allocated in them */

/* The space of entries by ordinal + 1. Their `owner` is the handle of the device's primary context. */
#define PRIMARY (FGPU_SPACE_ARRAY + 1)

static uint64_t number_of(uint64_t context)
{
    uint64_t key = key_of(FGPU_SPACE_CONTEXT, context), number;
    for (struct entry *entry; context && (entry = find(key));) {
        number = atomic_load_explicit(&entry->owner, memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(&entry->key, memory_order_relaxed) == key) return number;
    }
    return 0;
}

/* Record an admitted allocation. If two threads create the primary context at the same time, both have an admission for
 * one context: the second admission is released. */
void fgpu_grant_made(unsigned index, uint64_t bytes, unsigned kind, uint64_t handle, uint64_t context)
{
    struct fgpu_grant grant = {.handle = handle, .bytes = bytes, .index = index};
    grant.space = kind == FGPU_VMM ? FGPU_SPACE_HANDLE : FGPU_SPACE_POINTER;
    if (kind == FGPU_CONTEXT) {
        if (number_of(handle)) {
            fgpu_standalone_release(index, bytes);
            return;
        }
        grant.space = FGPU_SPACE_CONTEXT;
        grant.owner = atomic_fetch_add(&contexts, 1) + 1;
    } else if (kind == FGPU_MEMORY) {
        grant.owner = number_of(context);
    }
    fgpu_grant_keep(grant);
}

void fgpu_primary_made(CUdevice ordinal, uint64_t context)
{
    uint64_t name = (uint64_t)ordinal + 1;
    if (!fgpu_has_grants() || find(key_of((enum fgpu_space)PRIMARY, name))) return;
    fgpu_grant_keep((struct fgpu_grant){.handle = name, .owner = context, .space = PRIMARY});
}

/* Remove the entry before the driver may return the handle for another context. */
void fgpu_context_leaves(struct fgpu_ending *ending, CUcontext context)
{
    *ending = (struct fgpu_ending){.primary = false};
    if (fgpu_has_grants()) fgpu_grant_take(FGPU_SPACE_CONTEXT, (uint64_t)context, &ending->of);
}

void fgpu_primary_leaves(struct fgpu_ending *ending, CUdevice ordinal)
{
    *ending = (struct fgpu_ending){.primary = false};
    if (!fgpu_has_grants() || !fgpu_grant_take((enum fgpu_space)PRIMARY, (uint64_t)ordinal + 1, &ending->name)) return;
    ending->primary = true;
    fgpu_grant_take(FGPU_SPACE_CONTEXT, ending->name.owner, &ending->of);
}

static bool is_of(enum fgpu_space space, uint64_t owner, uint64_t context)
{
    return space == FGPU_SPACE_POINTER && owner == context;
}

static void release_all_of(uint64_t context)
{
    for (unsigned table = 0; table < TABLES; table++) {
        struct entry *entries = table_at(table, false);
        if (!entries) return;
        for (size_t i = 0; i < buckets(table) * BUCKET; i++) {
            uint64_t key = atomic_load_explicit(&entries[i].key, memory_order_acquire);
            struct fgpu_grant grant;
            uint64_t owner = atomic_load_explicit(&entries[i].owner, memory_order_relaxed);
            if (key <= BUSY || !is_of(space_of(key), owner, context) || !take(&entries[i], key, &grant)) continue;
            if (is_of(grant.space, grant.owner, context))
                fgpu_standalone_release(grant.index, grant.bytes);
            else
                fgpu_grant_keep(grant); /* by now the handle is that of another allocation */
        }
    }
}

void fgpu_context_left(struct fgpu_ending *ending, bool ended)
{
    if (!ended) {
        if (ending->of.handle) fgpu_grant_keep(ending->of);
        if (ending->primary) fgpu_grant_keep(ending->name);
        return;
    }
    if (!ending->of.handle) return;
    release_all_of(ending->of.owner);
    fgpu_standalone_release(ending->of.index, ending->of.bytes);
}
