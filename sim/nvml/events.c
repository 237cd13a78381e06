/* Events for which a program waits. A board supports all events of the library, but only XIDs occur, when a test sets
 * the fault (server/faults.c). Registrations for the other events are accepted, as by the real library. */
#include "nvml/state.h"

#include <stdlib.h>
#include <time.h>

#define OF_ECC ((uint64_t)(nvmlEventTypeSingleBitEccError | nvmlEventTypeDoubleBitEccError))
/* Between two requests of a waiting thread. The server answers at once, and other threads use the connection in
 * between. */
#define LOOK_MS 10

/* For each device: the registered events, and how many of its XIDs were returned or are older than the registration. */
struct nvmlEventSet_st {
    uint64_t types[SIM_MAX_DEVICES];
    uint64_t known[SIM_MAX_DEVICES];
};

static uint64_t supported(const struct sim_device *device) { return nvmlEventTypeAll & ~(device->ecc ? 0 : OF_ECC); }

NVML_API nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *eventTypes)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, eventTypes, &d);
    if (!result) *eventTypes = supported(d);
    return result;
}

NVML_API nvmlEventSetCreate(nvmlEventSet_t *set)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!set) return NVML_ERROR_INVALID_ARGUMENT;
    *set = calloc(1, sizeof **set);
    return *set ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

NVML_API nvmlEventSetFree(nvmlEventSet_t set)
{
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!set) return NVML_ERROR_INVALID_ARGUMENT;
    free(set);
    return NVML_SUCCESS;
}

static nvmlReturn_t ask_xid(uint32_t device, uint64_t known, struct sim_xid *xid)
{
    return nvml_ask_after(SIM_XID, device, known, xid, sizeof *xid);
}

/* Events before the registration are not reported. */
NVML_API nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long eventTypes, nvmlEventSet_t set)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, set, &d);
    if (result) return result;
    if (eventTypes & ~supported(d)) return NVML_ERROR_NOT_SUPPORTED;
    struct sim_xid last;
    result = ask_xid(d->index, UINT64_MAX, &last);
    if (result) return result;
    if (eventTypes & ~set->types[d->index] & nvmlEventTypeXidCriticalError) set->known[d->index] = last.count;
    set->types[d->index] |= eventTypes;
    return NVML_SUCCESS;
}

/* Returns NVML_ERROR_TIMEOUT if there is no event now. */
static nvmlReturn_t next_event(nvmlEventSet_t set, nvmlEventData_t *data)
{
    for (uint32_t i = 0; i < nvml_count(); i++) {
        struct sim_xid xid;
        if (!(set->types[i] & nvmlEventTypeXidCriticalError)) continue;
        nvmlReturn_t result = ask_xid(i, set->known[i], &xid);
        if (result) return result;
        if (xid.count <= set->known[i]) continue;
        set->known[i] = xid.number;
        *data = (nvmlEventData_t){(nvmlDevice_t)nvml_device(i), nvmlEventTypeXidCriticalError, xid.xid, ~0u, ~0u};
        return NVML_SUCCESS;
    }
    return NVML_ERROR_TIMEOUT;
}

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static nvmlReturn_t wait_for_event(nvmlEventSet_t set, nvmlEventData_t *data, unsigned timeout_ms)
{
    SIM_FRAME();
    if (!nvml_is_ready()) return NVML_ERROR_UNINITIALIZED;
    if (!set || !data) return NVML_ERROR_INVALID_ARGUMENT;
    for (uint64_t now, until = now_ms() + timeout_ms;;) {
        nvmlReturn_t result = next_event(set, data);
        if (result != NVML_ERROR_TIMEOUT || (now = now_ms()) >= until) return result;
        uint64_t rest = until - now < LOOK_MS ? until - now : LOOK_MS;
        nanosleep(&(struct timespec){.tv_nsec = (long)rest * 1000000}, NULL);
    }
}

NVML_API nvmlEventSetWait(nvmlEventSet_t set, nvmlEventData_t *data, unsigned int timeoutms)
{
    return wait_for_event(set, data, timeoutms);
}

NVML_API nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *data, unsigned int timeoutms)
{
    return wait_for_event(set, data, timeoutms);
}
