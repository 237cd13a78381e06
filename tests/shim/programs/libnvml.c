/* A stand-in for NVML: two devices, neighbours' processes in every list. */
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
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_v1_t *p)
{
    return list(d, n, (void *)p);
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_t *p)
{
    return list(d, n, p);
}
nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_t *p)
{
    return list(d, n, p);
}
nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t d, unsigned *n, nvmlProcessInfo_t *p)
{
    return list(d, n, p);
}
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
