/* nvidia-smi for machines without a GPU: the table, -L, -q, -x, pmon and the queries that scripts use, in the format
 * of the real tool (580). */
#include "smi/smi.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

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

struct options {
    bool list, full, xml, monitor;
    const char *gpus, *processes, *format, *ids, *parts, *count, *select;
};

/* Options with a value, which follows a `=` or is the next word. */
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

/* Returns how many words the option has; 0: it is unknown. */
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
    if (options->ids && !smi_devices(devices)) {
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
    /* For pmon, -d is a number of seconds. The processes are shown once nevertheless. */
    unsigned parts = options.parts && !options.monitor ? smi_parts(options.parts) : PART_ALL;
    if (!parts) {
        printf("ERROR: Unknown argument to -d: %s\n", options.parts);
        return 255;
    }
    int rc = nvml_load();
    if (rc) return rc;
    smi_select(options.ids);
    rc = show(&options, parts);
    nvml.nvmlShutdown();
    return rc;
}
