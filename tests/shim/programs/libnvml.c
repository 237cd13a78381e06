/* A stand-in for NVML, with two devices. Each list has processes of neighbours. */
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <errno.h>
#include <nvml.h>
#include <stdio.h>
#include <string.h>

static int initialised;
#define CHECK(d)                                                                                                       \
    if (!initialised) return NVML_ERROR_UNINITIALIZED;                                                                 \
    if ((long)(d) < 1 || (long)(d) > 3) return NVML_ERROR_INVALID_ARGUMENT

nvmlReturn_t nvmlInit_v2(void) { return initialised = 1, NVML_SUCCESS; }
nvmlReturn_t nvmlInit(void) { return nvmlInit_v2(); }
nvmlReturn_t nvmlInitWithFlags(unsigned flags) { return nvmlInit_v2(); }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned i, nvmlDevice_t *d)
{
    return *d = (nvmlDevice_t)(long)(i + 1), NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *s, unsigned n)
{
    int b = 0x0f + (int)(long)d;
    errno = 36;
    CHECK(d);
    snprintf(s, n, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b, b, b, b, b, b, b, b,
             b, b, b, b, b, b, b, b);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t d, nvmlMemory_t *m)
{
    CHECK(d);
    *m = (nvmlMemory_t){.total = 17ull << 30, .free = 10ull << 30, .used = 7ull << 30};
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t d, nvmlMemory_v2_t *m)
{
    CHECK(d);
    if (m->version != nvmlMemory_v2) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    m->total = 17ull << 30, m->reserved = 1ull << 30, m->free = 10ull << 30, m->used = 6ull << 30;
    return NVML_SUCCESS;
}
static nvmlReturn_t list(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_t *p)
{
    unsigned had = *n;
    CHECK(d);
    *n = 1;
    if (!had) return NVML_ERROR_INSUFFICIENT_SIZE;
    *p = (nvmlProcessInfo_t){666, 1 << 20, 0xffffffff, 0xffffffff};
    return NVML_SUCCESS;
}
static nvmlReturn_t old_list(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_v1_t *p)
{
    nvmlProcessInfo_t one;
    nvmlReturn_t result = list(d, n, &one);
    if (result == NVML_SUCCESS) *p = (nvmlProcessInfo_v1_t){one.pid, one.usedGpuMemory};
    return result;
}
#define LISTS(kind)                                                                                                    \
    nvmlReturn_t nvmlDeviceGet##kind##RunningProcesses(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_v1_t *p)           \
    {                                                                                                                  \
        return old_list(d, n, p);                                                                                      \
    }                                                                                                                  \
    nvmlReturn_t nvmlDeviceGet##kind##RunningProcesses_v2(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_v2_t *p)        \
    {                                                                                                                  \
        return list(d, n, (void *)p);                                                                                  \
    }                                                                                                                  \
    nvmlReturn_t nvmlDeviceGet##kind##RunningProcesses_v3(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_t *p)           \
    {                                                                                                                  \
        return list(d, n, p);                                                                                          \
    }
LISTS(Compute)
LISTS(Graphics)
LISTS(MPSCompute)
nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t d, nvmlProcessDetailList_t *l)
{
    unsigned had = l->numProcArrayEntries;
    CHECK(d);
    l->numProcArrayEntries = 1;
    if (!had) return NVML_ERROR_INSUFFICIENT_SIZE;
    l->procArray[0].pid = 666;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t d, nvmlProcessUtilizationSample_t *u, unsigned *n,
                                             unsigned long long since)
{
    CHECK(d);
    (void)since;
    if (!u || *n < 3) return *n = 3, NVML_ERROR_INSUFFICIENT_SIZE;
    for (int i = 0; i < 3; i++) u[i] = (nvmlProcessUtilizationSample_t){.pid = i == 1 ? 41 : 666, .smUtil = 10 + i};
    return *n = 3, NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t d, nvmlProcessesUtilizationInfo_t *u)
{
    CHECK(d);
    if (!u->procUtilArray || u->processSamplesCount < 3)
        return u->processSamplesCount = 3, NVML_ERROR_INSUFFICIENT_SIZE;
    for (int i = 0; i < 3; i++)
        u->procUtilArray[i] = (nvmlProcessUtilizationInfo_v1_t){.pid = i == 1 ? 41 : 666, .smUtil = 10 + i};
    return u->processSamplesCount = 3, NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetEncoderSessions(nvmlDevice_t d, unsigned *n, nvmlEncoderSessionInfo_t *s)
{
    unsigned had = *n;
    CHECK(d);
    *n = 2;
    if (had < 2) return had ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
    s[0] = (nvmlEncoderSessionInfo_t){.sessionId = 1, .pid = 666};
    s[1] = (nvmlEncoderSessionInfo_t){.sessionId = 2, .pid = 41};
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetFBCSessions(nvmlDevice_t d, unsigned *n, nvmlFBCSessionInfo_t *s)
{
    unsigned had = *n;
    CHECK(d);
    *n = 2;
    if (had < 2) return had ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
    s[0] = (nvmlFBCSessionInfo_t){.sessionId = 1, .pid = 666};
    s[1] = (nvmlFBCSessionInfo_t){.sessionId = 2, .pid = 41};
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetAccountingPids(nvmlDevice_t d, unsigned *n, unsigned *pids)
{
    unsigned had = *n;
    CHECK(d);
    *n = 3;
    if (had < 3) return NVML_ERROR_INSUFFICIENT_SIZE;
    pids[0] = 666, pids[1] = 43, pids[2] = 667;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetAccountingStats(nvmlDevice_t d, unsigned pid, nvmlAccountingStats_t *s)
{
    CHECK(d);
    if (pid != 666 && pid != 43) return NVML_ERROR_NOT_FOUND;
    *s = (nvmlAccountingStats_t){.maxMemoryUsage = pid};
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetAccountingStats_v2(nvmlDevice_t d, unsigned long long *s) /* later header; s[0]: pid */
{
    CHECK(d);
    if ((unsigned)s[0] != 666 && (unsigned)s[0] != 43) return NVML_ERROR_NOT_FOUND;
    s[2] = (unsigned)s[0];
    return NVML_SUCCESS;
}
