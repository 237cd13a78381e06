/*
 * room.c: requests for memory, which wait for room on a full device. The request fits in the limits, but limits may
 * exceed the device, and the driver was out of memory. If the host parks idle tenants for others (FGPU_WAITS), the
 * thread tells the agent, waits for its decision on the page of the level, and repeats the request when room was made.
 * Owns nothing.
 *
 * The page decides whether to wait, and the clock decides how long: DECISION_NS without a decision, FGPU_ROOM_NS after
 * the last decision of an agent that has ended, and LONGEST_NS in one call. In a time namespace the page's times are by
 * another clock: they do not count, and the thread waits for DECISION_NS.
 */
#include "account/account.h"
#include "link/link.h"

#define DECISION_NS (FGPU_SECOND_NS / 2)
#define LONGEST_NS (120 * FGPU_SECOND_NS)
#define TELL_NS (FGPU_SECOND_NS / 20) /* between two reports to the agent, if there is no decision yet */
#define NAP_NS 5000000L

/* The agent is told again from time to time: it then knows that a thread still waits. */
bool fgpu_room_comes(int index, uint64_t bytes, uint64_t *since_ns)
{
    uint64_t failed_ns = fgpu_now(), told_ns = 0;
    bool waits = false;
    if (!*since_ns) *since_ns = failed_ns;
    for (uint64_t now = failed_ns; index >= 0 && now < *since_ns + LONGEST_NS; now = fgpu_now()) {
        struct fgpu_view view = fgpu_look();
        if (view.link != FGPU_HELD || !(__atomic_load_n(&view.usage->flags, __ATOMIC_RELAXED) & FGPU_WAITS)) break;
        uint64_t until = __atomic_load_n(&view.usage->room_ns[index], __ATOMIC_RELAXED);
        bool decided = until > failed_ns, waited = waits;
        if (decided && until & FGPU_NO_ROOM) break;
        waits = until > now && until <= now + FGPU_ROOM_NS;
        if (!waits && (waited || (decided && until <= now))) return true;
        if (!waits && now >= failed_ns + DECISION_NS) break;
        if (now >= told_ns + (waits ? FGPU_SECOND_NS : TELL_NS)) {
            fgpu_admit_here((unsigned)index, bytes, FGPU_HELLO | FGPU_LACKS, 0);
            told_ns = now;
        }
        fgpu_nap(NAP_NS);
    }
    return false;
}

bool fgpu_request_here(struct fgpu_request *request, uint64_t bytes, unsigned kind, const void *handle)
{
    request->bytes = bytes;
    request->kind = kind;
    request->handle = handle;
    request->called = false;
    request->since_ns = 0;
    return fgpu_current(&request->ordinal);
}

bool fgpu_attempt(struct fgpu_request *request)
{
    struct admission *admission = &request->admission;
    if (request->called) {
        CUresult result = request->result;
        fgpu_settled(admission, result, result || !request->handle ? 0 : *(const uint64_t *)request->handle);
        if (LIKELY(result != CUDA_ERROR_OUT_OF_MEMORY)) return false;
        if (!fgpu_room_comes(admission->index, admission->bytes, &request->since_ns)) return false;
    }
    *admission = fgpu_admission(request->ordinal, request->bytes, request->kind);
    request->called = true;
    request->result = admission->refusal;
    return !admission->refusal;
}
