/*
 * orphans.c: bytes that processes of a level left when they ended, and that the device may still hold. Owns nothing;
 * reads the usage pages.
 *
 * They stay charged until the agent sees that the device let go of them, which takes it 0.1 s, and a few seconds where
 * many processes end at once. So a request that would fit without them may fit soon.
 */
#include "orphans.h"

struct room { /* of one level on one device, by one look at its page */
    uint64_t now, later, orphaned, orphaned_ns;
};

/* False: this level refuses nothing. */
static bool room_of(const struct fgpu_usage_page *page, int index, struct room *room)
{
    const struct fgpu_usage *usage = &page->devices[index];
    uint64_t limit = __atomic_load_n(&usage->limit, __ATOMIC_RELAXED);
    if (limit == FGPU_NO_LIMIT || fgpu_observes(page)) return false;
    uint64_t used = __atomic_load_n(&usage->used, __ATOMIC_RELAXED);
    room->orphaned = __atomic_load_n(&page->orphaned[index], __ATOMIC_RELAXED);
    room->orphaned_ns = __atomic_load_n(&page->orphaned_ns[index], __ATOMIC_RELAXED);
    uint64_t others = used > room->orphaned ? used - room->orphaned : 0;
    room->now = limit > used ? limit - used : 0;
    room->later = limit > others ? limit - others : 0;
    return true;
}

bool fgpu_has_orphans(struct fgpu_view view, int index)
{
    struct room room;
    for (unsigned level = 0; level < view.levels; level++)
        if (room_of(&view.usage[level], index, &room) && room.orphaned) return true;
    return false;
}

/* How much a context takes only the kernel knows, so any level that has orphans may be the one that refuses it. */
enum fgpu_prospect fgpu_prospect(struct fgpu_view view, int index, uint64_t bytes, unsigned kind, uint64_t now_ns)
{
    enum fgpu_prospect prospect = FGPU_FITS;
    struct room room;
    for (unsigned level = 0; level < view.levels; level++) {
        if (!room_of(&view.usage[level], index, &room)) continue;
        bool may_leave = room.orphaned && now_ns < room.orphaned_ns + FGPU_PATIENCE_NS;
        if (kind == FGPU_CONTEXT ? !may_leave : bytes <= room.now) continue;
        if (!may_leave || bytes > room.later) return FGPU_FITS_NEVER;
        prospect = FGPU_FITS_SOON;
    }
    return prospect;
}
