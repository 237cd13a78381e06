/*
 * orphans.c: bytes of a level whose processes have exited, and that the device may still hold. Owns nothing; reads the
 * usage pages.
 *
 * These bytes stay charged until the agent finds that the device has freed them. That takes 0.1 s, and a few seconds if
 * many processes exit at the same time. So a request that would fit without these bytes may fit soon, unless the agent
 * has found that the device keeps them.
 */
#include "account/orphans.h"

struct room { /* of one level on one device, from one read of its page */
    uint64_t now, later, orphaned, orphaned_ns, looked_ns;
};

/* Read the room of one level. Returns false if this level refuses nothing. */
static bool room_of(const struct fgpu_usage_page *page, int index, struct room *room)
{
    const struct fgpu_usage *usage = &page->devices[index];
    uint64_t limit = __atomic_load_n(&usage->limit, __ATOMIC_RELAXED);
    if (limit == FGPU_NO_LIMIT || fgpu_observes(page)) return false;
    uint64_t used = __atomic_load_n(&usage->used, __ATOMIC_RELAXED);
    room->orphaned = __atomic_load_n(&page->orphaned[index], __ATOMIC_RELAXED);
    room->orphaned_ns = __atomic_load_n(&page->orphaned_ns[index], __ATOMIC_RELAXED);
    room->looked_ns = __atomic_load_n(&page->looked_ns[index], __ATOMIC_RELAXED);
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

/* Return how soon orphaned bytes of a level may be freed. Never: there are none; the agent has found that the device
 * keeps them all, after the last of them was orphaned and the request began; or the last of them was orphaned
 * FGPU_ABSENCE_NS ago. */
static enum fgpu_prospect freed(const struct room *room, uint64_t since_ns, uint64_t now_ns)
{
    if (!room->orphaned || (room->looked_ns > room->orphaned_ns && room->looked_ns > since_ns)) return FGPU_FITS_NEVER;
    if (now_ns < room->orphaned_ns + FGPU_PATIENCE_NS) return FGPU_FITS_SOON;
    return now_ns < room->orphaned_ns + FGPU_ABSENCE_NS ? FGPU_FITS_AFTER_A_LOOK : FGPU_FITS_NEVER;
}

/* Return the prospect of a request that began at this time. Only the kernel's ledger has the size of a context, so any
 * level with orphaned bytes may be the level that refuses it. */
enum fgpu_prospect fgpu_prospect(const struct fgpu_view *view, int index, uint64_t bytes, unsigned kind,
                                 uint64_t since_ns, uint64_t now_ns)
{
    enum fgpu_prospect prospect = FGPU_FITS;
    struct room room;
    for (unsigned level = 0; level < view->levels; level++) {
        if (!room_of(&view->usage[level], index, &room)) continue;
        enum fgpu_prospect soon = freed(&room, since_ns, now_ns);
        if (kind == FGPU_CONTEXT ? soon == FGPU_FITS_NEVER : bytes <= room.now) continue;
        if (soon == FGPU_FITS_NEVER || bytes > room.later) return FGPU_FITS_NEVER;
        if (soon > prospect) prospect = soon;
    }
    return prospect;
}
