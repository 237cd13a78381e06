/* `nvidia-smi -q`, as text and as XML, with the same values in both. The sections about memory and processes are
 * complete. The other sections have the most used values, at their places. */
#include "smi/smi.h"

#include <stdarg.h>
#include <string.h>
#include <strings.h>

struct log {
    bool xml;
    unsigned parts;
    int depth;
    const char *open[8]; /* the XML names of open sections */
};

static void indent(const struct log *log, int extra)
{
    for (int i = 0; i < log->depth + extra; i++) fputs(log->xml ? "\t" : "    ", stdout);
}

static void escape(const char *text)
{
    for (; *text; text++) {
        switch (*text) {
        case '<':
            fputs("&lt;", stdout);
            break;
        case '>':
            fputs("&gt;", stdout);
            break;
        case '&':
            fputs("&amp;", stdout);
            break;
        default:
            putchar(*text);
        }
    }
}

static void begin(struct log *log, const char *label, const char *name)
{
    indent(log, 0);
    printf(log->xml ? "<%s>\n" : "%s\n", log->xml ? name : label);
    log->open[log->depth++] = name;
}

static void end(struct log *log)
{
    log->depth--;
    if (!log->xml) return;
    indent(log, 0);
    printf("</%s>\n", log->open[log->depth]);
}

__attribute__((format(printf, 4, 5))) static void line(struct log *log, const char *label, const char *name,
                                                       const char *format, ...)
{
    char value[512];
    va_list list;
    va_start(list, format);
    vsnprintf(value, sizeof value, format, list);
    va_end(list);
    indent(log, 0);
    if (log->xml) {
        printf("<%s>", name);
        escape(value);
        printf("</%s>\n", name);
    } else {
        printf("%-*s: %s\n", 42 - 4 * log->depth, label, value);
    }
}

/* Prints a number with its unit, or N/A if the board has none. */
static void number(struct log *log, const char *label, const char *name, nvmlReturn_t result, double value,
                   const char *unit, int digits)
{
    if (result)
        line(log, label, name, "N/A");
    else
        line(log, label, name, "%.*f %s", digits, value, unit);
}

static const char *state(nvmlReturn_t result, nvmlEnableState_t on)
{
    return result ? "N/A" : on == NVML_FEATURE_ENABLED ? "Enabled" : "Disabled";
}

static const char *architecture(nvmlDevice_t device)
{
    static const char *const names[] = {"Kepler", "Maxwell", "Pascal",       "Volta",
                                        "Turing", "Ampere",  "Ada Lovelace", "Hopper"};
    nvmlDeviceArchitecture_t number_of;
    bool known = !nvml.nvmlDeviceGetArchitecture(device, &number_of) && number_of >= 2 && number_of <= 9;
    return known ? names[number_of - 2] : "Unknown";
}

static void text(struct log *log, const char *label, const char *name, nvmlDevice_t device,
                 nvmlReturn_t (*get)(nvmlDevice_t, char *, unsigned))
{
    char value[96] = "N/A";
    get(device, value, sizeof value);
    line(log, label, name, "%s", value);
}

static void mode(struct log *log, const char *label, const char *name, nvmlDevice_t device,
                 nvmlReturn_t (*get)(nvmlDevice_t, nvmlEnableState_t *))
{
    nvmlEnableState_t on = NVML_FEATURE_DISABLED;
    nvmlReturn_t result = get(device, &on);
    line(log, label, name, "%s", state(result, on));
}

static void identity(struct log *log, nvmlDevice_t device)
{
    unsigned now, next, number_of;
    text(log, "Product Name", "product_name", device, nvml.nvmlDeviceGetName);
    line(log, "Product Brand", "product_brand", "NVIDIA");
    line(log, "Product Architecture", "product_architecture", "%s", architecture(device));
    mode(log, "Display Mode", "display_mode", device, nvml.nvmlDeviceGetDisplayMode);
    mode(log, "Display Active", "display_active", device, nvml.nvmlDeviceGetDisplayActive);
    mode(log, "Persistence Mode", "persistence_mode", device, nvml.nvmlDeviceGetPersistenceMode);
    nvmlReturn_t result = nvml.nvmlDeviceGetMigMode(device, &now, &next);
    begin(log, "MIG Mode", "mig_mode");
    line(log, "Current", "current_mig", "%s", result ? "N/A" : now ? "Enabled" : "Disabled");
    line(log, "Pending", "pending_mig", "%s", result ? "N/A" : next ? "Enabled" : "Disabled");
    end(log);
    text(log, "Serial Number", "serial", device, nvml.nvmlDeviceGetSerial);
    text(log, "GPU UUID", "uuid", device, nvml.nvmlDeviceGetUUID);
    if (!nvml.nvmlDeviceGetMinorNumber(device, &number_of)) line(log, "Minor Number", "minor_number", "%u", number_of);
    text(log, "VBIOS Version", "vbios_version", device, nvml.nvmlDeviceGetVbiosVersion);
    line(log, "MultiGPU Board", "multigpu_board", "No");
    if (!nvml.nvmlDeviceGetBoardId(device, &number_of)) line(log, "Board ID", "board_id", "0x%x", number_of);
    text(log, "Board Part Number", "board_part_number", device, nvml.nvmlDeviceGetBoardPartNumber);
}

static void pci(struct log *log, nvmlDevice_t device)
{
    nvmlPciInfo_t where;
    if (nvml.nvmlDeviceGetPciInfo_v3(device, &where)) return;
    begin(log, "PCI", "pci");
    line(log, "Bus", "pci_bus", "0x%02X", where.bus);
    line(log, "Device", "pci_device", "0x%02X", where.device);
    line(log, "Domain", "pci_domain", "0x%04X", where.domain);
    line(log, "Device Id", "pci_device_id", "0x%08X", where.pciDeviceId);
    line(log, "Bus Id", "pci_bus_id", "%s", where.busId);
    line(log, "Sub System Id", "pci_sub_system_id", "0x%08X", where.pciSubSystemId);
    end(log);
}

static void memory(struct log *log, nvmlDevice_t device)
{
    nvmlMemory_v2_t fb;
    nvmlBAR1Memory_t bar1;
    bool known = smi_memory(device, &fb);
    begin(log, "FB Memory Usage", "fb_memory_usage");
    number(log, "Total", "total", !known, smi_mib(fb.total), "MiB", 0);
    number(log, "Reserved", "reserved", !known, smi_mib(fb.reserved), "MiB", 0);
    number(log, "Used", "used", !known, smi_mib(fb.used), "MiB", 0);
    number(log, "Free", "free", !known, smi_mib(fb.free), "MiB", 0);
    end(log);
    known = !nvml.nvmlDeviceGetBAR1MemoryInfo(device, &bar1);
    begin(log, "BAR1 Memory Usage", "bar1_memory_usage");
    number(log, "Total", "total", !known, smi_mib(bar1.bar1Total), "MiB", 0);
    number(log, "Used", "used", !known, smi_mib(bar1.bar1Used), "MiB", 0);
    number(log, "Free", "free", !known, smi_mib(bar1.bar1Free), "MiB", 0);
    end(log);
    begin(log, "Conf Compute Protected Memory Usage", "cc_protected_memory_usage");
    number(log, "Total", "total", NVML_SUCCESS, 0, "MiB", 0);
    number(log, "Used", "used", NVML_SUCCESS, 0, "MiB", 0);
    number(log, "Free", "free", NVML_SUCCESS, 0, "MiB", 0);
    end(log);
}

static void utilization(struct log *log, nvmlDevice_t device)
{
    nvmlUtilization_t rates = {0};
    unsigned busy = 0, period;
    nvmlReturn_t result = nvml.nvmlDeviceGetUtilizationRates(device, &rates);
    begin(log, "Utilization", "utilization");
    number(log, "GPU", "gpu_util", result, rates.gpu, "%", 0);
    number(log, "Memory", "memory_util", result, rates.memory, "%", 0);
    result = nvml.nvmlDeviceGetEncoderUtilization(device, &busy, &period);
    number(log, "Encoder", "encoder_util", result, busy, "%", 0);
    result = nvml.nvmlDeviceGetDecoderUtilization(device, &busy, &period);
    number(log, "Decoder", "decoder_util", result, busy, "%", 0);
    number(log, "JPEG", "jpeg_util", NVML_SUCCESS, 0, "%", 0);
    number(log, "OFA", "ofa_util", NVML_SUCCESS, 0, "%", 0);
    end(log);
}

static void ecc(struct log *log, nvmlDevice_t device)
{
    nvmlEnableState_t now, next;
    nvmlReturn_t result = nvml.nvmlDeviceGetEccMode(device, &now, &next);
    begin(log, "ECC Mode", "ecc_mode");
    line(log, "Current", "current_ecc", "%s", state(result, now));
    line(log, "Pending", "pending_ecc", "%s", state(result, next));
    end(log);
}

static void temperature(struct log *log, nvmlDevice_t device)
{
    unsigned degrees = 0;
    nvmlReturn_t result = nvml.nvmlDeviceGetTemperature(device, NVML_TEMPERATURE_GPU, &degrees);
    begin(log, "Temperature", "temperature");
    number(log, "GPU Current Temp", "gpu_temp", result, degrees, "C", 0);
    end(log);
}

static void power(struct log *log, nvmlDevice_t device)
{
    unsigned mw = 0, least = 0, most = 0;
    begin(log, "GPU Power Readings", "gpu_power_readings");
    nvmlReturn_t result = nvml.nvmlDeviceGetPowerUsage(device, &mw);
    number(log, "Average Power Draw", "average_power_draw", result, mw / 1000.0, "W", 2);
    number(log, "Instantaneous Power Draw", "instant_power_draw", result, mw / 1000.0, "W", 2);
    result = nvml.nvmlDeviceGetEnforcedPowerLimit(device, &mw);
    number(log, "Current Power Limit", "current_power_limit", result, mw / 1000.0, "W", 2);
    result = nvml.nvmlDeviceGetPowerManagementLimit(device, &mw);
    number(log, "Requested Power Limit", "requested_power_limit", result, mw / 1000.0, "W", 2);
    result = nvml.nvmlDeviceGetPowerManagementDefaultLimit(device, &mw);
    number(log, "Default Power Limit", "default_power_limit", result, mw / 1000.0, "W", 2);
    result = nvml.nvmlDeviceGetPowerManagementLimitConstraints(device, &least, &most);
    number(log, "Min Power Limit", "min_power_limit", result, least / 1000.0, "W", 2);
    number(log, "Max Power Limit", "max_power_limit", result, most / 1000.0, "W", 2);
    end(log);
}

static void clocks(struct log *log, nvmlDevice_t device, const char *label, const char *name,
                   nvmlReturn_t (*get)(nvmlDevice_t, nvmlClockType_t, unsigned *))
{
    static const struct {
        nvmlClockType_t type;
        const char *label, *name;
    } kinds[] = {{NVML_CLOCK_GRAPHICS, "Graphics", "graphics_clock"},
                 {NVML_CLOCK_SM, "SM", "sm_clock"},
                 {NVML_CLOCK_MEM, "Memory", "mem_clock"},
                 {NVML_CLOCK_VIDEO, "Video", "video_clock"}};
    begin(log, label, name);
    for (int i = 0; i < 4; i++) {
        unsigned mhz = 0;
        nvmlReturn_t result = get(device, kinds[i].type, &mhz);
        number(log, kinds[i].label, kinds[i].name, result, mhz, "MHz", 0);
    }
    end(log);
}

static void process(struct log *log, const nvmlProcessInfo_t *one)
{
    char name[256];
    bool known = one->usedGpuMemory != (unsigned long long)NVML_VALUE_NOT_AVAILABLE;
    smi_process_name(one->pid, name, sizeof name);
    if (log->xml) begin(log, "", "process_info");
    line(log, "GPU instance ID", "gpu_instance_id", "N/A");
    line(log, "Compute instance ID", "compute_instance_id", "N/A");
    line(log, "Process ID", "pid", "%u", one->pid);
    log->depth += !log->xml; /* in text, what follows is indented below the line before */
    line(log, "Type", "type", "C");
    line(log, "Name", "process_name", "%s", name);
    number(log, "Used GPU Memory", "used_memory", !known, known ? smi_mib(one->usedGpuMemory) : 0, "MiB", 0);
    log->depth -= !log->xml;
    if (log->xml) end(log);
}

static void process_list(struct log *log, nvmlDevice_t device)
{
    static struct processes list;
    smi_processes(device, &list);
    if (!list.n && !log->xml) {
        line(log, "Processes", "processes", "None");
        return;
    }
    begin(log, "Processes", "processes");
    for (unsigned i = 0; i < list.n; i++) process(log, &list.lines[i]);
    end(log);
    if (log->xml && log->parts & PART_ALL) {
        begin(log, "", "accounted_processes");
        end(log);
    }
}

static bool wants(const struct log *log, unsigned part) { return log->parts & (part | PART_ALL); }

static void device_log(struct log *log, nvmlDevice_t device)
{
    nvmlPciInfo_t where = {.busId = "N/A"};
    nvmlComputeMode_t compute;
    nvmlPstates_t performance;
    unsigned speed = 0;
    nvml.nvmlDeviceGetPciInfo_v3(device, &where);
    printf(log->xml ? "\t<gpu id=\"%s\">\n" : "GPU %s\n", where.busId);
    log->depth = log->xml ? 2 : 1;
    if (wants(log, 0)) {
        identity(log, device);
        pci(log, device);
        nvmlReturn_t result = nvml.nvmlDeviceGetFanSpeed(device, &speed);
        number(log, "Fan Speed", "fan_speed", result, speed, "%", 0);
        if (!nvml.nvmlDeviceGetPerformanceState(device, &performance))
            line(log, "Performance State", "performance_state", "P%u", (unsigned)performance);
    }
    if (wants(log, PART_MEMORY)) memory(log, device);
    if (wants(log, PART_COMPUTE))
        line(log, "Compute Mode", "compute_mode", "%s",
             nvml.nvmlDeviceGetComputeMode(device, &compute) ? "N/A"
             : compute == NVML_COMPUTEMODE_DEFAULT           ? "Default"
                                                             : "Exclusive_Process");
    if (wants(log, PART_UTILIZATION)) utilization(log, device);
    if (wants(log, PART_ECC)) ecc(log, device);
    if (wants(log, PART_TEMPERATURE)) temperature(log, device);
    if (wants(log, PART_POWER)) power(log, device);
    if (wants(log, PART_CLOCK)) {
        clocks(log, device, "Clocks", "clocks", nvml.nvmlDeviceGetClockInfo);
        clocks(log, device, "Max Clocks", "max_clocks", nvml.nvmlDeviceGetMaxClockInfo);
    }
    if (wants(log, PART_PIDS)) process_list(log, device);
    log->depth = log->xml;
    puts(log->xml ? "\t</gpu>\n" : "");
}

unsigned smi_parts(const char *names)
{
    static const char *const known[] = {"MEMORY", "UTILIZATION", "ECC",     "TEMPERATURE",
                                        "POWER",  "CLOCK",       "COMPUTE", "PIDS"};
    unsigned parts = 0;
    for (const char *at = names; *at; at += strspn(at, ",")) {
        size_t length = strcspn(at, ",");
        unsigned found = 0;
        for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
            if (strlen(known[i]) == length && !strncasecmp(known[i], at, length)) found = 1u << i;
        if (!found) return 0;
        parts |= found;
        at += length;
    }
    return parts;
}

int smi_full(bool xml, unsigned parts)
{
    struct log log = {.xml = xml, .parts = parts, .depth = xml};
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices);
    char now[64], driver[32] = "N/A";
    int version = 0;
    smi_now(now, sizeof now, "%a %b %e %H:%M:%S %Y");
    nvml.nvmlSystemGetDriverVersion(driver, sizeof driver);
    nvml.nvmlSystemGetCudaDriverVersion_v2(&version);
    puts(xml ? "<?xml version=\"1.0\" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM \"nvsmi_device_v12.dtd\">\n<nvidia_smi_log>"
             : "\n==============NVSMI LOG==============\n");
    line(&log, "Timestamp", "timestamp", "%s", now);
    line(&log, "Driver Version", "driver_version", "%s", driver);
    line(&log, "CUDA Version", "cuda_version", "%d.%d", version / 1000, version % 1000 / 10);
    if (!xml) puts("");
    line(&log, "Attached GPUs", "attached_gpus", "%u", n);
    for (unsigned i = 0; i < n; i++) device_log(&log, devices[i]);
    if (xml) puts("</nvidia_smi_log>");
    return 0;
}
