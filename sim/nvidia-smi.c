/* nvidia-smi for machines without a GPU: the table, -L, -q, -x, pmon and the queries that scripts use, in the shape of
 * the real tool's (580). */
#include "smi.h"

#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

struct nvml nvml;

unsigned smi_mib(unsigned long long bytes) { return (unsigned)((bytes + (1u << 20) - 1) >> 20); }

bool smi_memory(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    *memory = (nvmlMemory_v2_t){.version = nvmlMemory_v2};
    return !nvml.nvmlDeviceGetMemoryInfo_v2(device, memory);
}

void smi_processes(nvmlDevice_t device, struct processes *processes)
{
    processes->n = MAX_PROCESSES;
    if (nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, &processes->n, processes->lines)) processes->n = 0;
}

void smi_process_name(unsigned pid, char *name, unsigned room)
{
    if (nvml.nvmlSystemGetProcessName(pid, name, room)) snprintf(name, room, "[Not Found]");
    /* A process chooses its own name: nothing of it may reach a terminal as a control sequence. */
    for (char *c = name; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?';
}

static const char *wanted; /* -i: indices, UUIDs or bus ids; NULL: all */

unsigned smi_index(nvmlDevice_t device)
{
    unsigned index = 0;
    nvml.nvmlDeviceGetIndex(device, &index);
    return index;
}

void smi_now(char *text, unsigned room, const char *format)
{
    time_t now = time(NULL);
    struct tm tm;
    strftime(text, room, format, localtime_r(&now, &tm));
}

const char *smi_base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static bool is_wanted(nvmlDevice_t device)
{
    char uuid[96] = "", index[16];
    nvmlPciInfo_t pci = {.busId = ""};
    nvml.nvmlDeviceGetUUID(device, uuid, sizeof uuid);
    nvml.nvmlDeviceGetPciInfo_v3(device, &pci);
    snprintf(index, sizeof index, "%u", smi_index(device));
    for (const char *at = wanted; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        size_t length = strcspn(at, ",");
        const char *names[] = {index, uuid, pci.busId};
        for (int i = 0; i < 3; i++)
            if (strlen(names[i]) == length && !strncasecmp(names[i], at, length)) return true;
    }
    return !wanted;
}

unsigned smi_devices(nvmlDevice_t *devices)
{
    unsigned n = 0, chosen = 0;
    nvml.nvmlDeviceGetCount_v2(&n);
    n = n < MAX_GPUS ? n : MAX_GPUS;
    for (unsigned i = 0; i < n && !nvml.nvmlDeviceGetHandleByIndex_v2(i, &devices[chosen]); i++)
        chosen += is_wanted(devices[chosen]);
    return chosen;
}

static int list(void)
{
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices);
    for (unsigned i = 0; i < n; i++) {
        char name[96] = "", uuid[96] = "";
        nvml.nvmlDeviceGetName(devices[i], name, sizeof name);
        nvml.nvmlDeviceGetUUID(devices[i], uuid, sizeof uuid);
        printf("GPU %u: %s (UUID: %s)\n", smi_index(devices[i]), name, uuid);
    }
    return 0;
}

static int start(void)
{
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!library) {
        puts(
            "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
            "Driver is properly installed and present in your system.");
        return 12;
    }
#define RESOLVE(name) nvml.name = (__typeof__(nvml.name))dlsym(library, #name);
    NVML_FUNCTIONS(RESOLVE)
#undef RESOLVE
#define CHECK(name)                                                                                                    \
    if (!nvml.name) {                                                                                                  \
        puts("Failed to initialize NVML: Function Not Found (" #name ")");                                             \
        return 13;                                                                                                     \
    }
    NVML_FUNCTIONS(CHECK)
#undef CHECK
    nvmlReturn_t result = nvml.nvmlInitWithFlags(0);
    if (result)
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
             "NVIDIA driver is installed and running.\n");
    return (int)result;
}

struct options {
    bool list, full, xml, monitor;
    const char *gpus, *processes, *format, *ids, *parts, *count, *select;
};

/* Options with a value, which follows a `=` or comes as the next word. */
static const struct {
    const char *name;
    size_t offset;
} values[] = {
    {"--query-gpu", offsetof(struct options, gpus)}, {"--query-compute-apps", offsetof(struct options, processes)},
    {"--format", offsetof(struct options, format)},  {"--id", offsetof(struct options, ids)},
    {"-i", offsetof(struct options, ids)},           {"--display", offsetof(struct options, parts)},
    {"-d", offsetof(struct options, parts)},         {"-c", offsetof(struct options, count)},
    {"--count", offsetof(struct options, count)},    {"-s", offsetof(struct options, select)},
    {"--select", offsetof(struct options, select)},
};

static const struct {
    const char *name;
    size_t offset;
} switches[] = {
    {"-L", offsetof(struct options, list)},      {"--list-gpus", offsetof(struct options, list)},
    {"-q", offsetof(struct options, full)},      {"--query", offsetof(struct options, full)},
    {"-x", offsetof(struct options, xml)},       {"--xml-format", offsetof(struct options, xml)},
    {"pmon", offsetof(struct options, monitor)},
};

/* How many words it took; 0: not known. */
static int parse_one(char **words, int left, struct options *options)
{
    for (unsigned i = 0; i < sizeof switches / sizeof *switches; i++) {
        if (strcmp(words[0], switches[i].name)) continue;
        *(bool *)((char *)options + switches[i].offset) = true;
        return 1;
    }
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        size_t length = strlen(values[i].name);
        const char **value = (const char **)((char *)options + values[i].offset);
        if (strncmp(words[0], values[i].name, length)) continue;
        if (words[0][length] == '=') {
            *value = words[0] + length + 1;
            return 1;
        }
        if (words[0][length] || left < 2) continue;
        *value = words[1];
        return 2;
    }
    return 0;
}

static bool parse(int argc, char **argv, struct options *options)
{
    for (int i = 1, took; i < argc; i += took) {
        took = parse_one(argv + i, argc - i, options);
        if (took) continue;
        printf("ERROR: Option %s is not recognized. Please run 'nvidia-smi -h'.\n\n", argv[i]);
        return false;
    }
    if (options->monitor && options->count && !atoi(options->count)) return false;
    return true;
}

static bool has_word(const char *list_of, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = list_of; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, word, length) && (at[length] == ',' || !at[length])) return true;
    return false;
}

static int show(const struct options *options, unsigned parts)
{
    bool querying = options->gpus || options->processes;
    struct query query = {.fields = options->gpus ? options->gpus : options->processes,
                          .header = querying && !has_word(options->format, "noheader"),
                          .units = querying && !has_word(options->format, "nounits")};
    nvmlDevice_t devices[MAX_GPUS];
    if (wanted && !smi_devices(devices)) {
        puts("No devices were found");
        return 6;
    }
    if (options->list) return list();
    if (options->gpus) return smi_query_gpus(&query);
    if (options->processes) return smi_query_processes(&query);
    if (options->monitor) return smi_monitor(options->select ? options->select : "u");
    return options->full || options->xml ? smi_full(options->xml, parts) : smi_table();
}

int main(int argc, char **argv)
{
    struct options options = {0};
    if (!parse(argc, argv, &options)) return 255;
    /* pmon means seconds by -d, and shows once all the same. */
    unsigned parts = options.parts && !options.monitor ? smi_parts(options.parts) : PART_ALL;
    if (!parts) {
        printf("ERROR: Unknown argument to -d: %s\n", options.parts);
        return 255;
    }
    int rc = start();
    if (rc) return rc;
    wanted = options.ids;
    rc = show(&options, parts);
    nvml.nvmlShutdown();
    return rc;
}
