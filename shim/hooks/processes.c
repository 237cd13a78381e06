/*
 * processes.c: lists of processes, which show a tenant its own processes alone. Owns nothing; reads the rows of the
 * control page, or the standalone ledger.
 *
 * The driver's lists are replaced, not filtered: they may have pids of another namespace. The driver is called first,
 * with no room for entries: its errors about the device and the arguments are returned. While the link is closed, the
 * lists are empty.
 */
#include <string.h>

#include "core/hook_table.h"
#include "hooks/view.h"
#include "link/link.h"
#include "standalone/standalone.h"

#define NO_INSTANCE 0xffffffffu /* not a MIG device */
#define READS 1000

struct rows {
    unsigned count;
    struct fgpu_row row[FGPU_ROWS];
};

/* Read whole words, since the gatekeeper may be writing them. */
static struct fgpu_row read_row(const struct fgpu_row *row)
{
    return (struct fgpu_row){.pid = __atomic_load_n(&row->pid, __ATOMIC_RELAXED),
                             .device = __atomic_load_n(&row->device, __ATOMIC_RELAXED),
                             .bytes = __atomic_load_n(&row->bytes, __ATOMIC_RELAXED)};
}

/* Copy the rows at a moment when no writer was changing them. If the writer has died during a change, all attempts
 * fail, and the list is empty. */
static void read_rows(struct fgpu_view view, int index, struct rows *rows)
{
    rows->count = 0;
    if (view.link != FGPU_HELD || index < 0) return;
    if (view.cooperative) {
        rows->count = fgpu_standalone_rows(index, rows->row, FGPU_ROWS);
        return;
    }
    const struct fgpu_control_page *page = view.control;
    for (int i = 0; i < READS; i++) {
        uint32_t before = __atomic_load_n(&page->sequence, __ATOMIC_ACQUIRE);
        if (before & 1) continue;
        unsigned count = __atomic_load_n(&page->row_count, __ATOMIC_RELAXED), kept = 0;
        for (unsigned j = 0; j < count && j < FGPU_ROWS; j++) {
            rows->row[kept] = read_row(&page->rows[j]);
            kept += rows->row[kept].device == (uint32_t)index;
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&page->sequence, __ATOMIC_RELAXED) != before) continue;
        rows->count = kept;
        return;
    }
}

/* Return whether this process is shown its tenant's processes alone: false if every level only observes. */
static bool is_tenant(struct fgpu_view view)
{
    for (unsigned level = 0; view.link == FGPU_HELD && level < view.levels; level++)
        if (!fgpu_observes(&view.usage[level])) return true;
    return view.link == FGPU_CLOSED;
}

/* Return whether a tenant is shown its own rows instead of the driver's list, and read them. */
static bool own_rows(nvmlDevice_t device, struct rows *rows)
{
    struct fgpu_view view = fgpu_look();
    if (!is_tenant(view)) return false;
    int index = fgpu_nvml_index(view, device);
    read_rows(view, index, rows);
    return true;
}

/* Compare pids. Both are pids of the reader's namespace. */
static bool has(const struct rows *rows, unsigned pid)
{
    for (unsigned i = 0; i < rows->count; i++)
        if (rows->row[i].pid == pid) return true;
    return false;
}

/* Apply NVML's convention: too little room is an error that reports the required number. */
static nvmlReturn_t fits(unsigned *room, unsigned needed, const void *array)
{
    unsigned had = *room;
    *room = needed;
    if (needed > had) return NVML_ERROR_INSUFFICIENT_SIZE;
    return needed && !array ? NVML_ERROR_INVALID_ARGUMENT : NVML_SUCCESS;
}

static nvmlReturn_t list_v1(const struct rows *rows, unsigned *count, nvmlProcessInfo_v1_t *infos)
{
    nvmlReturn_t result = fits(count, rows->count, infos);
    for (unsigned i = 0; result == NVML_SUCCESS && i < rows->count; i++)
        infos[i] = (nvmlProcessInfo_v1_t){rows->row[i].pid, rows->row[i].bytes};
    return result;
}

static nvmlReturn_t list_v2(const struct rows *rows, unsigned *count, nvmlProcessInfo_v2_t *infos)
{
    nvmlReturn_t result = fits(count, rows->count, infos);
    for (unsigned i = 0; result == NVML_SUCCESS && i < rows->count; i++)
        infos[i] = (nvmlProcessInfo_v2_t){rows->row[i].pid, rows->row[i].bytes, NO_INSTANCE, NO_INSTANCE};
    return result;
}

/* `shows`: 1 for compute processes. All processes of a tenant are compute processes, so the other lists are empty. */
#define PROCESS_LIST(name, type, list, shows)                                                                          \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, unsigned int *infoCount, type *infos)                                \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct rows rows;                                                                                              \
        unsigned none = 0;                                                                                             \
        if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;                                                             \
        if (!infoCount || !own_rows(device, &rows)) return driver(device, infoCount, infos);                           \
        nvmlReturn_t result = driver(device, &none, NULL);                                                             \
        if (result != NVML_SUCCESS && result != NVML_ERROR_INSUFFICIENT_SIZE) return result;                           \
        if (!(shows)) rows.count = 0;                                                                                  \
        return list(&rows, infoCount, infos);                                                                          \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses, nvmlProcessInfo_v1_t, list_v1, 1)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, nvmlProcessInfo_v2_t, list_v2, 1)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, nvmlProcessInfo_t, list_v2, 1)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses, nvmlProcessInfo_v1_t, list_v1, 0)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlProcessInfo_v2_t, list_v2, 0)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, nvmlProcessInfo_t, list_v2, 0)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses, nvmlProcessInfo_v1_t, list_v1, 0)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, nvmlProcessInfo_v2_t, list_v2, 0)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, nvmlProcessInfo_t, list_v2, 0)

/* An argument selects which of the three kinds of processes this call lists. */
EXPORT nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, nvmlProcessDetailList_t *plist)
{
    __typeof__(&nvmlDeviceGetRunningProcessDetailList) driver = REAL(nvmlDeviceGetRunningProcessDetailList);
    struct rows rows;
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    if (!plist || !own_rows(device, &rows)) return driver(device, plist);
    nvmlProcessDetailList_t probe = *plist;
    probe.numProcArrayEntries = 0;
    probe.procArray = NULL;
    nvmlReturn_t result = driver(device, &probe);
    if (result != NVML_SUCCESS && result != NVML_ERROR_INSUFFICIENT_SIZE) return result;
    if (plist->mode) rows.count = 0; /* 0 = compute */
    result = fits(&plist->numProcArrayEntries, rows.count, plist->procArray);
    for (unsigned i = 0; result == NVML_SUCCESS && i < rows.count; i++)
        plist->procArray[i] = (nvmlProcessDetail_v1_t){rows.row[i].pid, rows.row[i].bytes, NO_INSTANCE, NO_INSTANCE, 0};
    return result;
}

/* -- lists that only the driver has are filtered: utilisation, sessions, accounting. Removed rows are wiped from the
 * caller's array. The driver's pids are those of the caller's namespace. If there is too little room, the driver
 * reports the number of rows, and the caller learns nothing else about other processes. */

#define KEEP_OWN(rows, array, count, pid)                                                                              \
    ({                                                                                                                 \
        unsigned kept = 0;                                                                                             \
        for (unsigned i = 0; i < (count); i++)                                                                         \
            if (has(&(rows), (array)[i] pid)) (array)[kept++] = (array)[i];                                            \
        memset((array) + kept, 0, ((count)-kept) * sizeof *(array));                                                   \
        kept;                                                                                                          \
    })

EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *utilization,
                                                    unsigned int *processSamplesCount,
                                                    unsigned long long lastSeenTimeStamp)
{
    __typeof__(&nvmlDeviceGetProcessUtilization) driver = REAL(nvmlDeviceGetProcessUtilization);
    struct rows rows;
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    nvmlReturn_t result = driver(device, utilization, processSamplesCount, lastSeenTimeStamp);
    if (result != NVML_SUCCESS || !utilization || !processSamplesCount || !own_rows(device, &rows)) return result;
    *processSamplesCount = KEEP_OWN(rows, utilization, *processSamplesCount, .pid);
    return *processSamplesCount ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, nvmlProcessesUtilizationInfo_t *info)
{
    __typeof__(&nvmlDeviceGetProcessesUtilizationInfo) driver = REAL(nvmlDeviceGetProcessesUtilizationInfo);
    struct rows rows;
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    nvmlReturn_t result = driver(device, info);
    if (result != NVML_SUCCESS || !info || !info->procUtilArray || !own_rows(device, &rows)) return result;
    info->processSamplesCount = KEEP_OWN(rows, info->procUtilArray, info->processSamplesCount, .pid);
    return info->processSamplesCount ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

/* Encoder and capture sessions have pids; accounting lists nothing but pids. */
#define FILTERED_LIST(name, type, pid)                                                                                 \
    EXPORT nvmlReturn_t name(nvmlDevice_t device, unsigned int *count, type *array)                                    \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct rows rows;                                                                                              \
        if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;                                                             \
        unsigned room = count ? *count : 0;                                                                            \
        nvmlReturn_t result = driver(device, count, array);                                                            \
        if (result != NVML_SUCCESS || !array || *count > room || !own_rows(device, &rows)) return result;              \
        *count = KEEP_OWN(rows, array, *count, pid);                                                                   \
        return result;                                                                                                 \
    }

FILTERED_LIST(nvmlDeviceGetEncoderSessions, nvmlEncoderSessionInfo_t, .pid)
FILTERED_LIST(nvmlDeviceGetFBCSessions, nvmlFBCSessionInfo_t, .pid)
FILTERED_LIST(nvmlDeviceGetAccountingPids, unsigned int, )

/* Call the driver too, with a spare struct, for its errors. */
EXPORT nvmlReturn_t nvmlDeviceGetAccountingStats(nvmlDevice_t device, unsigned int pid, nvmlAccountingStats_t *stats)
{
    __typeof__(&nvmlDeviceGetAccountingStats) driver = REAL(nvmlDeviceGetAccountingStats);
    nvmlAccountingStats_t aside = {0};
    struct rows rows;
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    if (!stats || !own_rows(device, &rows) || has(&rows, pid)) return driver(device, pid, stats);
    nvmlReturn_t result = driver(device, pid, &aside);
    return result == NVML_SUCCESS ? NVML_ERROR_NOT_FOUND : result;
}

EXPORT nvmlReturn_t nvmlDeviceGetAccountingStats_v2(nvmlDevice_t device, nvmlAccountingStats_v2_t *stats)
{
    __typeof__(&nvmlDeviceGetAccountingStats_v2) driver = REAL(nvmlDeviceGetAccountingStats_v2);
    struct rows rows;
    if (!driver) return NVML_ERROR_FUNCTION_NOT_FOUND;
    if (!stats || !own_rows(device, &rows) || has(&rows, stats->pid)) return driver(device, stats);
    nvmlAccountingStats_v2_t aside = {.pid = stats->pid};
    nvmlReturn_t result = driver(device, &aside);
    return result == NVML_SUCCESS ? NVML_ERROR_NOT_FOUND : result;
}
