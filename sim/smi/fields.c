/* The fields of --query-gpu and --query-compute-apps: the real tool's names, headings and units. The caller prints
 * [N/A] for what a board does not have. */
#include "smi/smi.h"

#include <time.h>

#define PUT_TEXT(what, call)                                                                                           \
    static void put_##what(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        nvml.call(row->device, out, (unsigned)room);                                                                   \
    }

#define PUT(what, type, call, format, value)                                                                           \
    static void put_##what(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        type got;                                                                                                      \
        if (!nvml.call(row->device, &got)) snprintf(out, room, format, value);                                         \
    }

/* Defines a field that is one of two results of a call. */
#define PUT_OF_TWO(what, type, call, ...)                                                                              \
    static void put_##what(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        type first, second;                                                                                            \
        if (!nvml.call(row->device, &first, &second)) snprintf(out, room, __VA_ARGS__);                                \
    }

#define PUT_MEMORY(part)                                                                                               \
    static void put_##part(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        nvmlMemory_v2_t memory;                                                                                        \
        if (smi_memory(row->device, &memory)) snprintf(out, room, "%u", smi_mib(memory.part));                         \
    }

#define PUT_CLOCK(what, call, type)                                                                                    \
    static void put_##what(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        unsigned mhz;                                                                                                  \
        if (!nvml.call(row->device, type, &mhz)) snprintf(out, room, "%u", mhz);                                       \
    }

static const char *enabled(nvmlEnableState_t state) { return state == NVML_FEATURE_ENABLED ? "Enabled" : "Disabled"; }

static const char *mig(unsigned mode) { return mode ? "Enabled" : "Disabled"; }

static const char *mode(nvmlComputeMode_t compute)
{
    static const char *const names[] = {"Default", "Exclusive_Thread", "Prohibited", "Exclusive_Process"};
    return (unsigned)compute < 4 ? names[compute] : "Unknown";
}

PUT_TEXT(name, nvmlDeviceGetName)
PUT_TEXT(uuid, nvmlDeviceGetUUID)
PUT_TEXT(serial, nvmlDeviceGetSerial)
PUT_TEXT(vbios, nvmlDeviceGetVbiosVersion)
PUT(bus, nvmlPciInfo_t, nvmlDeviceGetPciInfo_v3, "%s", got.busId)
PUT(pci_domain, nvmlPciInfo_t, nvmlDeviceGetPciInfo_v3, "0x%04X", got.domain)
PUT(pci_bus, nvmlPciInfo_t, nvmlDeviceGetPciInfo_v3, "0x%02X", got.bus)
PUT(pci_device, nvmlPciInfo_t, nvmlDeviceGetPciInfo_v3, "0x%02X", got.device)
PUT(pci_device_id, nvmlPciInfo_t, nvmlDeviceGetPciInfo_v3, "0x%08X", got.pciDeviceId)
PUT(busy, nvmlUtilization_t, nvmlDeviceGetUtilizationRates, "%u", got.gpu)
PUT(busy_memory, nvmlUtilization_t, nvmlDeviceGetUtilizationRates, "%u", got.memory)
PUT(fan, unsigned, nvmlDeviceGetFanSpeed, "%u", got)
PUT(state, nvmlPstates_t, nvmlDeviceGetPerformanceState, "P%u", (unsigned)got)
PUT(power, unsigned, nvmlDeviceGetPowerUsage, "%.2f", got / 1000.0)
PUT(power_limit, unsigned, nvmlDeviceGetPowerManagementLimit, "%.2f", got / 1000.0)
PUT(power_enforced, unsigned, nvmlDeviceGetEnforcedPowerLimit, "%.2f", got / 1000.0)
PUT(power_default, unsigned, nvmlDeviceGetPowerManagementDefaultLimit, "%.2f", got / 1000.0)
PUT_OF_TWO(power_min, unsigned, nvmlDeviceGetPowerManagementLimitConstraints, "%.2f", first / 1000.0)
PUT_OF_TWO(power_max, unsigned, nvmlDeviceGetPowerManagementLimitConstraints, "%.2f", second / 1000.0)
PUT(persistence, nvmlEnableState_t, nvmlDeviceGetPersistenceMode, "%s", enabled(got))
PUT(display_active, nvmlEnableState_t, nvmlDeviceGetDisplayActive, "%s", enabled(got))
PUT(display_mode, nvmlEnableState_t, nvmlDeviceGetDisplayMode, "%s", enabled(got))
PUT(compute_mode, nvmlComputeMode_t, nvmlDeviceGetComputeMode, "%s", mode(got))
PUT_OF_TWO(capability, int, nvmlDeviceGetCudaComputeCapability, "%d.%d", first, second)
PUT_OF_TWO(mig_now, unsigned, nvmlDeviceGetMigMode, "%s", mig(first))
PUT_OF_TWO(mig_next, unsigned, nvmlDeviceGetMigMode, "%s", mig(second))
PUT_OF_TWO(ecc_now, nvmlEnableState_t, nvmlDeviceGetEccMode, "%s", enabled(first))
PUT_OF_TWO(ecc_next, nvmlEnableState_t, nvmlDeviceGetEccMode, "%s", enabled(second))
PUT(link_now, unsigned, nvmlDeviceGetCurrPcieLinkGeneration, "%u", got)
PUT(link_max, unsigned, nvmlDeviceGetMaxPcieLinkGeneration, "%u", got)
PUT(width_now, unsigned, nvmlDeviceGetCurrPcieLinkWidth, "%u", got)
PUT(width_max, unsigned, nvmlDeviceGetMaxPcieLinkWidth, "%u", got)
PUT_MEMORY(total)
PUT_MEMORY(used)
PUT_MEMORY(free)
PUT_MEMORY(reserved)
PUT_CLOCK(clock_gr, nvmlDeviceGetClockInfo, NVML_CLOCK_GRAPHICS)
PUT_CLOCK(clock_sm, nvmlDeviceGetClockInfo, NVML_CLOCK_SM)
PUT_CLOCK(clock_mem, nvmlDeviceGetClockInfo, NVML_CLOCK_MEM)
PUT_CLOCK(clock_video, nvmlDeviceGetClockInfo, NVML_CLOCK_VIDEO)
PUT_CLOCK(max_gr, nvmlDeviceGetMaxClockInfo, NVML_CLOCK_GRAPHICS)
PUT_CLOCK(max_sm, nvmlDeviceGetMaxClockInfo, NVML_CLOCK_SM)
PUT_CLOCK(max_mem, nvmlDeviceGetMaxClockInfo, NVML_CLOCK_MEM)

static void put_index(const struct row *row, char *out, size_t room) { snprintf(out, room, "%u", row->index); }

static void put_count(const struct row *row, char *out, size_t room)
{
    unsigned n;
    (void)row;
    if (!nvml.nvmlDeviceGetCount_v2(&n)) snprintf(out, room, "%u", n);
}

static void put_driver(const struct row *row, char *out, size_t room)
{
    (void)row;
    nvml.nvmlSystemGetDriverVersion(out, (unsigned)room);
}

static void put_timestamp(const struct row *row, char *out, size_t room)
{
    char text[32];
    struct timespec now;
    (void)row;
    clock_gettime(CLOCK_REALTIME, &now);
    smi_now(text, sizeof text, "%Y/%m/%d %H:%M:%S");
    snprintf(out, room, "%s.%03ld", text, now.tv_nsec / 1000000);
}

static void put_temperature(const struct row *row, char *out, size_t room)
{
    unsigned temperature;
    if (!nvml.nvmlDeviceGetTemperature(row->device, NVML_TEMPERATURE_GPU, &temperature))
        snprintf(out, room, "%u", temperature);
}

static void put_nothing(const struct row *row, char *out, size_t room) { (void)row, (void)out, (void)room; }

#define PUT_ERRORS(what, type, counter)                                                                                \
    static void put_##what(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        unsigned long long n;                                                                                          \
        if (!nvml.nvmlDeviceGetTotalEccErrors(row->device, type, counter, &n)) snprintf(out, room, "%llu", n);         \
    }
PUT_ERRORS(corrected, NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_VOLATILE_ECC)
PUT_ERRORS(uncorrected, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)
PUT_ERRORS(uncorrected_ever, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_AGGREGATE_ECC)

static void put_pid(const struct row *row, char *out, size_t room) { snprintf(out, room, "%u", row->process->pid); }

static void put_process(const struct row *row, char *out, size_t room)
{
    smi_process_name(row->process->pid, out, (unsigned)room);
}

static void put_process_memory(const struct row *row, char *out, size_t room)
{
    if (row->process->usedGpuMemory != (unsigned long long)NVML_VALUE_NOT_AVAILABLE)
        snprintf(out, room, "%u", smi_mib(row->process->usedGpuMemory));
}

/* A heading is given only if it differs from the name. */
const struct field smi_gpu_fields[] = {
    {"timestamp", NULL, NULL, NULL, put_timestamp},
    {"driver_version", NULL, NULL, NULL, put_driver},
    {"count", NULL, NULL, NULL, put_count},
    {"index", NULL, NULL, NULL, put_index},
    {"name", "gpu_name", NULL, NULL, put_name},
    {"serial", "gpu_serial", NULL, NULL, put_serial},
    {"uuid", "gpu_uuid", NULL, NULL, put_uuid},
    {"vbios_version", NULL, NULL, NULL, put_vbios},
    {"pci.bus_id", "gpu_bus_id", NULL, NULL, put_bus},
    {"pci.domain", NULL, NULL, NULL, put_pci_domain},
    {"pci.bus", NULL, NULL, NULL, put_pci_bus},
    {"pci.device", NULL, NULL, NULL, put_pci_device},
    {"pci.device_id", NULL, NULL, NULL, put_pci_device_id},
    {"pcie.link.gen.current", "pcie.link.gen.gpucurrent", NULL, NULL, put_link_now},
    {"pcie.link.gen.max", "pcie.link.gen.gpumax", NULL, NULL, put_link_max},
    {"pcie.link.width.current", NULL, NULL, NULL, put_width_now},
    {"pcie.link.width.max", NULL, NULL, NULL, put_width_max},
    {"display_mode", NULL, NULL, NULL, put_display_mode},
    {"display_active", NULL, NULL, NULL, put_display_active},
    {"persistence_mode", NULL, NULL, NULL, put_persistence},
    {"fan.speed", NULL, NULL, "%", put_fan},
    {"pstate", NULL, NULL, NULL, put_state},
    {"memory.total", NULL, NULL, "MiB", put_total},
    {"memory.reserved", NULL, NULL, "MiB", put_reserved},
    {"memory.used", NULL, NULL, "MiB", put_used},
    {"memory.free", NULL, NULL, "MiB", put_free},
    {"compute_mode", NULL, NULL, NULL, put_compute_mode},
    {"compute_cap", NULL, NULL, NULL, put_capability},
    {"utilization.gpu", NULL, NULL, "%", put_busy},
    {"utilization.memory", NULL, NULL, "%", put_busy_memory},
    {"ecc.mode.current", NULL, NULL, NULL, put_ecc_now},
    {"ecc.mode.pending", NULL, NULL, NULL, put_ecc_next},
    {"ecc.errors.corrected.volatile.total", NULL, NULL, NULL, put_corrected},
    {"ecc.errors.uncorrected.volatile.total", NULL, NULL, NULL, put_uncorrected},
    {"ecc.errors.uncorrected.aggregate.total", NULL, NULL, NULL, put_uncorrected_ever},
    {"temperature.gpu", NULL, NULL, NULL, put_temperature},
    {"temperature.memory", NULL, NULL, NULL, put_nothing},
    {"power.draw", "power.draw.average", NULL, "W", put_power},
    {"power.draw.instant", NULL, NULL, "W", put_power},
    {"power.limit", NULL, NULL, "W", put_power_limit},
    {"enforced.power.limit", NULL, NULL, "W", put_power_enforced},
    {"power.default_limit", NULL, NULL, "W", put_power_default},
    {"power.min_limit", NULL, NULL, "W", put_power_min},
    {"power.max_limit", NULL, NULL, "W", put_power_max},
    {"clocks.current.graphics", "clocks.gr", NULL, "MHz", put_clock_gr},
    {"clocks.current.sm", "clocks.sm", NULL, "MHz", put_clock_sm},
    {"clocks.current.memory", "clocks.mem", NULL, "MHz", put_clock_mem},
    {"clocks.current.video", "clocks.video", NULL, "MHz", put_clock_video},
    {"clocks.max.graphics", "clocks.max.gr", NULL, "MHz", put_max_gr},
    {"clocks.max.sm", NULL, NULL, "MHz", put_max_sm},
    {"clocks.max.memory", "clocks.max.mem", NULL, "MHz", put_max_mem},
    {"mig.mode.current", NULL, NULL, NULL, put_mig_now},
    {"mig.mode.pending", NULL, NULL, NULL, put_mig_next},
    {0},
};

const struct field smi_process_fields[] = {
    {"timestamp", NULL, NULL, NULL, put_timestamp},
    {"gpu_name", NULL, NULL, NULL, put_name},
    {"gpu_bus_id", NULL, NULL, NULL, put_bus},
    {"gpu_serial", NULL, NULL, NULL, put_serial},
    {"gpu_uuid", NULL, NULL, NULL, put_uuid},
    {"pid", NULL, NULL, NULL, put_pid},
    {"process_name", "name", NULL, NULL, put_process},
    {"used_memory", "used_gpu_memory", "used_gpu_memory", "MiB", put_process_memory},
    {0},
};
