/* Address space: the addresses of device memory, the range at an address, and granules that small allocations share.
 * Device memory is reserved without access, so that a program that reads it on the host is killed as on a real
 * machine. Contents exist from the first copy or memset on. */
#include "cuda/memory/memory.h"

#include <search.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A test machine has less memory than the device that it simulates. Beyond this, contents are dropped and read as
 * zero. */
#define MAX_CONTENTS (1ull << 30)

static void *tree;
static uint64_t contents;

/* Reserves more than needed and trims it: mmap has no alignment above a page. Managed and pinned memory is `usable`. */
uintptr_t space_reserve(size_t size, size_t alignment, bool usable)
{
    size_t room = size + alignment;
    if (room < size) return 0;
    char *at = mmap(NULL, room, usable ? PROT_READ | PROT_WRITE : PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return 0;
    uintptr_t start = ((uintptr_t)at + alignment - 1) & ~(alignment - 1);
    if (start > (uintptr_t)at) munmap(at, start - (uintptr_t)at);
    if (start + size < (uintptr_t)at + room) munmap((void *)(start + size), (uintptr_t)at + room - start - size);
    return start;
}

void space_return(uintptr_t start, size_t size) { munmap((void *)start, size); }

/* Ranges never overlap, so "overlaps" can stand for "equal", and one tree finds every address inside a range. */
static int compare(const void *left, const void *right)
{
    const struct range *a = left, *b = right;
    return a->start + a->size <= b->start ? -1 : b->start + b->size <= a->start ? 1 : 0;
}

/* Returns NULL for addresses that only a reservation or the rest of a granule covers. */
struct range *range_find(uintptr_t at)
{
    struct range key = {.start = at, .size = 1};
    struct range **found = tfind(&key, &tree, compare);
    return found ? *found : NULL;
}

struct range *range_new(struct context *context, uintptr_t start, size_t size)
{
    struct range *range = calloc(1, sizeof *range);
    if (!range) return NULL;
    range->start = start;
    range->size = size;
    range->context = context;
    range->device = context->device;
    range->id = ++driver.next_id;
    /* tsearch returns an entry that exists already: a range that overlaps is refused. */
    struct range **found = tsearch(range, &tree, compare);
    if (!found || *found != range) {
        free(range);
        return NULL;
    }
    range->next = context->ranges;
    if (range->next) range->next->prev = range;
    context->ranges = range;
    return range;
}

void range_drop(struct range *range)
{
    tdelete(range, &tree, compare);
    if (range->prev)
        range->prev->next = range->next;
    else
        range->context->ranges = range->next;
    if (range->next) range->next->prev = range->prev;
    contents -= range->backed;
    if (range->span) space_return(range->start, range->span);
    free(range);
}

static uintptr_t page_up(uintptr_t at) { return (at + 4095) & ~(uintptr_t)4095; }

uint8_t *range_touch(struct range *range, uintptr_t at, size_t length)
{
    if (range->block) {
        if (!range->block->backed && mprotect((void *)range->block->start, GRANULE, PROT_READ | PROT_WRITE))
            return NULL;
        range->block->backed = true;
        return (uint8_t *)at;
    }
    if (range->is_foreign) return (uint8_t *)at;
    bool has_contents = range->kind == RANGE_DEVICE || range->kind == RANGE_POOL || range->kind == RANGE_GRAPH ||
                        range->kind == RANGE_DATA;
    if (!has_contents)
        return range->kind == RANGE_MAPPED && !(range->access & CU_MEM_ACCESS_FLAGS_PROT_READ) ? NULL : (uint8_t *)at;
    size_t needed = page_up(at + length - range->start);
    if (needed > range->span) needed = range->span;
    if (needed <= range->backed) return (uint8_t *)at;
    if (contents + (needed - range->backed) > MAX_CONTENTS ||
        mprotect((void *)range->start, needed, PROT_READ | PROT_WRITE))
        return NULL;
    contents += needed - range->backed;
    range->backed = needed;
    return (uint8_t *)at;
}

static unsigned units_of(size_t size) { return (unsigned)((size + UNIT - 1) / UNIT); }

/* Searches the first fit, as the real driver's small allocations show: neighbours at 512 bytes, and a new granule
 * only if none has room. */
static unsigned find_run(const struct block *block, unsigned units)
{
    unsigned run = 0;
    for (unsigned i = 0; i < UNITS; i++) {
        run = block->taken[i] ? 0 : run + 1;
        if (run == units) return i + 1 - units;
    }
    return UNITS;
}

/* Searches the oldest granule first, so that newer ones become empty. */
static struct block *find_block(struct context *context, unsigned units, unsigned *at)
{
    for (struct block *block = context->blocks; block; block = block->next)
        if (UNITS - block->used >= units && (*at = find_run(block, units)) < UNITS) return block;
    return NULL;
}

bool block_has_room(struct context *context, size_t size)
{
    unsigned at;
    return find_block(context, units_of(size), &at) != NULL;
}

uintptr_t block_carve(struct context *context, size_t size, struct block **out)
{
    unsigned units = units_of(size), at = 0;
    struct block *block = find_block(context, units, &at);
    if (!block) {
        at = 0; /* the search may have set it in a block that has room, but not in one piece */
        block = calloc(1, sizeof *block);
        if (!block) return 0;
        block->start = space_reserve(GRANULE, GRANULE, false);
        if (!block->start) {
            free(block);
            return 0;
        }
        struct block **last = &context->blocks;
        while (*last) last = &(*last)->next;
        *last = block;
    }
    memset(block->taken + at, 1, units);
    block->used += units;
    *out = block;
    return block->start + (uintptr_t)at * UNIT;
}

bool block_return(struct context *context, struct block *block, uintptr_t start, size_t size)
{
    unsigned units = units_of(size);
    memset(block->taken + (start - block->start) / UNIT, 0, units);
    block->used -= units;
    if (block->used) return false;
    struct block **at = &context->blocks;
    while (*at != block) at = &(*at)->next;
    *at = block->next;
    space_return(block->start, GRANULE);
    free(block);
    return true;
}
