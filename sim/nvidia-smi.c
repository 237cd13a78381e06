/* nvidia-smi for machines without a GPU: the table, -L, and the queries that scripts use, in the shape of the real
 * tool's (580). */
#include "smi.h"

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

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

unsigned smi_devices(nvmlDevice_t *devices)
{
    unsigned n = 0;
    nvml.nvmlDeviceGetCount_v2(&n);
    n = n < MAX_GPUS ? n : MAX_GPUS;
    for (unsigned i = 0; i < n; i++)
        if (nvml.nvmlDeviceGetHandleByIndex_v2(i, &devices[i])) return i;
    return n;
}

static int list(void)
{
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices);
    for (unsigned i = 0; i < n; i++) {
        char name[96] = "", uuid[96] = "";
        nvml.nvmlDeviceGetName(devices[i], name, sizeof name);
        nvml.nvmlDeviceGetUUID(devices[i], uuid, sizeof uuid);
        printf("GPU %u: %s (UUID: %s)\n", i, name, uuid);
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
    bool list;
    const char *gpus, *processes, *format;
};

static bool parse(int argc, char **argv, struct options *options)
{
    static const struct {
        const char *name;
        size_t offset;
    } values[] = {
        {"--query-gpu=", offsetof(struct options, gpus)},
        {"--query-compute-apps=", offsetof(struct options, processes)},
        {"--format=", offsetof(struct options, format)},
    };
    for (int i = 1; i < argc; i++) {
        bool known = !strcmp(argv[i], "-L") || !strcmp(argv[i], "--list-gpus");
        options->list = options->list || known;
        for (unsigned v = 0; v < sizeof values / sizeof *values; v++) {
            size_t length = strlen(values[v].name);
            if (strncmp(argv[i], values[v].name, length)) continue;
            *(const char **)((char *)options + values[v].offset) = argv[i] + length;
            known = true;
        }
        if (!known) {
            printf("ERROR: Option %s is not recognized. Please run 'nvidia-smi -h'.\n\n", argv[i]);
            return false;
        }
    }
    return true;
}

static bool has_word(const char *list_of, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = list_of; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, word, length) && (at[length] == ',' || !at[length])) return true;
    return false;
}

int main(int argc, char **argv)
{
    struct options options = {0};
    if (!parse(argc, argv, &options)) return 255;
    bool querying = options.gpus || options.processes;
    int rc = start();
    if (rc) return rc;
    struct query query = {.fields = options.gpus ? options.gpus : options.processes,
                          .header = querying && !has_word(options.format, "noheader"),
                          .units = querying && !has_word(options.format, "nounits")};
    if (options.list)
        rc = list();
    else if (options.gpus)
        rc = smi_query_gpus(&query);
    else if (options.processes)
        rc = smi_query_processes(&query);
    else
        rc = smi_table();
    nvml.nvmlShutdown();
    return rc;
}
