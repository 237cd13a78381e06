/* NVML's events: all calls, for a device on which no event occurs. */
#define _GNU_SOURCE
#include "conformance.h"

#include <time.h>

static long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void wait_in_vain(nvmlEventSet_t set)
{
    nvmlEventData_t data = {0};
    TRY("wait.now", nvmlEventSetWait_v2, set, &data, 0);
    long long before = now_ms();
    TRY("wait.while", nvmlEventSetWait_v2, set, &data, 200);
    long long after = now_ms();
    say("wait.while.lasts", after - before >= 190 && after - before < 2000);
    TRY("wait.null", nvmlEventSetWait_v2, set, NULL, 0);
    TRY("wait.first", nvmlEventSetWait, set, &data, 0);
}

void check_events(void)
{
    section("events");
    nvmlDevice_t device = NULL;
    nvmlEventSet_t set = NULL;
    nvmlEventData_t data;
    unsigned long long types = 0;
    TRY("uninitialised.create", nvmlEventSetCreate, &set);
    TRY("uninitialised.supported", nvmlDeviceGetSupportedEventTypes, NULL, &types);
    TRY("uninitialised.register", nvmlDeviceRegisterEvents, NULL, nvmlEventTypeXidCriticalError, NULL);
    TRY("uninitialised.wait", nvmlEventSetWait_v2, NULL, &data, 0);
    TRY("uninitialised.free", nvmlEventSetFree, NULL);
    CALL(nvmlInit_v2);
    CALL(nvmlDeviceGetHandleByIndex_v2, 0, &device);
    TRY("supported", nvmlDeviceGetSupportedEventTypes, device, &types);
    TRY("supported.null", nvmlDeviceGetSupportedEventTypes, device, NULL);
    say("supported.types", (long long)types);
    say("supported.xid", (types & nvmlEventTypeXidCriticalError) != 0);
    TRY("create", nvmlEventSetCreate, &set);
    TRY("create.null", nvmlEventSetCreate, NULL);
    wait_in_vain(set);
    TRY("register.power", nvmlDeviceRegisterEvents, device, nvmlEventTypePowerSourceChange, set);
    TRY("register.unknown", nvmlDeviceRegisterEvents, device, 1ULL << 60, set);
    TRY("register.handle", nvmlDeviceRegisterEvents, NULL, nvmlEventTypeXidCriticalError, set);
    TRY("register.null", nvmlDeviceRegisterEvents, device, nvmlEventTypeXidCriticalError, NULL);
    TRY("register", nvmlDeviceRegisterEvents, device, nvmlEventTypeXidCriticalError, set);
    TRY("register.again", nvmlDeviceRegisterEvents, device, nvmlEventTypeXidCriticalError, set);
    section("events.registered");
    wait_in_vain(set);
    section("events");
    TRY("free", nvmlEventSetFree, set);
    CALL(nvmlShutdown);
}
