/* --query-gpu and --query-compute-apps: csv with the real tool's field names, headings and units. */
#include "smi.h"

#include <string.h>

#define MAX_FIELDS 32

struct row {
    unsigned index;
    nvmlDevice_t device;
    const nvmlProcessInfo_t *process;
};

typedef void put(const struct row *row, char *out, size_t room);

static void put_index(const struct row *row, char *out, size_t room) { snprintf(out, room, "%u", row->index); }

static void put_name(const struct row *row, char *out, size_t room)
{
    nvml.nvmlDeviceGetName(row->device, out, (unsigned)room);
}

static void put_uuid(const struct row *row, char *out, size_t room)
{
    nvml.nvmlDeviceGetUUID(row->device, out, (unsigned)room);
}

static void put_driver(const struct row *row, char *out, size_t room)
{
    (void)row;
    nvml.nvmlSystemGetDriverVersion(out, (unsigned)room);
}

static void put_bus(const struct row *row, char *out, size_t room)
{
    nvmlPciInfo_t pci;
    if (!nvml.nvmlDeviceGetPciInfo_v3(row->device, &pci)) snprintf(out, room, "%s", pci.busId);
}

#define PUT_MEMORY(part)                                                                                               \
    static void put_##part(const struct row *row, char *out, size_t room)                                              \
    {                                                                                                                  \
        nvmlMemory_v2_t memory;                                                                                        \
        if (smi_memory(row->device, &memory)) snprintf(out, room, "%u", smi_mib(memory.part));                         \
    }
PUT_MEMORY(total)
PUT_MEMORY(used)
PUT_MEMORY(free)
PUT_MEMORY(reserved)

static void put_busy(const struct row *row, char *out, size_t room)
{
    nvmlUtilization_t utilization;
    if (!nvml.nvmlDeviceGetUtilizationRates(row->device, &utilization)) snprintf(out, room, "%u", utilization.gpu);
}

static void put_temperature(const struct row *row, char *out, size_t room)
{
    unsigned temperature;
    if (!nvml.nvmlDeviceGetTemperature(row->device, NVML_TEMPERATURE_GPU, &temperature))
        snprintf(out, room, "%u", temperature);
}

static void put_pid(const struct row *row, char *out, size_t room) { snprintf(out, room, "%u", row->process->pid); }

static void put_process(const struct row *row, char *out, size_t room)
{
    smi_process_name(row->process->pid, out, (unsigned)room);
}

static void put_process_memory(const struct row *row, char *out, size_t room)
{
    snprintf(out, room, "%u", smi_mib(row->process->usedGpuMemory));
}

struct field {
    const char *name, *alias, *heading, *unit;
    put *put;
};

static const struct field gpu_fields[] = {
    {"index", NULL, "index", NULL, put_index},
    {"name", "gpu_name", "name", NULL, put_name},
    {"uuid", "gpu_uuid", "uuid", NULL, put_uuid},
    {"memory.total", NULL, "memory.total", "MiB", put_total},
    {"memory.used", NULL, "memory.used", "MiB", put_used},
    {"memory.free", NULL, "memory.free", "MiB", put_free},
    {"memory.reserved", NULL, "memory.reserved", "MiB", put_reserved},
    {"driver_version", NULL, "driver_version", NULL, put_driver},
    {"pci.bus_id", "gpu_bus_id", "pci.bus_id", NULL, put_bus},
    {"utilization.gpu", NULL, "utilization.gpu", "%", put_busy},
    {"temperature.gpu", NULL, "temperature.gpu", NULL, put_temperature},
    {0},
};

static const struct field process_fields[] = {
    {"pid", NULL, "pid", NULL, put_pid},
    {"used_memory", "used_gpu_memory", "used_gpu_memory", "MiB", put_process_memory},
    {"process_name", "name", "process_name", NULL, put_process},
    {"gpu_uuid", NULL, "gpu_uuid", NULL, put_uuid},
    {"gpu_name", NULL, "gpu_name", NULL, put_name},
    {"gpu_bus_id", NULL, "gpu_bus_id", NULL, put_bus},
    {0},
};

static const struct field *find(const struct field *known, const char *name, size_t length)
{
    for (; known->name; known++)
        if ((strlen(known->name) == length && !strncmp(known->name, name, length)) ||
            (known->alias && strlen(known->alias) == length && !strncmp(known->alias, name, length)))
            return known;
    return NULL;
}

/* The number of fields, or 0 with the real tool's complaint. */
static unsigned parse(const struct field *known, const char *names, const struct field **out)
{
    unsigned n = 0;
    for (const char *at = names;; at++) {
        size_t length = strcspn(at, ",");
        const struct field *field = n < MAX_FIELDS ? find(known, at, length) : NULL;
        if (!field) {
            printf("Field \"%.*s\" is not a valid field to query.\n\n", (int)length, at);
            return 0;
        }
        out[n++] = field;
        at += length;
        if (!*at) return n;
    }
}

static void print_headings(const struct field *const *fields, unsigned n, const struct query *query)
{
    for (unsigned i = 0; query->header && i < n; i++) {
        printf("%s%s", i ? ", " : "", fields[i]->heading);
        if (fields[i]->unit) printf(" [%s]", fields[i]->unit);
        if (i == n - 1) putchar('\n');
    }
}

static void print_row(const struct field *const *fields, unsigned n, const struct query *query, const struct row *row)
{
    for (unsigned i = 0; i < n; i++) {
        char text[256] = "[N/A]";
        fields[i]->put(row, text, sizeof text);
        printf("%s%s", i ? ", " : "", text);
        if (fields[i]->unit && query->units && text[0] != '[') printf(" %s", fields[i]->unit);
    }
    putchar('\n');
}

int smi_query_gpus(const struct query *query)
{
    const struct field *fields[MAX_FIELDS];
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = parse(gpu_fields, query->fields, fields), n_devices = smi_devices(devices);
    if (!n) return 2;
    print_headings(fields, n, query);
    for (unsigned i = 0; i < n_devices; i++)
        print_row(fields, n, query, &(struct row){.index = i, .device = devices[i]});
    return 0;
}

int smi_query_processes(const struct query *query)
{
    static struct processes processes;
    const struct field *fields[MAX_FIELDS];
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = parse(process_fields, query->fields, fields), n_devices = smi_devices(devices);
    if (!n) return 2;
    print_headings(fields, n, query);
    for (unsigned i = 0; i < n_devices; i++) {
        smi_processes(devices[i], &processes);
        for (unsigned p = 0; p < processes.n; p++)
            print_row(fields, n, query, &(struct row){i, devices[i], &processes.lines[p]});
    }
    return 0;
}
