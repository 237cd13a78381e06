/*
 * waits.c: calls by which a program waits for work or queries it, and the events that the program records for these
 * calls. An event has no entry if it was recorded while no device was gated, or if the entry was overwritten. Then a
 * wait for the event proves nothing.
 */
#include "base/own.h"
#include "gate/gate.h"
#include "link/link.h"

#define WAITED_NS 10000ULL /* a call that really waited takes at least this long */

static struct fgpu_own *const own = &fgpu_own_page.own;

/* -- events of the program */

static struct fgpu_recorded *entry_of(CUevent event)
{
    return &own->recorded[((uint64_t)event * 0x9e3779b97f4a7c15ULL) >> 58];
}
_Static_assert(FGPU_RECORDED == 64, "six bits");
_Static_assert(sizeof fgpu_own_page == FGPU_PAGE_BYTES, "one page");

/* A new event may have the handle of a destroyed event. It is done, because nothing has recorded it. */
void fgpu_event_made(CUresult result, const CUevent *event)
{
    if (result != CUDA_SUCCESS || !event) return;
    uint64_t its = (uint64_t)*event;
    atomic_compare_exchange_strong(&entry_of(*event)->event, &its, 0);
}

/* Return the mark of the work on the stream. The default streams of all contexts have the same handles: the lowest. */
static struct fgpu_mark mark_at(CUstream stream, bool per_thread, uint64_t until_ns)
{
    bool shared = (uint64_t)stream <= (uint64_t)CU_STREAM_PER_THREAD;
    return (struct fgpu_mark){fgpu_stream_key(stream, per_thread), shared ? fgpu_current_context() : NULL, until_ns};
}

/* Enter an event that was just recorded. The entry is written without a lock: a reader that finds another event or time
 * at the end discards what it has read. */
void fgpu_event_recorded(struct fgpu_rest rest, CUresult result, CUevent event, CUstream stream, bool per_thread)
{
    if (!rest.began_ns || result != CUDA_SUCCESS) return;
    struct fgpu_mark mark = mark_at(stream, per_thread, rest.began_ns);
    struct fgpu_recorded *entry = entry_of(event);
    atomic_store_explicit(&entry->event, 0, memory_order_release);
    atomic_store_explicit(&entry->key, mark.key, memory_order_release);
    atomic_store_explicit(&entry->context, mark.context, memory_order_release);
    atomic_store_explicit(&entry->until_ns, mark.until_ns, memory_order_release);
    atomic_store_explicit(&entry->event, (uint64_t)event, memory_order_release);
}

static struct fgpu_mark mark_of(CUevent event)
{
    struct fgpu_recorded *entry = entry_of(event);
    uint64_t its = atomic_load(&entry->event);
    struct fgpu_mark mark = {atomic_load(&entry->key), atomic_load(&entry->context), atomic_load(&entry->until_ns)};
    bool same = its == (uint64_t)event && atomic_load(&entry->event) == its;
    return same && atomic_load(&entry->until_ns) == mark.until_ns ? mark : (struct fgpu_mark){0};
}

/* -- waits and queries: `its` is the stream or event, 0 for a context */

/* Return true if the work is done. */
static bool is_done(struct fgpu_rest rest, CUresult result, uint64_t its)
{
    if (rest.began_ns && result == CUDA_ERROR_NOT_READY) {
        atomic_store_explicit(&own->polled, its, memory_order_relaxed);
        atomic_store_explicit(&own->polled_ns, rest.began_ns, memory_order_relaxed);
    }
    return rest.began_ns && result == CUDA_SUCCESS;
}

/* The work of the mark is done. If the call waited, the work has just ended. Otherwise the work ended after the
 * program's last query that found it not done. */
static void rested(struct fgpu_mark mark, uint64_t its, uint64_t began_ns)
{
    uint64_t now = fgpu_now(), undone_ns = atomic_load(&own->polled) == its ? atomic_load(&own->polled_ns) : 0;
    fgpu_gate_rested(mark, began_ns, now - began_ns > WAITED_NS ? now : undone_ns);
}

struct fgpu_rest fgpu_rest_begin(void)
{
    fgpu_hold();
    return (struct fgpu_rest){fgpu_is_gated() ? fgpu_now() : 0};
}

void fgpu_rest_stream(struct fgpu_rest rest, CUresult result, CUstream stream, bool per_thread)
{
    uint64_t its = fgpu_stream_key(stream, per_thread);
    if (is_done(rest, result, its)) rested(mark_at(stream, per_thread, rest.began_ns), its, rest.began_ns);
}

void fgpu_rest_context(struct fgpu_rest rest, CUresult result, CUcontext context)
{
    if (!is_done(rest, result, 0)) return;
    rested((struct fgpu_mark){0, context ? context : fgpu_current_context(), rest.began_ns}, 0, rest.began_ns);
}

void fgpu_rest_event(struct fgpu_rest rest, CUresult result, CUevent event)
{
    if (is_done(rest, result, (uint64_t)event)) rested(mark_of(event), (uint64_t)event, rest.began_ns);
}
